"""``python -m tests.support.recipe_table``: the tables of ``docs/recipes.md``.

Predictions of ``prefixrl check`` for the recipes under ``configs/recipes`` and for the layouts
beside them that were not chosen; why not is worked out from the figures. With ``--write FILE`` the
text between the file's marks is replaced.
"""

import argparse
import json
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
from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.check import (
    check_layout,
    gpu_flops,
    predict_server,
    read_shape,
    step_work,
    with_sampling,
)
from prefixrl_mcore.launch.machine import Machine
from prefixrl_mcore.launch.plan_report import layout_name
from tests.support.released_configs import RELEASED

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

GPUS_PER_NODE = 8
MEAN_TOKENS = 10_000
"""``--mean-tokens``: between what the paper's FLOPs give for Llama (6,500) and Qwen (13,400)."""

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
            "server1 f65",
            "server4 f65",
            "tp4 dp2 selective f40",
            "tp4 dp2 none f20",
            "tp2 dp4 full f60",
            "tp8 selective f55",
            "tp2 cp4 selective f45",
            "cp8 full f55",
            "nodes1 server1 f85 tp4 dp2 selective",
            "nodes1 server1 f85 tp2 cp4 none",
        ),
    ),
    Recipe(
        name="llama3_1_8b",
        release="Llama-3.1-8B",
        rollout_nodes=0,
        neighbours=(
            "server2 f50",
            "server8 f50",
            "tp4 dp2 selective f25",
            "tp2 dp4 full f30",
            "tp8 selective f45",
            "tp8 full f55",
            "tp4 cp2 selective f45",
            "nodes1 server2 f85 tp4 dp2 selective",
            "nodes1 server2 f85 tp4 cp2 none",
        ),
    ),
    Recipe(
        name="qwen3_32b",
        release="Qwen3-32B",
        rollout_nodes=4,
        neighbours=(
            "tp8 pp2 dp2 none",
            "tp8 pp2 dp2 selective",
            "tp8 pp2 dp2 full",
            "tp4 pp4 dp2 selective",
            "tp4 pp4 dp2 full",
            "tp4 dp8 full",
            "tp8 dp4 full",
            "tp4 pp4 cp2 selective",
            "tp8 cp4 none",
            "tp4 pp4 full",
            "nodes2",
            "nodes6",
            "server2",
            "server8",
        ),
    ),
    Recipe(
        name="llama3_3_70b",
        release="Llama-3.3-70B-Instruct",
        rollout_nodes=6,
        neighbours=(
            "tp8 pp4 dp2 selective",
            "tp8 pp4 dp2 full",
            "tp4 pp8 dp2 selective",
            "tp8 dp8 full",
            "tp4 pp4 dp4 full",
            "tp8 pp4 cp2 selective",
            "tp4 pp4 cp4 selective",
            "tp4 pp8 full",
            "nodes4",
            "nodes8",
            "server4",
        ),
    ),
)


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

    host_gib: float
    """Of one trainer node, in a save."""

    @property
    def is_colocated(self) -> bool:
        """Servers stand on the trainer's GPUs."""
        return self.rollout_nodes == 0

    @property
    def gpu_gib(self) -> float:
        """The trainer's peak, with a server's share of the GPU beside it."""
        server = self.server.static if self.is_colocated else 0.0
        return (self.plan.peak_bytes + server) / _GIB

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
    def row(self) -> str:
        """Cells that both tables have."""
        time = self.plan.time
        return (
            f"{self.trainer_nodes} + {self.rollout_nodes} | "
            f"{layout_name(self.config.policy.parallel)} | {self.config.policy.recompute} | "
            f"{self.gpu_gib:.1f} | {self.host_gib:.0f} | {self.num_servers} x "
            f"{self.server_gpus} GPU | {self.num_longest} | "
            f"{time.rollout:.0f} + {time.update:.0f} | {self.gpu_hours:.0f}"
        )


def recipe_file(recipe: Recipe) -> Path:
    """Return the recipe's file."""
    return ROOT / "configs" / "recipes" / f"{recipe.name}.toml"


def load_recipe(recipe: Recipe) -> RunConfig:
    """Return the recipe as it is."""
    return load_config(RunConfig, recipe_file(recipe), [])


@cache
def predict(recipe: Recipe, neighbour: str = "") -> Prediction:
    """Return the prediction of a recipe, or of a layout beside it.

    Raises:
        ConfigError: if training would refuse it.
    """
    config, rollout_nodes = changed(load_recipe(recipe), recipe.rollout_nodes, neighbour)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(RELEASED[recipe.release]))
        model = config.model.model_copy(update={"path": Path(folder)})
        shape = read_shape(config.model_copy(update={"model": model}))
    check_layout(config, shape)
    work = step_work(config, MEAN_TOKENS)
    machine = with_sampling(config, shape, work, _machine(config, rollout_nodes))
    host = estimate_host(shape, config.policy, has_reference=False)
    return Prediction(
        config=config,
        shape=shape,
        rollout_nodes=rollout_nodes,
        plan=make_plan(
            shape,
            config.policy,
            work,
            machine.assumptions,
            logits_dtype=config.model.logits_dtype,
        ),
        server=predict_server(config, shape, machine),
        host_gib=host.total * GPUS_PER_NODE / _GIB,
    )


def _machine(config: RunConfig, rollout_nodes: int) -> Machine:
    """Return what ``prefixrl check`` assumes with the options in the recipe's file."""
    return Machine(
        num_gpus=None,
        memory_gib=80.0,
        reserved_fraction=0.1,
        assumptions=Assumptions(peak_flops=gpu_flops(config, "H100")),
        mean_tokens=MEAN_TOKENS,
        rollout_gpus=rollout_nodes * GPUS_PER_NODE or None,
        memory_bytes_per_second=memory_bandwidth("H100"),
    )


def changed(config: RunConfig, rollout_nodes: int, change: str) -> tuple[RunConfig, int]:
    """Return a config and its rollout nodes with a change.

    Args:
        config: the recipe.
        rollout_nodes: of the recipe.
        change: words; sizes that are not 1 (``tp2 cp4``, in place of the whole layout), the
            recomputation, ``nodesN`` rollout nodes, ``serverN`` GPUs of a server, ``fN`` its
            ``memory_fraction`` in percent.
    """
    names = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "dp": "data"}
    sizes: dict[str, Any] = {}
    policy: dict[str, Any] = {}
    sglang: dict[str, Any] = {}
    for word in change.split():
        if word[:2] in names:
            sizes[f"{names[word[:2]]}_parallel_size"] = int(word[2:])
        elif word.startswith("nodes"):
            rollout_nodes = int(word.removeprefix("nodes"))
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
    servers = config.rollout.sglang.model_copy(update=sglang)
    update = {
        "policy": config.policy.model_copy(update=policy),
        "rollout": config.rollout.model_copy(update={"sglang": servers}),
    }
    return config.model_copy(update=update), rollout_nodes


def objections(other: Prediction, chosen: Prediction) -> list[str]:
    """Return what speaks against a layout, in comparison with the one that was chosen."""
    found: list[str] = []
    if other.gpu_gib > USABLE_GIB:
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
    """Return both tables."""
    return "\n".join([*_chosen(), "", *_neighbours()])


def _chosen() -> Iterator[str]:
    """Yield the table of the recipes."""
    yield (
        "| recipe | parameters | nodes, trainer + rollout | layout | recompute | GPU, GiB | "
        "host, GiB | servers | longest at a time | step, s | GPU-hours |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for recipe in RECIPES:
        found = predict(recipe)
        billions = model_size(found.shape).num_parameters / 1e9
        link = f"[{recipe.name}](../configs/recipes/{recipe.name}.toml)"
        yield f"| {link} | {billions:.1f}e9 | {found.row} |"


def _neighbours() -> Iterator[str]:
    """Yield the table of what was not chosen."""
    yield (
        "| instead of | nodes | layout | recompute | GPU, GiB | host, GiB | servers | "
        "longest at a time | step, s | GPU-hours | why not |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for recipe in RECIPES:
        chosen = predict(recipe)
        for neighbour in recipe.neighbours:
            other = predict(recipe, neighbour)
            yield f"| {recipe.name} | {other.row} | {', '.join(objections(other, chosen))} |"


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
