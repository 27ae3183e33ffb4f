"""Words of an srun that are the same for the pre-check, whose step is ours, and NeMo-Run's."""

import sys
from pathlib import Path

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.site import NEMO_RUN_REWRITES, ContainerConfig, SiteConfig
from prefixrl_mcore.launch.slurm.layout import TRAINER, JobLayout


def interpreter(site: SiteConfig) -> str:
    """Return the Python that tasks run under.

    Raises:
        ConfigError: if NeMo-Run would make another one of it.
    """
    # Not resolved: an environment's interpreter is a link, and finds its packages by the link.
    python = str(site.python or Path(sys.executable).absolute())
    if site.container is None and NEMO_RUN_REWRITES in python:
        raise ConfigError(
            f"{python}, which prefixrl launch runs under: NeMo-Run replaces {NEMO_RUN_REWRITES} in "
            "a batch script; let python of the site name an interpreter at another path"
        )
    return python


def container_words(container: ContainerConfig | None) -> list[str]:
    """Return how a task is put into its container."""
    if container is None:
        return []
    lists = {"mounts": container.mounts, "env": container.environment}
    given = [f"--container-{name}={','.join(values)}" for name, values in lists.items() if values]
    return [f"--container-image={container.image}", *given]


def cpu_words(cpus: int | None) -> list[str]:
    """Return how a task gets its CPUs: since Slurm 22.05 srun does not take them from sbatch."""
    return [] if cpus is None else [f"--cpus-per-task={cpus}"]


def cpus_of_first(site: SiteConfig, role: str) -> int | None:
    """Return the CPUs of a trainer rank, or of a stage, which has a node to itself."""
    if site.cpus_per_task is None or role == TRAINER:
        return site.cpus_per_task
    return site.cpus_per_task * max(site.node_ranks, 1)


def cpus_of_server(site: SiteConfig, layout: JobLayout) -> int | None:
    """Return the CPUs of a rollout task."""
    own = site.rollout_nodes.cpus_per_task
    if layout.shape == "heterogeneous" and own is not None:
        return own
    if site.cpus_per_task is None:
        return None
    return site.cpus_per_task * max(layout.rollout_gpus_per_node // layout.servers_per_node, 1)
