"""What must not matter to the gradient, in every layout: garbage outside completions, packing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from prefixrl_mcore.config.experts import ExpertsConfig
from prefixrl_mcore.config.policy import OptimizerConfig, ParallelConfig
from prefixrl_mcore.policy import topology
from prefixrl_mcore.records import UpdateResult
from tests.support.layouts import GRADIENT_TOLERANCE, parse_layout
from tests.support.masked_rows import with_every_position_a_row
from tests.support.policies import (
    NO_CLIPPING,
    build_policy,
    gradients_of,
    make_batch,
    make_sequences,
    max_difference,
)
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_qwen3, build_tiny_qwen3_moe, write_model_folder

CP2 = parse_layout("cp2")
LAYOUTS = (
    "cp2",
    "tp2 sp",
    "pp2",
    "dp2",
    "cp2 tp2 sp",
    "cp2 pp2",
    "pp2 (1+3)",
    "pp2 vpp2 dp2, distributed optimizer",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(build_tiny_qwen3(num_layers=4), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(build_tiny_qwen3_moe(), tmp_path_factory.mktemp("mixture"))


def _clean_and_dirty(
    rank: int,
    folder: Path,
    parallel: ParallelConfig,
    experts: str | None = None,
    distributed: bool = False,
) -> tuple[float, float]:
    optimizer = OptimizerConfig(clip_grad=NO_CLIPPING, use_distributed_optimizer=distributed)
    batch = make_batch(
        num_ranks=parallel.data_parallel_size,
        streams_multiple=parallel.pipeline_model_parallel_size,
        sequence_multiple=parallel.sequence_multiple,
    )
    outcomes = []
    for garbage, target in ((0.0, 0), (1e6, 17)):
        policy = build_policy(folder, parallel=parallel, experts=experts, optimizer=optimizer)
        masked = with_every_position_a_row(batch, garbage=garbage, garbage_target=target)
        policy.update(masked)
        outcomes.append(gradients_of(policy))
    clean, dirty = outcomes
    return max_difference(clean, dirty), max(float(g.abs().max()) for g in clean.values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("cp2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS if name != "cp2"),
    ],
)
def test_prompt_prefix_and_padding_contribute_exactly_nothing(folder: Path, name: str) -> None:
    layout, _, distributed = name.partition(", ")
    parallel = parse_layout(layout)
    outcomes = run_on_ranks(
        _clean_and_dirty,
        folder,
        parallel,
        None,
        bool(distributed),
        world_size=parallel.world_size,
    )
    for difference, size in outcomes:
        assert difference == 0.0
        assert size > 0.02


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        pytest.param("ep2 dp2", "grouped"),
        pytest.param("ep2 cp2", "sequential", marks=pytest.mark.slow),
        pytest.param("ep2 etp2 tp2 sp pp2 dp2", "grouped", marks=pytest.mark.slow),
    ],
)
def test_prompt_prefix_and_padding_contribute_nothing_through_experts_elsewhere(
    mixture: Path, name: str, experts: str
) -> None:
    parallel = parse_layout(name)
    outcomes = run_on_ranks(
        _clean_and_dirty, mixture, parallel, experts, world_size=parallel.world_size
    )
    for difference, size in outcomes:
        assert difference == 0.0
        assert size > 0.02


def _with_router_losses(
    rank: int, folder: Path, parallel: ParallelConfig, kind: str
) -> tuple[dict[str, Tensor], UpdateResult]:
    settings = {"aux_loss_coefficient": 0.5, "aux_loss_type": kind, "z_loss_coefficient": 0.01}
    policy = build_policy(folder, parallel=parallel, experts=ExpertsConfig.model_validate(settings))
    # The same streams in every layout.
    batch = make_batch(num_ranks=2, streams_multiple=2, sequence_multiple=4)
    batch = dataclasses.replace(batch, num_ranks=parallel.data_parallel_size)
    result = policy.update(batch)
    return gradients_of(policy), result


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("ep2 dp2", "aux_loss"),
        pytest.param("ep2 cp2", "global_aux_loss", marks=pytest.mark.slow),
        pytest.param("ep2 etp2 tp2 sp pp2 dp2", "aux_loss", marks=pytest.mark.slow),
    ],
)
def test_router_losses_have_the_same_gradient_in_every_layout(
    mixture: Path, name: str, kind: str
) -> None:
    expected, one = _with_router_losses(0, mixture, ParallelConfig(), kind)
    topology.shut_down()
    parallel = parse_layout(name)
    for gradients, result in run_on_ranks(
        _with_router_losses, mixture, parallel, kind, world_size=parallel.world_size
    ):
        assert max_difference(gradients, expected) < GRADIENT_TOLERANCE
        assert result.metrics == pytest.approx(one.metrics, abs=1e-4)
    assert one.metrics["experts/balance_loss"] > 1.0


def _shuffled(rank: int, folder: Path, parallel: ParallelConfig) -> list[dict[str, Tensor]]:
    sequences = make_sequences()
    outcomes = []
    for seed, stream_tokens in ((1, 40), (2, 64), (3, 512)):
        order = np.random.default_rng(seed).permutation(len(sequences))
        batch = make_batch(
            [sequences[i] for i in order],
            stream_tokens=stream_tokens,
            sequence_multiple=parallel.sequence_multiple,
        )
        policy = build_policy(folder, parallel=parallel, stream_tokens=stream_tokens)
        policy.update(batch)
        outcomes.append(gradients_of(policy))
    return outcomes


def test_gradient_under_context_parallelism_does_not_depend_on_packing(folder: Path) -> None:
    policy = build_policy(folder)
    policy.update(make_batch())
    expected = gradients_of(policy)
    topology.shut_down()
    for outcomes in run_on_ranks(_shuffled, folder, CP2, world_size=2):
        for gradients in outcomes:
            assert max_difference(gradients, expected) < GRADIENT_TOLERANCE
    assert max(float(g.abs().max()) for g in expected.values()) > 0.05


def _refusal(rank: int, folder: Path) -> str:
    policy = build_policy(folder, parallel=CP2)
    with pytest.raises(ValueError, match="context_parallel_size") as error:
        policy.update(make_batch(sequence_multiple=2))
    return str(error.value)


def test_a_batch_whose_sequences_cannot_be_cut_is_refused(folder: Path) -> None:
    for message in run_on_ranks(_refusal, folder, world_size=2):
        assert "needs a multiple of 4 (2 chunks x 2); pass sequence_multiple=4 to pack()" in message
