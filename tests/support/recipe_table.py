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

from prefixrl_mcore.accounting.host_memory import estimate_host
from prefixrl_mcore.accounting.layouts import Plan, make_plan
from prefixrl_mcore.accounting.parameters import model_size
from prefixrl_mcore.accounting.server_memory import ServerMemory, estimate_server
from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.check import check_layout, gpu_flops, read_shape, step_work
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

_GIB = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A file under ``configs/recipes``."""

    name: str
    """Of the file."""

    release: str
    """Key of ``RELEASED``: the model's shape."""

    rollout_nodes: int
    """``--rollout-nodes`` of the launch command in the file."""

    neighbours: tuple[str, ...]
    """Layouts that were not chosen, in the words of ``change``."""


RECIPES = (
    Recipe(
        name="qwen3_4b",
        release="Qwen3-4B-Instruct-2507",
        rollout_nodes=1,
        neighbours=(
            "tp2 cp4 selective",
            "tp4 cp2 none",
            "cp8 none",
            "tp2 cp2 dp2 none",
            "tp4 dp2 none",
            "tp4 dp2 selective",
            "tp2 dp4 full",
            "tp2 cp4 dp2 none",
            "nodes2",
        ),
    ),
    Recipe(
        name="llama3_1_8b",
        release="Llama-3.1-8B",
        rollout_nodes=1,
        neighbours=(
            "tp4 cp2 selective",
            "tp2 cp4 none",
            "tp4 dp2 none",
            "tp4 dp2 selective",
            "tp8 none",
            "tp4 cp2 dp2 none",
            "nodes2",
        ),
    ),
    Recipe(
        name="qwen3_32b",
        release="Qwen3-32B",
        rollout_nodes=4,
        neighbours=(
            "tp4 pp4 cp2 none",
            "tp4 pp4 cp2 full",
            "tp4 pp4 dp2 selective",
            "tp8 cp4 none",
            "tp8 cp2 dp2 selective",
            "tp8 pp2 dp2 selective",
            "tp2 pp8 cp2 full",
            "tp4 dp8 full",
            "tp4 pp4 full",
            "nodes2",
            "nodes6",
            "server2",
        ),
    ),
    Recipe(
        name="llama3_3_70b",
        release="Llama-3.3-70B-Instruct",
        rollout_nodes=6,
        neighbours=(
            "tp8 pp4 cp2 none",
            "tp8 pp4 cp2 full",
            "tp8 pp4 dp2 selective",
            "tp4 pp4 cp4 selective",
            "tp4 pp8 cp2 full",
            "tp8 pp2 cp4 selective",
            "tp8 dp8 full",
            "tp8 pp4 full",
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
    def gpu_gib(self) -> float:
        """The trainer's peak."""
        return self.plan.peak_bytes / _GIB

    @property
    def trainer_nodes(self) -> int:
        """Nodes with trainer ranks."""
        return self.config.policy.parallel.world_size // GPUS_PER_NODE

    @property
    def num_servers(self) -> int:
        """SGLang servers on the rollout nodes."""
        size = self.config.rollout.sglang.tensor_parallel_size
        return self.rollout_nodes * GPUS_PER_NODE // size

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
            f"{self.config.rollout.sglang.tensor_parallel_size} GPU | {self.num_longest} | "
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
    assumptions = Assumptions(
        peak_flops=gpu_flops(config, "H100"), rollout_gpus=rollout_nodes * GPUS_PER_NODE
    )
    host = estimate_host(shape, config.policy, has_reference=False)
    return Prediction(
        config=config,
        shape=shape,
        rollout_nodes=rollout_nodes,
        plan=make_plan(
            shape,
            config.policy,
            step_work(config, MEAN_TOKENS),
            assumptions,
            logits_dtype=config.model.logits_dtype,
        ),
        server=estimate_server(shape, config.rollout.sglang, gpu_memory_bytes=80 * _GIB),
        host_gib=host.total * GPUS_PER_NODE / _GIB,
    )


def changed(config: RunConfig, rollout_nodes: int, change: str) -> tuple[RunConfig, int]:
    """Return a config and its rollout nodes with a change.

    Args:
        config: the recipe.
        rollout_nodes: of the recipe.
        change: sizes that are not 1 and the recomputation (``tp2 cp4 none``), ``nodesN`` for other
            rollout nodes, ``serverN`` for servers of another size, or nothing.
    """
    if change.startswith("nodes"):
        return config, int(change.removeprefix("nodes"))
    if change.startswith("server"):
        size = int(change.removeprefix("server"))
        sglang = config.rollout.sglang.model_copy(update={"tensor_parallel_size": size})
        rollout = config.rollout.model_copy(update={"sglang": sglang})
        return config.model_copy(update={"rollout": rollout}), rollout_nodes
    if not change:
        return config, rollout_nodes
    names = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "dp": "data"}
    *words, recompute = change.split()
    sizes: dict[str, Any] = {f"{names[word[:2]]}_parallel_size": int(word[2:]) for word in words}
    sizes["sequence_parallel"] = "tensor_model_parallel_size" in sizes
    update = {"parallel": ParallelConfig(**sizes), "recompute": recompute}
    policy = config.policy.model_copy(update=update)
    return config.model_copy(update={"policy": policy}), rollout_nodes


def objections(other: Prediction, chosen: Prediction) -> list[str]:
    """Return what speaks against a layout, in comparison with the one that was chosen."""
    found: list[str] = []
    if other.gpu_gib > USABLE_GIB:
        found.append("does not fit")
    elif other.gpu_gib > MARGIN_GIB:
        found.append("fits without margin")
    if other.host_gib > HOST_GIB:
        found.append(f"above {HOST_GIB:.0f} GiB of host")
    if other.num_longest < 0.9 * chosen.num_longest and other.rollout_nodes == chosen.rollout_nodes:
        found.append("room for fewer sequences")
    if other.gpu_hours > chosen.gpu_hours:
        found.append(f"{other.gpu_hours / chosen.gpu_hours - 1:+.1%} GPU-hours")
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
