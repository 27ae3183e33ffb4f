"""A task that writes to a run folder as a trainer may: ``... JOB_FOLDER RUN_FOLDER``.

Its first start goes on for ten minutes, the others for a second.
"""

import os
import socket
import sys
import time
from pathlib import Path

from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.orphan import end_with_a_later_start
from prefixrl_mcore.launch.slurm.rank_environment import start_number
from prefixrl_mcore.observability.lease import Lease

start = start_number(os.environ)
end_with_a_later_start(JobFolder(Path(sys.argv[1])), start)
with Lease(Path(sys.argv[2]) / "lease.json", renewal_seconds=1.0, stale_seconds=8.0):
    for _ in range(10 if start else 6000):
        with (Path(sys.argv[2]) / "written").open("a") as file:
            file.write(f"{start} {socket.gethostname()} {os.getpid()}\n")
        time.sleep(0.1)
