"""``python -m tests.support.recipe_table``: the tables of ``docs/recipes.md``.

Predictions of ``prefixrl check`` for the recipes under ``configs/recipes``, for the layouts beside
them that were not chosen (why not is worked out from the figures), and on other GPUs. With
``--write FILE`` the text between the file's marks is replaced.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from prefixrl_mcore.accounting.hardware import memory_bandwidth
from prefixrl_mcore.accounting.host_memory import estimate_host
from prefixrl_mcore.accounting.layouts import Plan, make_plan
from prefixrl_mcore.accounting.parameters import model_size
from prefixrl_mcore.accounting.server_memory import ServerMemory
from prefixrl_mcore.accounting.shared_gpu import SharedGpu, sync_export_bytes
from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.check import check_layout, gpu_flops, read_shape, step_work
from prefixrl_mcore.launch.completions import count_completions
from prefixrl_mcore.launch.machine import Machine
from prefixrl_mcore.launch.plan_report import layout_name
from prefixrl_mcore.launch.server_plan import (
    predict_server,
    share_gpus,
    with_sampling,
    with_servers_of_all_nodes,
)
from prefixrl_mcore.records import Problem
from tests.support.recipe_layouts import (
    ELSEWHERE,
    GPUS_PER_NODE,
    RECIPES,
    Recipe,
    changed,
    load_recipe,
)
from tests.support.released_configs import write_shape

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

MEAN_TOKENS = 10_000
"""``--mean-tokens``: between what the paper's FLOPs give for Llama (6,500) and Qwen (13,400)."""

MEMORY_GIB = {"H100": 80.0, "A100": 80.0, "H200": 131.0}
"""``--gpu`` and ``--gpu-memory``; the H200 has 141e9 bytes."""

USABLE_GIB = 72.0
"""Of 80 GiB, a tenth reserved: the defaults of ``prefixrl check``."""

MARGIN_GIB = 0.9 * USABLE_GIB
"""What a recipe may need: the predictions have not been compared with a GPU."""

HOST_GIB = 900.0
"""What a recipe may need of a node's host memory in a save: nodes have 1 TiB, or more."""

PROBLEMS = {
    name: [Problem(problem_id="", text="", answer="")] * num
    for name, num in (("train", 1000), ("aime25", 30), ("hmmt_feb25", 30), ("imo", 200))
}
"""As many as the paper's."""

CONTEXT_GAIN = 0.1
"""Share of the GPU-hours that each doubling of context parallelism has to save: its attention runs
sequence by sequence, which the estimate takes to be as fast as flash attention over the whole
stream."""

SERVER_GAIN = 0.05
"""Share that each doubling of a server's GPUs has to save: the estimate leaves out that they wait
for each other in every layer of every token."""

NODES_GAIN = 0.05
"""Share that each doubling of the nodes has to save: a job waits longer for them, loses one of them
more often, and the speed between them is assumed."""

_GIB = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a recipe, or a layout beside it, is predicted to need."""

    config: RunConfig
    """Its settings, with the servers of all nodes."""

    shape: ModelShape
    """Of the model."""

    rollout_nodes: int
    """Nodes with servers alone."""

    plan: Plan
    """Memory of the trainer, time of a step."""

    server: ServerMemory
    """Memory of a server."""

    shared: SharedGpu | None
    """The GPU that trainer and server share which needs most; None if servers have their own."""

    gpu: str
    """``--gpu``."""

    host_gib: float
    """Of one trainer node, in a save."""

    @property
    def is_colocated(self) -> bool:
        """Servers stand on the trainer's GPUs."""
        return self.rollout_nodes == 0

    @property
    def gpu_gib(self) -> float:
        """The most of a GPU that has a trainer rank."""
        shared = self.shared.peak if self.shared else 0.0
        return max(self.plan.peak_bytes, shared) / _GIB

    @property
    def phases(self) -> str:
        """GiB of a GPU in sampling, sync and update; of two GPUs if servers have their own."""
        if self.shared:
            gpu = self.shared
            return " | ".join(
                f"{value / _GIB:.1f}" for value in (gpu.sampling, gpu.sync, gpu.update)
            )
        resident = max(stage.resident for stage in self.plan.stages)
        exported = sync_export_bytes(self.shape, self.config.rollout.sglang)
        return (
            f"{self.server.awake / _GIB:.1f} (server's own) | "
            f"{(resident + exported) / _GIB:.1f} | {self.plan.peak_bytes / _GIB:.1f}"
        )

    @property
    def trainer_nodes(self) -> int:
        """Nodes with trainer ranks."""
        return self.config.policy.parallel.world_size // GPUS_PER_NODE

    @property
    def num_nodes(self) -> int:
        """Nodes in all."""
        return self.trainer_nodes + self.rollout_nodes

    @property
    def num_servers(self) -> int:
        """SGLang servers."""
        if self.is_colocated:
            return self.config.rollout.sglang.num_members
        return self.rollout_nodes * GPUS_PER_NODE // self.server_gpus

    @property
    def server_gpus(self) -> int:
        """GPUs of a server."""
        return self.config.rollout.sglang.tensor_parallel_size

    @property
    def num_longest(self) -> int:
        """Longest sequences that run at a time on all servers."""
        return self.num_servers * (self.server.kv_tokens // self.config.rollout.max_total_tokens)

    @property
    def gpu_hours(self) -> float:
        """Of all steps on all nodes."""
        gpus = self.num_nodes * GPUS_PER_NODE
        return self.config.trainer.num_steps * self.plan.time.total * gpus / 3600

    @property
    def days(self) -> float:
        """Of all steps."""
        return self.config.trainer.num_steps * self.plan.time.total / 86400

    @property
    def cost(self) -> str:
        """Servers, their room, and time: cells that all tables have."""
        time = self.plan.time
        return (
            f"{self.num_servers} x {self.server_gpus} GPU | {self.num_longest} | "
            f"{time.rollout:.0f} + {time.update:.0f} | {self.days:.1f} | {self.gpu_hours:.0f}"
        )

    @property
    def layout(self) -> str:
        """Nodes, layout, recomputation: cells that all tables have."""
        parallel = self.config.policy.parallel
        nodes = f"{self.trainer_nodes} + {self.rollout_nodes}"
        return f"{nodes} | {layout_name(parallel)} | {self.config.policy.recompute}"


@cache
def predict(recipe: Recipe, neighbour: str = "", gpu: str = "H100") -> Prediction:
    """Return the prediction of a recipe, or of a layout beside it, on a GPU of ``MEMORY_GIB``.

    Raises:
        ConfigError: if training would refuse it.
    """
    config, rollout_nodes = changed(load_recipe(recipe), neighbour)
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(recipe.release, Path(folder))
        model = config.model.model_copy(update={"path": path})
        shape = read_shape(config.model_copy(update={"model": model}))
    check_layout(config, shape)
    work = step_work(config, MEAN_TOKENS)
    machine = assumed_machine(config, rollout_nodes, gpu)
    config = with_servers_of_all_nodes(config, machine)
    machine = with_sampling(config, shape, work, machine)
    host = estimate_host(shape, config.policy, has_reference=False)
    plan = make_plan(
        shape,
        config.policy,
        work,
        machine.assumptions,
        logits_dtype=config.model.logits_dtype,
    )
    return Prediction(
        config=config,
        shape=shape,
        rollout_nodes=rollout_nodes,
        plan=plan,
        server=predict_server(config, shape, machine),
        shared=None if rollout_nodes else share_gpus(config, shape, plan.stages, machine),
        gpu=gpu,
        host_gib=host.total * GPUS_PER_NODE / _GIB,
    )


def assumed_machine(config: RunConfig, rollout_nodes: int, gpu: str = "H100") -> Machine:
    """Return what ``prefixrl check`` assumes with the options in the recipe's file."""
    return Machine(
        num_gpus=None,
        memory_gib=MEMORY_GIB[gpu],
        reserved_fraction=0.1,
        assumptions=Assumptions(peak_flops=gpu_flops(config, gpu)),
        mean_tokens=MEAN_TOKENS,
        rollout_gpus=rollout_nodes * GPUS_PER_NODE or None,
        memory_bytes_per_second=memory_bandwidth(gpu),
    )


def objections(other: Prediction, chosen: Prediction) -> list[str]:
    """Return what speaks against a layout, in comparison with the one that was chosen."""
    found: list[str] = []
    if other.gpu_gib > USABLE_GIB or other.server.awake > MEMORY_GIB["H100"] * _GIB:
        found.append("does not fit")
    elif other.gpu_gib > MARGIN_GIB:
        found.append("fits without margin")
    if other.host_gib > HOST_GIB:
        found.append(f"above {HOST_GIB:.0f} GiB of host")
    if other.num_longest < other.num_servers:
        found.append("no room for the longest sequence")
    excess = other.gpu_hours / chosen.gpu_hours - 1
    demands = _demands(other, chosen)
    if excess > 0:
        found.append(f"{excess:+.1%} GPU-hours")
    elif -excess < sum(demands.values()):
        found.append(f"{' and '.join(demands)} for {excess:+.1%}")
    elif other.num_longest < 0.9 * chosen.num_longest:
        found.append(f"room for {other.num_longest} instead of {chosen.num_longest} sequences")
    return found


def _demands(other: Prediction, chosen: Prediction) -> dict[str, float]:
    """Return what a layout has more of, and the share of the GPU-hours that it has to save."""
    context, chosen_context = (
        found.config.policy.parallel.context_parallel_size for found in (other, chosen)
    )
    grown = {
        "context parallelism": (CONTEXT_GAIN, context / chosen_context),
        "larger servers": (SERVER_GAIN, other.server_gpus / chosen.server_gpus),
        "more nodes": (NODES_GAIN, other.num_nodes / chosen.num_nodes),
    }
    return {
        what: gain * math.ceil(math.log2(ratio))
        for what, (gain, ratio) in grown.items()
        if ratio > 1
    }


def tables() -> str:
    """Return all four tables: the longest one last."""
    return "\n".join([*_chosen(), "", *_sampling(), "", *_elsewhere(), "", *_neighbours()])


_PHASES = "sampling | sync | update"
_COST = "servers | longest at a time | step, s | days | GPU-hours"


def _header(*cells: str) -> Iterator[str]:
    """Yield the head of a table."""
    names = " | ".join(cells)
    yield f"| {names} |"
    yield "|---" * len(names.split(" | ")) + "|"


def _chosen() -> Iterator[str]:
    """Yield the table of the recipes."""
    nodes = "nodes, trainer + rollout | layout | recompute"
    yield from _header("recipe | parameters", nodes, _PHASES, "host, GiB", _COST)
    for recipe in RECIPES:
        found = predict(recipe)
        billions = model_size(found.shape).num_parameters / 1e9
        link = f"[{recipe.name}](../configs/recipes/{recipe.name}.toml)"
        cells = f"{found.layout} | {found.phases} | {found.host_gib:.0f} | {found.cost}"
        yield f"| {link} | {billions:.1f}e9 | {cells} |"


def _sampling() -> Iterator[str]:
    """Yield the table of what is sampled beside the training, at the speed of its rollouts."""
    stages = "evaluation in training | `prefixrl eval` | collection, at most"
    yield from _header("recipe | completions of training", stages)
    for recipe in RECIPES:
        found = predict(recipe)
        count = count_completions(found.config, PROBLEMS)
        num_gpus = found.num_nodes * GPUS_PER_NODE
        hours = found.plan.time.rollout * num_gpus / found.config.most_completions_per_step / 3600
        cells = (
            f"{number:,}: {number * hours:,.0f} GPU-hours"
            for number in (count.in_training, count.checkpoint, count.collection)
        )
        yield f"| {recipe.name} | {count.training:,} | {' | '.join(cells)} |"


def _neighbours() -> Iterator[str]:
    """Yield the table of what was not chosen."""
    what = "instead of | nodes | layout | recompute | engine"
    yield from _header(what, "GPU, GiB | host, GiB", _COST, "why not")
    for recipe in RECIPES:
        chosen = predict(recipe)
        for neighbour in recipe.neighbours:
            other = predict(recipe, neighbour)
            engine = "sleeps" if other.config.rollout.colocated else "awake"
            cells = f"{other.layout} | {engine} | {other.gpu_gib:.1f} | {other.host_gib:.0f}"
            why = ", ".join(objections(other, chosen))
            yield f"| {recipe.name} | {cells} | {other.cost} | {why} |"


def _elsewhere() -> Iterator[str]:
    """Yield the table of other GPUs."""
    nodes = "nodes | layout | recompute | memory_fraction"
    yield from _header("recipe | on", nodes, _PHASES, "usable, GiB", _COST)
    recipes = {recipe.name: recipe for recipe in RECIPES}
    for name, gpu, change in ELSEWHERE:
        found = predict(recipes[name], change, gpu)
        fraction = found.config.rollout.sglang.memory_fraction
        cells = f"{found.layout} | {fraction:g} | {found.phases} | {0.9 * MEMORY_GIB[gpu]:.0f}"
        yield f"| {name} | {gpu} | {cells} | {found.cost} |"


def written_tables(text: str) -> str:
    """Return what is between the marks of a file's text."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Print or write both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file whose marked text is replaced")
    target: Path | None = parser.parse_args().write
    if target is None:
        sys.stdout.write(tables() + "\n")
        return
    before, _, rest = target.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    target.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
