"""The recipes under ``configs/recipes`` and the layouts beside them, as words and as settings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.policy import ParallelConfig
from prefixrl_mcore.config.run import RunConfig

ROOT = Path(__file__).parents[2]
GPUS_PER_NODE = 8


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


def recipe_file(recipe: Recipe) -> Path:
    """Return the recipe's file."""
    return ROOT / "configs" / "recipes" / f"{recipe.name}.toml"


def load_recipe(recipe: Recipe) -> RunConfig:
    """Return the recipe as it is."""
    return load_config(RunConfig, recipe_file(recipe), [])


def changed(config: RunConfig, rollout_nodes: int, change: str) -> tuple[RunConfig, int]:
    """Return a config and its rollout nodes with a change.

    Args:
        config: the recipe.
        rollout_nodes: of the recipe.
        change: words; sizes that are not 1 (``tp2 cp4``, in place of the whole layout), the
            recomputation, ``nodesN`` rollout nodes (0: servers on the trainer's first node, which
            sleep during the update), ``serverN`` GPUs of a server, ``fN`` its
            ``memory_fraction`` in percent.
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
