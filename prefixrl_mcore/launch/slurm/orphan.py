"""The end of a task whose job was started again while it lives.

Slurm gives up a node whose daemon does not answer and starts the job on others; what runs on that
node lives on, unseen. A later start makes a folder of its own as the first thing it does.
"""

import os
import sys
import threading
import time
from pathlib import Path

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.launch.slurm.job_folder import JobFolder

_POLL_SECONDS = 5.0


def end_with_a_later_start(
    folder: JobFolder, start: int, *, poll_seconds: float = _POLL_SECONDS
) -> None:
    """End this process, in a thread, when a later start of its job exists.

    It ends at once and saves nothing: the run folder belongs to the later start, which waits until
    the lease of this one is stale.
    """
    later = folder.logs / f"start-{start + 1}"

    def watch() -> None:
        while not path_exists(later):
            time.sleep(poll_seconds)
        sys.stderr.write(f"{later} exists: Slurm has lost this start and goes on without it\n")
        sys.stderr.flush()
        os._exit(exit_codes.GIVE_UP)

    threading.Thread(target=watch, name="orphan", daemon=True).start()


def path_exists(path: Path) -> bool:
    """Return whether a path exists; no answer of a shared file system (ESTALE, EIO) says no."""
    try:
        return path.exists()
    except OSError:
        return False
