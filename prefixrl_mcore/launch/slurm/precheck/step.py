"""The step of the batch script that checks the nodes."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.layout import JobLayout
from prefixrl_mcore.launch.slurm.precheck.exit_codes import EXCLUDE

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
            "trainer": {"gpus": site.gpus_per_node, "num_server_ports": 0},
            "rollout": {
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
        groups = [(layout.trainer_nodes, 0), (layout.rollout_nodes, 1)]
    else:
        groups = [(layout.num_nodes, None)]
    command = " : ".join(_one_task_per_node(site, folder, *group) for group in groups)
    return {
        "command": f"srun {command}",
        "hang_seconds": round(site.precheck.timeout_seconds) + _START_SECONDS + _DECIDE_SECONDS,
        "exclude_code": EXCLUDE,
        "max_excluded": site.precheck.max_excluded_nodes,
    }


def _one_task_per_node(
    site: SiteConfig, folder: JobFolder, nodes: int, component: int | None
) -> str:
    """Return arguments and command of srun for the nodes of one component."""
    python = str(site.python or Path(sys.executable).absolute())
    container = site.container
    words = [
        *([] if component is None else [f"--het-group={component}"]),
        *(f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        # For ever: nodes that have said their finding end long before one that is slow.
        *("--kill-on-bad-exit=1", "--wait=0"),
        *site.srun_args,
    ]
    if container is not None:
        words += [f"--container-image={container.image}"]
        words += [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        names = ",".join(container.environment)
        words += [f"--container-env={names}"] if names else []
    words += [python, "-m", _TASK, str(folder.path)]
    words += [f"{site.precheck.timeout_seconds:g}", str(_START_SECONDS)]
    # Of the start: the one thing that bash fills in.
    return f'--output "{folder.logs}/start-$start/precheck.log" {shlex.join(words)}'
