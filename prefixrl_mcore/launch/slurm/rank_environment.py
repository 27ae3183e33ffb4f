"""From the variables that Slurm gives a task to those that torch.distributed reads."""

from collections.abc import Mapping

from prefixrl_mcore.config.base import ConfigError

_FIRST_PORT, _PORTS_PER_JOB, _NUM_BLOCKS = 20_000, 32, 375
"""Blocks of ports below 32000, under those that Linux hands out by itself."""


def master_port(job_id: str) -> int:
    """Return where rank 0 of a job listens; jobs that follow each other have other ports."""
    return _FIRST_PORT + int(job_id) % _NUM_BLOCKS * _PORTS_PER_JOB


def server_port(job_id: str, local_index: int) -> int:
    """Return where the rollout server listens that is number ``local_index`` of its node."""
    return master_port(job_id) + 1 + local_index


def start_number(environment: Mapping[str, str]) -> int:
    """Return how often the job has been started before."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ... of a trainer's task.

    Raises:
        ConfigError: if this is no task of a batch script of ``prefixrl launch``.
    """
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
    missing = [
        name
        for name in (*names, "SLURM_NODEID", "SLURM_JOB_ID", "PREFIXRL_TRAINER_HOSTS")
        if not environment.get(name)
    ]
    if missing:
        raise ConfigError(
            f"not a task of a launched job: {', '.join(missing)} not set; tasks are started by the "
            "batch script of prefixrl launch"
        )
    counts = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment["PREFIXRL_TRAINER_HOSTS"].split(",")[0],
        "MASTER_PORT": str(master_port(environment["SLURM_JOB_ID"])),
    }


def tasks_per_node(text: str) -> list[int]:
    """Return the tasks of each node from Slurm's short form, such as ``4(x3),2``."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.removesuffix(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts
