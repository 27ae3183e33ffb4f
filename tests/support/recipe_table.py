"""``python -m tests.support.recipe_table``: the tables of ``docs/recipes.md``.

Predictions of ``prefixrl check`` for the recipes under ``configs/recipes``, for the layouts beside
them that were not chosen (why not is worked out from the figures), and on other GPUs. With
``--write FILE`` the text between the file's marks is replaced.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prefixrl_mcore.accounting.hardware import memory_bandwidth
from prefixrl_mcore.accounting.host_memory import estimate_host
from prefixrl_mcore.accounting.layouts import Plan, make_plan
from prefixrl_mcore.accounting.parameters import model_size
from prefixrl_mcore.accounting.server_memory import ServerMemory
from prefixrl_mcore.accounting.shared_gpu import SharedGpu, sync_export_bytes
from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.check import check_layout, gpu_flops, read_shape, step_work
from prefixrl_mcore.launch.machine import Machine
from prefixrl_mcore.launch.plan_report import layout_name
from prefixrl_mcore.launch.server_plan import predict_server, share_gpus, with_sampling
from tests.support.released_configs import write_shape

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

GPUS_PER_NODE = 8
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

CONTEXT_GAIN = 0.1
"""Share of the GPU-hours that context parallelism has to save: its attention runs sequence by
sequence, which the estimate takes to be as fast as flash attention over the whole stream."""

SERVER_GAIN = 0.05
"""Share that larger servers have to save: the estimate leaves out that their GPUs wait for each
other in every layer of every token."""

_GIB = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A file under ``configs/recipes``."""

    name: str
    """Of the file."""

    release: str
    """Key of ``RELEASED``: the model's shape."""

    rollout_nodes: int
    """``--rollout-nodes`` of the launch command in the file; 0 starts the servers on the trainer's
    own node."""

    neighbours: tuple[str, ...]
    """Layouts that were not chosen, in the words of ``change``."""


RECIPES = (
    Recipe(
        name="qwen3_4b",
        release="Qwen3-4B-Instruct-2507",
        rollout_nodes=0,
        neighbours=(
            "awake f50",
            "full awake f45",
            "server1 f55",
            "server4 f50",
            "none",
            "full",
            "tp2 dp4 full f50",
            "tp8 none f55",
            "tp2 cp4 selective f50",
            "cp8 full f50",
            "nodes1 server1 f80",
            "nodes1 server4 f80",
        ),
    ),
    Recipe(
        name="llama3_1_8b",
        release="Llama-3.1-8B",
        rollout_nodes=0,
        neighbours=(
            "awake f45",
            "tp8 full awake f35",
            "server2 f45",
            "server8 f45",
            "selective",
            "tp4 dp2 selective f40",
            "tp4 dp2 none f40",
            "tp2 dp4 full f35",
            "tp4 cp2 selective f40",
            "nodes1 server4 f80",
            "nodes1 server4 f80 tp4 dp2 selective",
        ),
    ),
    Recipe(
        name="qwen3_32b",
        release="Qwen3-32B",
        rollout_nodes=2,
        neighbours=(
            "nodes0 tp8 pp2 full server8 f25",
            "nodes0 tp8 pp4 selective server8 f45",
            "nodes1",
            "nodes4",
            "server2",
            "server8",
            "tp4 pp4 full",
            "tp8 pp2 full",
            "tp8 pp2 selective",
            "tp4 pp4 selective",
            "tp2 pp4 cp2 full",
            "nodes4 tp2 pp8 dp2 full",
            "nodes4 tp8 pp2 dp2 selective",
            "nodes2 tp8 pp4 selective",
            "nodes4 tp8 cp4 none",
        ),
    ),
    Recipe(
        name="llama3_3_70b",
        release="Llama-3.3-70B-Instruct",
        rollout_nodes=3,
        neighbours=(
            "nodes0 tp4 pp8 full server8 f25",
            "nodes0 tp8 pp8 full server8 f40",
            "nodes2",
            "nodes4",
            "server4",
            "tp8 pp4 full",
            "tp8 pp4 selective",
            "tp4 pp4 cp2 full",
            "nodes6 tp4 pp8 dp2 full",
            "nodes6 tp8 pp4 dp2 full",
            "nodes6 tp4 pp4 dp4 full",
            "nodes4 tp4 pp8 dp2 full",
        ),
    ),
)

ELSEWHERE = (
    ("qwen3_4b", "A100", ""),
    ("qwen3_4b", "H200", "f65"),
    ("llama3_1_8b", "A100", ""),
    ("llama3_1_8b", "H200", "f60"),
    ("qwen3_32b", "A100", ""),
    ("qwen3_32b", "H200", ""),
    ("qwen3_32b", "H200", "nodes0 tp8 full server8 f20"),
    ("llama3_3_70b", "A100", ""),
    ("llama3_3_70b", "H200", ""),
)
"""Recipe, other GPU, and the change that it allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a recipe, or a layout beside it, is predicted to need."""

    config: RunConfig
    """Its settings."""

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
        gpus = (self.trainer_nodes + self.rollout_nodes) * GPUS_PER_NODE
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


def recipe_file(recipe: Recipe) -> Path:
    """Return the recipe's file."""
    return ROOT / "configs" / "recipes" / f"{recipe.name}.toml"


def load_recipe(recipe: Recipe) -> RunConfig:
    """Return the recipe as it is."""
    return load_config(RunConfig, recipe_file(recipe), [])


@cache
def predict(recipe: Recipe, neighbour: str = "", gpu: str = "H100") -> Prediction:
    """Return the prediction of a recipe, or of a layout beside it, on a GPU of ``MEMORY_GIB``.

    Raises:
        ConfigError: if training would refuse it.
    """
    config, rollout_nodes = changed(load_recipe(recipe), recipe.rollout_nodes, neighbour)
    with tempfile.TemporaryDirectory() as folder:
        path = write_shape(recipe.release, Path(folder))
        model = config.model.model_copy(update={"path": path})
        shape = read_shape(config.model_copy(update={"model": model}))
    check_layout(config, shape)
    work = step_work(config, MEAN_TOKENS)
    machine = with_sampling(config, shape, work, _machine(config, rollout_nodes, gpu))
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


def _machine(config: RunConfig, rollout_nodes: int, gpu: str) -> Machine:
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


def changed(config: RunConfig, rollout_nodes: int, change: str) -> tuple[RunConfig, int]:
    """Return a config and its rollout nodes with a change.

    Args:
        config: the recipe.
        rollout_nodes: of the recipe.
        change: words; sizes that are not 1 (``tp2 cp4``, in place of the whole layout), the
            recomputation, ``nodesN`` rollout nodes (0: servers on the trainer's first node, which
            sleep during the update), ``awake`` where they do not sleep, ``serverN`` GPUs of a
            server, ``fN`` its ``memory_fraction`` in percent.
    """
    names = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "dp": "data"}
    sizes: dict[str, Any] = {}
    policy: dict[str, Any] = {}
    sglang: dict[str, Any] = {}
    rollout: dict[str, Any] = {}
    for word in change.split():
        if word[:2] in names:
            sizes[f"{names[word[:2]]}_parallel_size"] = int(word[2:])
        elif word.startswith("nodes"):
            rollout_nodes = int(word.removeprefix("nodes"))
            rollout["colocated"] = rollout_nodes == 0
        elif word == "awake":
            rollout["colocated"] = False
        elif word.startswith("server"):
            sglang["tensor_parallel_size"] = int(word.removeprefix("server"))
        elif word in ("none", "selective", "full"):
            policy["recompute"] = word
        else:
            sglang["memory_fraction"] = int(word.removeprefix("f")) / 100
    if sizes:
        sizes["sequence_parallel"] = "tensor_model_parallel_size" in sizes
        policy["parallel"] = ParallelConfig(**sizes)
    size = sglang.get("tensor_parallel_size", config.rollout.sglang.tensor_parallel_size)
    sglang["num_servers"] = 1 if rollout_nodes else GPUS_PER_NODE // size
    rollout["sglang"] = config.rollout.sglang.model_copy(update=sglang)
    update = {
        "policy": config.policy.model_copy(update=policy),
        "rollout": config.rollout.model_copy(update=rollout),
    }
    return config.model_copy(update=update), rollout_nodes


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
    if excess > 0:
        found.append(f"{excess:+.1%} GPU-hours")
    elif other.config.policy.parallel.context_parallel_size > 1 and -excess < CONTEXT_GAIN:
        found.append(f"context parallelism for {excess:+.1%}")
    elif other.server_gpus > chosen.server_gpus and -excess < SERVER_GAIN:
        found.append(f"larger servers for {excess:+.1%}")
    elif other.num_longest < 0.9 * chosen.num_longest:
        found.append(f"room for {other.num_longest} instead of {chosen.num_longest} sequences")
    return found


def tables() -> str:
    """Return all three tables."""
    return "\n".join([*_chosen(), "", *_neighbours(), "", *_elsewhere()])


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
