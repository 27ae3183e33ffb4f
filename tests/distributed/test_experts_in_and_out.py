"""Weights and checkpoints of a mixture of experts, in layouts that spread the experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.offline import convert_to_hf
from prefixrl_mcore.checkpoint.run_checkpoints import resolve_checkpoint
from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.checkpoint.torch_dist import TorchDistReader
from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.records import UpdateResult
from tests.support.layouts import batch_for, parallel_config
from tests.support.policies import build_policy, max_difference, weights_of
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_families, write_model_folder

LAYOUTS = {
    "one": parallel_config(),
    "etp2-tp2-sp": parallel_config(etp=2, tp=2, sp=True),
    "etp2-dp2": parallel_config(etp=2, dp=2),
    "ep2-etp2-dp4": parallel_config(ep=2, etp=2, dp=4),
    "ep2-etp2-tp2-sp-pp2-dp2": parallel_config(ep=2, etp=2, tp=2, sp=True, pp=2, dp=2),
    "tp2-sp": parallel_config(tp=2, sp=True),
    "ep2-dp2": parallel_config(ep=2, dp=2),
    "ep2-tp2-sp": parallel_config(ep=2, tp=2, sp=True),
    "ep2-cp2": parallel_config(ep=2, cp=2),
    "ep2-dp4": parallel_config(ep=2, dp=4),
    "ep4-dp4": parallel_config(ep=4, dp=4),
    "ep4-tp2-sp-dp2": parallel_config(ep=4, tp=2, sp=True, dp=2),
    "ep2-dp2-pp2-vpp2": parallel_config(ep=2, dp=2, pp=2, vpp=2),
}
"""Layouts between which checkpoints move; with ``grouped`` in front, of grouped experts."""

RESHARD_TOLERANCE = 2e-6
"""Of float32 weights after one more update of 1e-3: other layouts sum in other orders."""

VOCAB_SIZE = 33

NUM_UPDATES = 2
"""Before a checkpoint: Adam's correction for its first steps shows a wrong count."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(build_tiny_families()["qwen3-moe"], tmp_path_factory.mktemp("model"))


def settings_of(name: str) -> dict[str, Any]:
    """Return layout and experts of a name like ``grouped ep2-dp2``."""
    *experts, layout = name.split()
    return {"parallel": LAYOUTS[layout], "experts": experts[0] if experts else "sequential"}


def num_ranks(name: str) -> int:
    return settings_of(name)["parallel"].world_size


def export(rank: int, source: Path, name: str) -> dict[str, Tensor]:
    return weights_of(build_policy(source, **settings_of(name)))


@pytest.mark.parametrize(
    "name",
    [
        "ep2-dp2",
        "grouped etp2-tp2-sp",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("ep2-tp2-sp", "ep4-dp4", "ep2-dp2-pp2-vpp2", "etp2-dp2", "grouped ep4-dp4"),
                *("ep2-etp2-dp4", "grouped ep2-etp2-tp2-sp-pp2-dp2"),
            )
        ),
    ],
)
def test_experts_go_in_and_out_bit_for_bit_on_every_rank(source: Path, name: str) -> None:
    truth = load_file(source / "model.safetensors")
    exported = run_on_ranks(export, source, name, world_size=num_ranks(name))
    assert len(exported) == num_ranks(name)
    for weights in exported:
        assert max_difference(weights, truth) == 0.0


def build(source: Path, name: str, is_sharded: bool, dtype: str) -> MegatronPolicy:
    optimizer = OptimizerConfig(lr=1e-3, use_distributed_optimizer=is_sharded)
    return build_policy(source, optimizer=optimizer, dtype=dtype, **settings_of(name))


def save_and_go_on(
    rank: int, source: Path, name: str, is_sharded: bool, dtype: str, folder: Path
) -> tuple[dict[str, Tensor], UpdateResult, dict[str, Tensor]]:
    policy = build(source, name, is_sharded, dtype)
    for _ in range(NUM_UPDATES):
        policy.update(batch_for(LAYOUTS[name.split()[-1]]))
    save_checkpoint(folder / "run", NUM_UPDATES, policy, {})
    saved = weights_of(policy)
    return saved, policy.update(batch_for(LAYOUTS[name.split()[-1]])), weights_of(policy)


def load_and_go_on(
    rank: int, source: Path, name: str, is_sharded: bool, dtype: str, folder: Path
) -> tuple[UpdateResult, dict[str, Tensor]]:
    policy = build(source, name, is_sharded, dtype)
    load_checkpoint(folder / "run", policy)
    save_checkpoint(folder / "again", NUM_UPDATES, policy, {})
    return policy.update(batch_for(LAYOUTS[name.split()[-1]])), weights_of(policy)


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "sharded optimizer"])
def test_spread_experts_are_saved_resumed_and_converted(
    source: Path, tmp_path: Path, is_sharded: bool
) -> None:
    settings = (source, "ep2-dp2", is_sharded, "float32", tmp_path)
    unbroken = run_on_ranks(save_and_go_on, *settings, world_size=2)
    resumed = run_on_ranks(load_and_go_on, *settings, world_size=2)
    for (saved, expected, after), (result, weights) in zip(unbroken, resumed, strict=True):
        assert result == expected
        assert max_difference(weights, after) == 0.0
        assert max_difference(after, saved) > 1e-4
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert max_difference(converted, unbroken[0][0]) == 0.0


def assert_equal_tensors(folder: Path, other: Path) -> None:
    """Fail unless two checkpoints hold the same tensors, optimizer state included, bit for bit."""
    ours, theirs = (TorchDistReader(resolve_checkpoint(f) / "megatron") for f in (folder, other))
    assert ours.shapes.keys() == theirs.shapes.keys()
    moments = [name for name in ours.shapes if ".exp_avg_sq." in name and "experts" in name]
    assert len(moments) == 2
    for name in ours.shapes:
        mine, their = ours.read(name), theirs.read(name)
        if "word_embeddings" in name or "output_layer" in name:  # padded for each layout
            mine, their = mine[:VOCAB_SIZE], their[:VOCAB_SIZE]
        assert torch.equal(mine, their), name
    assert all(ours.read(name).abs().max() > 0.0 for name in moments)


@pytest.mark.parametrize(
    ("before", "after", "is_sharded", "dtype"),
    [
        pytest.param("ep2-dp2", "one", False, "float32", id="ep2 to one"),
        pytest.param("grouped ep2-dp2", "one", True, "float32", id="grouped ep2 to one, sharded"),
        *(
            pytest.param(
                before,
                after,
                is_sharded,
                dtype,
                marks=pytest.mark.slow,
                id=f"{before} to {after}{', sharded' if is_sharded else ''}, {dtype}",
            )
            for before, after, is_sharded, dtype in (
                ("one", "ep2-dp2", False, "float32"),
                ("one", "ep2-tp2-sp", True, "float32"),
                ("one", "ep2-dp2", False, "bfloat16"),
                ("ep2-dp2", "one", True, "bfloat16"),
                ("ep2-dp2", "ep4-dp4", False, "float32"),
                ("ep2-dp2", "ep4-tp2-sp-dp2", True, "float32"),
                ("ep4-dp4", "tp2-sp", True, "float32"),
                ("tp2-sp", "ep2-cp2", False, "float32"),
                ("ep2-dp2-pp2-vpp2", "ep2-dp4", True, "float32"),
                ("ep2-dp2", "grouped etp2-tp2-sp", False, "float32"),
                ("grouped ep2-etp2-dp4", "ep2-dp2", True, "float32"),
                ("grouped ep2-dp2", "ep2-etp2-dp4", False, "bfloat16"),
            )
        ),
    ],
)
def test_optimizer_state_moves_between_expert_sizes(
    source: Path, tmp_path: Path, before: str, after: str, is_sharded: bool, dtype: str
) -> None:
    settings = (is_sharded, dtype, tmp_path)
    unbroken = run_on_ranks(save_and_go_on, source, before, *settings, world_size=num_ranks(before))
    resumed = run_on_ranks(load_and_go_on, source, after, *settings, world_size=num_ranks(after))
    assert_equal_tensors(tmp_path / "run", tmp_path / "again")
    saved, expected, weights_then = unbroken[0]
    if dtype == "bfloat16":
        return  # another layout rounds elsewhere; the state moved bit for bit
    for result, weights_now in resumed:
        assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
        assert max_difference(weights_now, weights_then) < RESHARD_TOLERANCE
    assert max_difference(weights_then, saved) > 1e-4
