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

    neighbours: tuple[str, ...]
    """Layouts that were not chosen, in the words of ``change``."""


RECIPES = (
    Recipe(
        name="qwen3_4b",
        release="Qwen3-4B-Instruct-2507",
        neighbours=(
            "server1 f55",
            "server4 f50",
            "server8 f50",
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
        neighbours=(
            "server4",
            "full",
            "tp4 pp8 full f40",
            "tp4 pp8 selective f40",
            "tp2 pp16 full f40",
            "tp4 pp4 dp2 full f40",
            "tp2 pp8 dp2 full f35",
            "tp8 pp2 dp2 selective f35",
            "tp8 pp2 cp2 selective f40",
            "tp2 pp8 cp2 full f35",
            "tp8 pp2 full f25",
            "tp8 pp4 dp2 selective f50",
            "tp8 pp2 dp4 selective f45",
            "tp4 pp4 cp2 dp2 selective f45",
            "nodes2 server4 f80",
            "nodes1 server4 f80 tp2 pp8 full",
            "nodes2 server4 f80 tp2 pp8 full",
            "nodes4 server4 f80 tp2 pp8 full",
            "nodes4 server4 f80 tp8 cp4 none",
        ),
    ),
    Recipe(
        name="llama3_3_70b",
        release="Llama-3.3-70B-Instruct",
        neighbours=(
            "server4",
            "selective",
            "tp4 pp16 full f40",
            "tp4 pp8 dp2 full f35",
            "tp8 pp4 dp2 full f35",
            "tp8 pp4 dp2 selective f35",
            "tp8 pp4 cp2 selective f35",
            "tp8 pp5 full f30",
            "tp4 pp8 full f25",
            "tp4 pp20 full f43",
            "tp8 pp8 dp2 full f50",
            "tp4 pp8 dp4 full f45",
            "tp4 pp16 cp2 selective f45",
            "tp8 pp4 cp4 none f47",
            "nodes4 f80",
            "nodes3 f80 tp4 pp8 full",
            "nodes4 f80 tp4 pp8 full",
            "nodes6 f80 tp4 pp8 dp2 full",
            "nodes6 f80 tp4 pp4 dp4 full",
        ),
    ),
)

ELSEWHERE = (
    ("qwen3_4b", "A100", ""),
    ("qwen3_4b", "H200", "f65"),
    ("llama3_1_8b", "A100", ""),
    ("llama3_1_8b", "H200", "f60"),
    ("qwen3_32b", "A100", ""),
    ("qwen3_32b", "H200", "f60"),
    ("qwen3_32b", "H200", "tp2 pp8 full f45"),
    ("qwen3_32b", "H200", "tp8 full f20"),
    ("llama3_3_70b", "A100", ""),
    ("llama3_3_70b", "H200", "f60"),
    ("llama3_3_70b", "H200", "tp8 pp4 selective f45"),
)
"""Recipe, other GPU, and the change that it allows."""


def recipe_file(recipe: Recipe) -> Path:
    """Return the recipe's file."""
    return ROOT / "configs" / "recipes" / f"{recipe.name}.toml"


def load_recipe(recipe: Recipe) -> RunConfig:
    """Return the recipe as it is."""
    return load_config(RunConfig, recipe_file(recipe), [])


def changed(config: RunConfig, change: str) -> tuple[RunConfig, int]:
    """Return a config with a change, and its rollout nodes.

    Args:
        config: the recipe, whose servers are on the trainer's nodes.
        change: words; sizes that are not 1 (``tp2 cp4``, in place of the whole layout), the
            recomputation, ``nodesN`` rollout nodes, ``serverN`` GPUs of a server, ``fN`` its
            ``memory_fraction`` in percent.
    """
    names = {"tp": "tensor_model", "pp": "pipeline_model", "cp": "context", "dp": "data"}
    sizes: dict[str, Any] = {}
    policy: dict[str, Any] = {}
    sglang: dict[str, Any] = {}
    rollout: dict[str, Any] = {}
    rollout_nodes = 0
    for word in change.split():
        if word[:2] in names:
            sizes[f"{names[word[:2]]}_parallel_size"] = int(word[2:])
        elif word.startswith("nodes"):
            rollout_nodes = int(word.removeprefix("nodes"))
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
    num_ranks = policy.get("parallel", config.policy.parallel).world_size
    is_one_node = not rollout_nodes and num_ranks <= GPUS_PER_NODE
    sglang["num_servers"] = GPUS_PER_NODE // size if is_one_node else 1  # else the job fills nodes
    rollout["sglang"] = config.rollout.sglang.model_copy(update=sglang)
    update = {
        "policy": config.policy.model_copy(update=policy),
        "rollout": config.rollout.model_copy(update=rollout),
    }
    return config.model_copy(update=update), rollout_nodes
