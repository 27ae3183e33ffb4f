"""Weights and checkpoints of a mixture of experts, in layouts that spread the experts."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from prefixrl_mcore.checkpoint.offline import convert_to_hf
from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.config.policy import OptimizerConfig, ParallelConfig
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.records import UpdateResult
from tests.support.layouts import batch_for, parallel_config
from tests.support.policies import build_policy, max_difference, weights_of
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_families, write_model_folder

EP2 = parallel_config(ep=2, dp=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(build_tiny_families()["qwen3-moe"], tmp_path_factory.mktemp("model"))


def export(rank: int, source: Path, parallel: ParallelConfig) -> dict[str, Tensor]:
    return weights_of(build_policy(source, parallel=parallel))


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(EP2, id="ep2-dp2"),
        *(
            pytest.param(parallel, id=name, marks=pytest.mark.slow)
            for name, parallel in {
                "ep2-tp2-sp": parallel_config(ep=2, tp=2, sp=True),
                "ep4-dp4": parallel_config(ep=4, dp=4),
                "ep2-dp2-pp2-vpp2": parallel_config(ep=2, dp=2, pp=2, vpp=2),
                "ep2-tp2-sp-pp2": parallel_config(ep=2, tp=2, sp=True, pp=2),
            }.items()
        ),
    ],
)
def test_experts_go_in_and_out_bit_for_bit_on_every_rank(
    source: Path, parallel: ParallelConfig
) -> None:
    truth = load_file(source / "model.safetensors")
    exported = run_on_ranks(export, source, parallel, world_size=parallel.world_size)
    assert len(exported) == parallel.world_size
    for weights in exported:
        assert max_difference(weights, truth) == 0.0


def build(source: Path, is_sharded: bool) -> MegatronPolicy:
    optimizer = OptimizerConfig(lr=1e-3, use_distributed_optimizer=is_sharded)
    return build_policy(source, parallel=EP2, optimizer=optimizer)


def save_and_go_on(
    rank: int, source: Path, is_sharded: bool, folder: Path
) -> tuple[dict[str, Tensor], UpdateResult, dict[str, Tensor]]:
    policy = build(source, is_sharded)
    policy.update(batch_for(EP2))
    save_checkpoint(folder, 1, policy, {})
    saved = weights_of(policy)
    return saved, policy.update(batch_for(EP2)), weights_of(policy)


def load_and_go_on(
    rank: int, source: Path, is_sharded: bool, folder: Path
) -> tuple[UpdateResult, dict[str, Tensor]]:
    policy = build(source, is_sharded)
    load_checkpoint(folder, policy)
    return policy.update(batch_for(EP2)), weights_of(policy)


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "sharded optimizer"])
def test_spread_experts_are_saved_resumed_and_converted(
    source: Path, tmp_path: Path, is_sharded: bool
) -> None:
    folder = tmp_path / "run"
    unbroken = run_on_ranks(save_and_go_on, source, is_sharded, folder, world_size=2)
    resumed = run_on_ranks(load_and_go_on, source, is_sharded, folder, world_size=2)
    for (saved, expected, after), (result, weights) in zip(unbroken, resumed, strict=True):
        assert result == expected
        assert max_difference(weights, after) == 0.0
        assert max_difference(after, saved) > 1e-4
    convert_to_hf(folder, tmp_path / "out")
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert max_difference(converted, unbroken[0][0]) == 0.0
