"""Which nodes and tasks a run needs at a site: the arithmetic, and its errors."""

from dataclasses import dataclass
from typing import Literal

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.server_gpus import check_server_gpus
from prefixrl_mcore.config.site import SiteConfig

Shape = Literal["colocated", "split", "heterogeneous"]

TRAINER, ROLLOUT = "trainer", "rollout"
"""Roles of tasks: those that train, and those that have a server each."""


RECIPE = {"collect": True, "prefixes": False, TRAINER: True, "eval": True, "report": False}
"""The stages of a run, in order, and whether they need GPUs and an engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobLayout:
    """Nodes and tasks of one job."""

    shape: Shape
    """``colocated``: every node trains and generates; ``split``: one job, trainer nodes first, then
    rollout nodes; ``heterogeneous``: the same as two components of a heterogeneous job."""

    trainer_nodes: int
    """Nodes with trainer ranks."""

    ranks_per_node: int
    """Trainer ranks on each of them."""

    rollout_nodes: int
    """Nodes with rollout servers alone; 0 if colocated."""

    servers_per_node: int
    """Rollout tasks, a server each, on each of ``server_nodes``; 0 if rank 0 starts the servers."""

    rollout_gpus_per_node: int
    """GPUs of each of ``server_nodes``."""

    @property
    def num_nodes(self) -> int:
        """Nodes in all."""
        return self.trainer_nodes + self.rollout_nodes

    @property
    def server_nodes(self) -> int:
        """Nodes with rollout tasks: the rollout nodes, or those of the trainer if colocated."""
        return (self.rollout_nodes or self.trainer_nodes) if self.servers_per_node else 0

    @property
    def num_servers(self) -> int:
        """Rollout tasks in all."""
        return self.server_nodes * self.servers_per_node

    @property
    def shares_nodes(self) -> bool:
        """Rollout tasks run beside trainer ranks."""
        return self.server_nodes > self.rollout_nodes


ONE_TASK = JobLayout(
    shape="colocated",
    trainer_nodes=1,
    ranks_per_node=1,
    rollout_nodes=0,
    servers_per_node=0,
    rollout_gpus_per_node=0,
)
"""A stage of the recipe that is one process, which starts its own servers."""


def lay_out(
    config: RunConfig,
    site: SiteConfig,
    *,
    shape: Shape = "colocated",
    nodes: int | None = None,
    rollout_nodes: int | None = None,
) -> JobLayout:
    """Return the nodes that a run takes.

    Args:
        config: the run.
        site: the cluster.
        shape: where rollouts are made.
        nodes: nodes in all, to be checked; None takes what the config needs.
        rollout_nodes: nodes with servers alone; None is 1 unless colocated.

    Raises:
        ConfigError: if ranks do not fill whole nodes, the node of rank 0 has no GPUs for the
            servers that it starts, there are fewer servers than ``min_servers``, or ``nodes`` is
            another number, with the arithmetic.
    """
    if rollout_nodes is not None and rollout_nodes < 1:
        raise ConfigError(
            f"--rollout-nodes {rollout_nodes}: must be 1 or more; --shape colocated has none"
        )
    if shape == "colocated" and rollout_nodes:
        raise ConfigError(
            f"--rollout-nodes {rollout_nodes} needs --shape split or heterogeneous, got colocated: "
            "there every node generates"
        )
    rollout_nodes = 0 if shape == "colocated" else rollout_nodes or 1
    trainer_nodes, ranks_per_node = _trainer_nodes(config, site, rollout_nodes)
    rollout_gpus = site.gpus_per_node
    if shape == "heterogeneous" and site.rollout_nodes.gpus_per_node is not None:
        rollout_gpus = site.rollout_nodes.gpus_per_node
    if rollout_nodes:
        servers_per_node = _servers_per_node(config, rollout_gpus)
    else:
        servers_per_node = _servers_beside_ranks(
            config, site, trainer_nodes=trainer_nodes, ranks_per_node=ranks_per_node
        )
    layout = JobLayout(
        shape=shape,
        trainer_nodes=trainer_nodes,
        ranks_per_node=ranks_per_node,
        rollout_nodes=rollout_nodes,
        servers_per_node=servers_per_node,
        rollout_gpus_per_node=rollout_gpus if servers_per_node else 0,
    )
    if config.rollout.engine != "transformers":
        servers, num_tasks = config.rollout.sglang, layout.num_servers
        servers.check_min_servers(num_tasks or servers.num_members)
    if nodes is not None and nodes != layout.num_nodes:
        raise ConfigError(
            f"--nodes {nodes} does not fit: {explain(config, site, layout)}; say --nodes "
            f"{layout.num_nodes}, or change policy.parallel"
        )
    return layout


def explain(config: RunConfig, site: SiteConfig, layout: JobLayout) -> str:
    """Return the arithmetic of a layout, in one line."""
    ranks = config.policy.parallel.arithmetic
    text = f"{ranks} on {layout.trainer_nodes} x {layout.ranks_per_node} {_unit(site)}"
    servers = layout.num_servers
    what = f"{servers} rollout servers x TP {config.rollout.sglang.tensor_parallel_size}"
    if layout.shares_nodes:
        text += f", in turn with {what}"
    elif servers:
        text += f" + {what} on {layout.rollout_nodes} nodes"
        if layout.rollout_gpus_per_node:
            text += f" x {layout.rollout_gpus_per_node} GPUs"
    return f"{text} = {layout.num_nodes} node{'s' if layout.num_nodes > 1 else ''}"


def _unit(site: SiteConfig) -> str:
    """Return what a trainer rank takes."""
    return "GPUs" if site.gpus_per_node else "ranks"


def _trainer_nodes(config: RunConfig, site: SiteConfig, rollout_nodes: int) -> tuple[int, int]:
    """Return trainer nodes and the ranks on each.

    Raises:
        ConfigError: if the ranks do not fill whole nodes.
    """
    parallel, per_node = config.policy.parallel, site.node_ranks
    world_size = parallel.world_size
    if world_size <= per_node:
        return 1, world_size
    full, left = divmod(world_size, per_node)
    if left == 0:
        return full, per_node
    rest = parallel.data_parallel_size
    others = world_size // rest
    fitting = [dp for dp in range(1, 2 * rest + 1) if others * dp % per_node == 0]
    remedy = f"or set ranks_per_node of the site to a divisor of {world_size}"
    if fitting:
        nearest = min(fitting, key=lambda dp: abs(dp - rest))
        remedy = f"for example policy.parallel.data_parallel_size={nearest}, {remedy}"
    raise ConfigError(
        f"{parallel.arithmetic} do not fill whole nodes of {per_node} {_unit(site)}: {full} nodes "
        f"have {full * per_node}, {full + 1} have {(full + 1) * per_node}"
        + (f" (beside {rollout_nodes} rollout nodes)" if rollout_nodes else "")
        + f". Change policy.parallel, {remedy}"
    )


def _servers_beside_ranks(
    config: RunConfig, site: SiteConfig, *, trainer_nodes: int, ranks_per_node: int
) -> int:
    """Return the rollout tasks of each trainer node; 0 where rank 0 alone has an engine.

    On one node rank 0 starts the servers itself, as without Slurm; on several its children would
    leave the GPUs of all other nodes idle.

    Raises:
        ConfigError: if there are too few GPUs for the servers, or some would be left over.
    """
    servers, gpus = config.rollout.sglang, site.gpus_per_node
    if not config.rollout.starts_servers:
        return 0
    if gpus == 0:
        return servers.num_servers if trainer_nodes > 1 else 0
    if trainer_nodes > 1 and not config.rollout.colocated and ranks_per_node < gpus:
        raise ConfigError(
            f"ranks_per_node = {ranks_per_node} of {gpus} GPUs on {trainer_nodes} trainer nodes: "
            f"rank 0 starts servers on its own node alone, and {gpus - ranks_per_node} GPUs of "
            "each other one would idle; say --shape split, or rollout.colocated=true, or let "
            "ranks_per_node of the site fill a node"
        )
    if trainer_nodes == 1 or not config.rollout.colocated:
        check_server_gpus(config.rollout, num_trainer_ranks=ranks_per_node, num_gpus=gpus)
        return 0
    per_node = _servers_per_node(config, gpus)
    if servers.num_servers not in (1, per_node):
        raise ConfigError(
            f"rollout.sglang.num_servers = {servers.num_servers}: on several nodes each node is "
            f"filled with servers, {gpus} GPUs / TP {servers.tensor_parallel_size} = {per_node}; "
            "leave num_servers out"
        )
    return per_node


def _servers_per_node(config: RunConfig, gpus: int) -> int:
    """Return how many rollout servers a node of so many GPUs takes.

    Raises:
        ConfigError: if GPUs would be left over, or one server does not fit.
    """
    size = config.rollout.sglang.tensor_parallel_size
    if gpus == 0:
        return 1
    if gpus % size:
        raise ConfigError(
            f"rollout.sglang.tensor_parallel_size = {size} does not divide the {gpus} GPUs of a "
            "node with servers: they do not reach over nodes and leave no GPU out"
        )
    return gpus // size
