"""What srun starts: ``python -m prefixrl_mcore.launch.slurm.task JOB_FOLDER ROLE``."""

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.launch.local import RANK_DEFAULTS
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd, TaskFile
from prefixrl_mcore.launch.slurm.rank_environment import rank_variables
from prefixrl_mcore.observability.run_folder import RunFolder


def main() -> int:
    """Run one task and return its exit code."""
    folder, role = JobFolder(Path(sys.argv[1])), sys.argv[2]
    if role != "trainer":
        raise ConfigError(f"role {role}: expected trainer")
    task = folder.read_task()
    os.chdir(task.working_directory)
    os.environ.update({**RANK_DEFAULTS, **os.environ, **rank_variables(os.environ)})
    # Here: it imports what only a trainer needs.
    from prefixrl_mcore.cli import main as prefixrl

    exit_code = 1
    try:
        exit_code = prefixrl(train_arguments(task, os.environ))
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        _note_end(folder, f"{role}-{os.environ['RANK']}", exit_code)
    return exit_code


def _note_end(folder: JobFolder, task: str, exit_code: int) -> None:
    """Keep how this task ended, for the summary of a failed job."""
    end = TaskEnd(
        task=task, node=socket.gethostname(), exit_code=exit_code, unix_seconds=time.time()
    )
    folder.write_end(int(os.environ.get("SLURM_RESTART_COUNT") or 0), end)


def train_arguments(task: TaskFile, environment: Mapping[str, str]) -> list[str]:
    """Return the command line of a trainer rank; all ranks must come to the same.

    A start after a requeue resumes what the start before it began, if it got so far.
    """
    arguments = ["train", task.config]
    is_restart = int(environment.get("SLURM_RESTART_COUNT") or 0) > 0
    has_run = RunFolder(Path(task.run_folder)).config_file.exists()
    if task.is_resumed or (is_restart and has_run):
        arguments.append("--resume")
    end = environment.get("PREFIXRL_JOB_END_UNIX_SECONDS")
    if end:
        arguments += ["--trainer.end-unix-seconds", end]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
