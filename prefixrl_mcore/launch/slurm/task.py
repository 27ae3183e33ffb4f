"""What srun starts: ``python -m prefixrl_mcore.launch.slurm.task JOB_FOLDER ROLE``."""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.local import RANK_DEFAULTS
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd, TaskFile
from prefixrl_mcore.launch.slurm.layout import ROLLOUT, TRAINER
from prefixrl_mcore.launch.slurm.orphan import end_with_a_later_start
from prefixrl_mcore.launch.slurm.rank_environment import rank_variables, start_number
from prefixrl_mcore.launch.slurm.states import SlurmError
from prefixrl_mcore.observability.run_folder import RunFolder

_BEGIN_SECONDS = 600.0
"""What a node may take to begin a task, beyond the start of its server: it may fetch an image."""


def main() -> int:
    """Run one task and return its exit code."""
    folder, role = JobFolder(Path(sys.argv[1])), sys.argv[2]
    if role not in _ROLES:
        raise ConfigError(f"role {role}: expected one of {', '.join(_ROLES)}")
    exit_code = 1
    try:
        exit_code = _run(folder, role)
    except SystemExit as end:
        exit_code = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        _write_end(folder, role, exit_code)
    return exit_code


def _write_end(folder: JobFolder, role: str, exit_code: int) -> None:
    """Keep how this task ended; where that cannot be written, its exit code still counts."""
    end = TaskEnd(
        task=f"{role}-{os.environ['SLURM_PROCID']}",
        node=socket.gethostname(),
        exit_code=exit_code,
        unix_seconds=time.time(),
    )
    try:
        folder.write_end(start_number(os.environ), end)
    except OSError as error:
        sys.stderr.write(
            f"{end.task} on {end.node} ends with exit code {exit_code}, which cannot be written to "
            f"{folder.logs}: {error.strerror}\n"
        )


def _run(folder: JobFolder, role: str) -> int:
    """Run one task where the run was launched.

    Raises:
        ConfigError: if this node does not see the job's folder, or the launcher's.
    """
    task = folder.read_task()
    end_with_a_later_start(folder, start_number(os.environ))
    if (role, os.environ["SLURM_PROCID"]) == (TRAINER, "0"):
        folder.write_begin(start_number(os.environ))
    try:
        os.chdir(task.working_directory)
    except OSError as error:
        raise ConfigError(
            f"{task.working_directory}: {socket.gethostname()} cannot enter it ({error.strerror}); "
            "launch from a folder that all nodes see under the same path, or mount it"
        ) from None
    return _ROLES[role](folder, task)


def _train(folder: JobFolder, task: TaskFile) -> int:
    """Be one rank of the trainer."""
    os.environ.update({**RANK_DEFAULTS, **os.environ, **rank_variables(os.environ)})
    arguments = train_arguments(task, os.environ)
    if task.num_servers:
        servers = load_config(RunConfig, Path(task.config), []).rollout.sglang
        arguments += server_flags(
            folder,
            task,
            start=start_number(os.environ),
            timeout_seconds=_BEGIN_SECONDS + servers.start_timeout_seconds,
        )
    # Here: it imports what only a trainer needs.
    from prefixrl_mcore.cli import main as prefixrl

    return prefixrl(arguments)


def _serve(folder: JobFolder, task: TaskFile) -> int:
    """Run one rollout server."""
    # Here: it imports what only a server needs.
    from prefixrl_mcore.launch.slurm.rollout_task import serve

    return serve(folder, task, os.environ)


def _stage(name: str, folder: JobFolder, task: TaskFile) -> int:
    """Run another stage of the recipe, in one process."""
    # Here: it imports what only a stage needs.
    from prefixrl_mcore.cli import main as prefixrl

    return prefixrl(stage_arguments(name, task))


_ROLES = {
    TRAINER: _train,
    ROLLOUT: _serve,
    **{name: partial(_stage, name) for name in ("collect", "prefixes", "eval", "report")},
}


def server_flags(
    folder: JobFolder,
    task: TaskFile,
    *,
    start: int,
    timeout_seconds: float,
    poll_seconds: float = 1.0,
) -> list[str]:
    """Wait until all rollout tasks of this start have said where; return the flags that name them.

    The trainer waits for a lost server once more than its task starts it again, so that the task,
    which gives up by sending the job back into the queue, has the last word.

    Args:
        folder: the job's.
        task: how many there are.
        start: of the job.
        timeout_seconds: how long they may take; one that was killed says nothing.
        poll_seconds: between two looks.

    Raises:
        SlurmError: if one of them has ended instead, or says nothing in time.
    """
    files = {f"{ROLLOUT}-{i}": folder.server_file(start, i) for i in range(task.num_servers)}
    logs, deadline = folder.server_file(start, 0).parent, time.monotonic() + timeout_seconds
    while missing := [name for name, file in files.items() if not file.exists()]:
        for end in filter(None, (folder.read_end(start, name) for name in files)):
            raise SlurmError(
                f"{end.task} on {end.node} ended with exit code {end.exit_code} before all rollout "
                f"servers were there; its log is in {logs}"
            )
        if time.monotonic() > deadline:
            raise SlurmError(
                f"{', '.join(missing)}: no address after {timeout_seconds:.0f} s; was it killed? "
                f"Its log, if it has begun, is in {logs}; raise "
                "rollout.sglang.start_timeout_seconds if it is only slow"
            )
        time.sleep(poll_seconds)
    servers = [json.loads(file.read_text()) for file in files.values()]
    waits = 1 + max(server["max_restarts"] for server in servers)
    return [
        *("--rollout.sglang.urls", *(server["url"] for server in servers)),
        *("--rollout.sglang.num-servers", "1"),  # the config's is of each node
        *("--rollout.sglang.max-restarts", str(waits)),
    ]


def stage_arguments(name: str, task: TaskFile) -> list[str]:
    """Return the command line of another stage of the recipe.

    It starts the servers of one node; a ``min_servers`` above that is of the training job's.
    """
    if name == "report":
        return [name, task.run_folder]
    servers = load_config(RunConfig, Path(task.config), []).rollout.sglang
    arguments = [name, task.config]
    if servers.min_servers > servers.num_members:
        arguments += ["--rollout.sglang.min-servers", str(servers.num_members)]
    return arguments


def train_arguments(task: TaskFile, environment: Mapping[str, str]) -> list[str]:
    """Return the command line of a trainer rank; all ranks must come to the same.

    A start after a requeue resumes what the start before it began, if it got so far.
    """
    arguments = ["train", task.config]
    is_restart = start_number(environment) > 0
    has_run = RunFolder(Path(task.run_folder)).config_file.exists()
    if task.is_resumed or (is_restart and has_run):
        arguments.append("--resume")
    end = environment.get("PREFIXRL_JOB_END_UNIX_SECONDS")
    if end:
        arguments += ["--trainer.end-unix-seconds", end]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
