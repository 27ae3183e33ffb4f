"""The step of the batch script that checks the nodes."""

import shlex
from collections.abc import Mapping
from typing import Any

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.layout import ROLLOUT, TRAINER, JobLayout
from prefixrl_mcore.launch.slurm.srun import container_words, cpu_words, cpus_of_server, interpreter

_TASK = "prefixrl_mcore.launch.slurm.precheck.task"
_START_SECONDS = 600
"""How long the first node may take to start a task, which may fetch a container image."""

_DECIDE_SECONDS = 60
"""How long the first node may take to decide, and the step to end, after the nodes' own time."""


def expectations(site: SiteConfig, layout: JobLayout, needed: Mapping[str, str]) -> dict[str, Any]:
    """Return what the first node tells the others to check."""
    return {
        "limits": site.precheck.model_dump(exclude={"enabled"}),
        "needed": dict(needed),
        "is_in_container": site.container is not None,
        "roles": {
            TRAINER: {
                "gpus": site.gpus_per_node,
                "num_server_ports": layout.servers_per_node if layout.shares_nodes else 0,
            },
            ROLLOUT: {
                "gpus": layout.rollout_gpus_per_node,
                "num_server_ports": layout.servers_per_node,
            },
        },
    }


def precheck_step(site: SiteConfig, layout: JobLayout, folder: JobFolder) -> dict[str, Any] | None:
    """Return what the template needs; None if the site wants no check."""
    if not site.precheck.enabled:
        return None
    if layout.shape == "heterogeneous":
        groups = [
            (layout.trainer_nodes, 0, site.cpus_per_task),
            (layout.rollout_nodes, 1, cpus_of_server(site, layout)),
        ]
    else:
        groups = [(layout.num_nodes, None, site.cpus_per_task)]
    command = " : ".join(_one_task_per_node(site, folder, *group) for group in groups)
    return {
        "command": f"srun {command}",
        "hang_seconds": round(site.precheck.timeout_seconds) + _START_SECONDS + _DECIDE_SECONDS,
        "exclude_code": exit_codes.EXCLUDE_NODES,
        "max_excluded": site.precheck.max_excluded_nodes,
    }


def _one_task_per_node(
    site: SiteConfig, folder: JobFolder, nodes: int, component: int | None, cpus: int | None
) -> str:
    """Return arguments and command of srun for the nodes of one component."""
    words = [
        *([] if component is None else [f"--het-group={component}"]),
        *(f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        # For ever: nodes that have said their finding end long before one that is slow.
        *("--kill-on-bad-exit=1", "--wait=0"),
        *cpu_words(cpus),
        *container_words(site.container),
        *site.srun_args,
    ]
    words += [interpreter(site), "-m", _TASK, str(folder.path)]
    words += [f"{site.precheck.timeout_seconds:g}", str(_START_SECONDS)]
    # Of the start: the one thing that bash fills in.
    return f'--output "{folder.logs}/start-$start/precheck.log" {shlex.join(words)}'
