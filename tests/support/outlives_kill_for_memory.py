"""A task whose child takes more memory than the job has: ``python -m ... JOB_FOLDER``.

It says that it has saved, and in the start after that, that it is done.
"""

import os
import subprocess
import sys
from pathlib import Path

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd
from prefixrl_mcore.launch.slurm.rank_environment import start_number

if __name__ == "__main__":
    child = subprocess.run(
        [sys.executable, "-c", "print(len(bytearray(400 * 2**20)))"], check=False
    )
    assert child.returncode == -9, child
    start = start_number(os.environ)
    code = 0 if start else exit_codes.TIME_LIMIT
    end = TaskEnd(task="trainer-0", node="n1", exit_code=code, unix_seconds=0.0)
    JobFolder(Path(sys.argv[1])).write_end(start, end)
    sys.exit(code)
