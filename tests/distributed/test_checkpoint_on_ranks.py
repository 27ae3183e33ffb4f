"""Weights in and out, saving and loading, on several ranks over gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.save_load import (
    load_checkpoint,
    save_checkpoint,
)
from prefixrl_mcore.checkpoint.saver import CheckpointSaver
from prefixrl_mcore.config.policy import OptimizerConfig, ParallelConfig
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.records import UpdateResult
from tests.support.policies import build_policy, make_batch, max_difference, weights_of
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder

NUM_LAYERS = 4
VOCAB_SIZE = 33
"""Odd, so that two tensor-parallel ranks need a padding row."""

RESHARD_TOLERANCE = 2e-6
"""Of float32 weights after one more update of 1e-3: other layouts sum in other orders."""

Layout = dict[str, int | bool]
Future = tuple[tuple[int, dict[str, Any]], UpdateResult, dict[str, Tensor]]

TP2: Layout = {"tensor_model_parallel_size": 2}
TP2_SP: Layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2: Layout = {"pipeline_model_parallel_size": 2}
PP2_VPP2: Layout = {**PP2, "virtual_pipeline_model_parallel_size": 2}
DP2: Layout = {"data_parallel_size": 2}


def write_source(folder: Path, *, is_tied: bool) -> Path:
    model = build_tiny_qwen3(
        num_layers=NUM_LAYERS, vocab_size=VOCAB_SIZE, tie_word_embeddings=is_tied
    )
    return write_model_folder(model, folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model: the harder case, because two pipeline stages share a weight."""
    return write_source(tmp_path_factory.mktemp("model"), is_tied=True)


def build(folder: Path, layout: Layout, *, is_sharded: bool = False) -> MegatronPolicy:
    optimizer = OptimizerConfig(lr=1e-3, use_distributed_optimizer=is_sharded)
    return build_policy(folder, parallel=ParallelConfig.model_validate(layout), optimizer=optimizer)


def update(policy: MegatronPolicy, layout: Layout) -> UpdateResult:
    num_ranks, stages = layout.get("data_parallel_size", 1), 2 if layout.keys() & PP2.keys() else 1
    return policy.update(make_batch(num_ranks=int(num_ranks), streams_multiple=stages))


def export(rank: int, source: Path, layout: Layout) -> dict[str, Tensor]:
    return weights_of(build(source, layout))


@pytest.mark.parametrize(
    ("layout", "world_size", "is_tied"),
    [
        pytest.param(TP2, 2, True, id="tp2 tied"),
        pytest.param(TP2, 2, False, id="tp2 untied"),
        pytest.param(PP2, 2, False, id="pp2 untied"),
        pytest.param(PP2_VPP2, 2, True, id="pp2 vpp2 tied"),
        pytest.param(PP2_VPP2, 2, False, id="pp2 vpp2 untied", marks=pytest.mark.slow),
        pytest.param({**TP2_SP, **PP2}, 4, True, id="tp2 pp2 sp tied", marks=pytest.mark.slow),
        pytest.param({**TP2_SP, **PP2}, 4, False, id="tp2 pp2 sp untied", marks=pytest.mark.slow),
    ],
)
def test_weights_go_in_and_out_bit_for_bit_on_every_rank(
    tmp_path: Path, layout: Layout, world_size: int, is_tied: bool
) -> None:
    source = write_source(tmp_path / "source", is_tied=is_tied)
    truth = load_file(source / "model.safetensors")
    for weights in run_on_ranks(export, source, layout, world_size=world_size):
        assert list(weights) == list(dict.fromkeys(weights))
        assert max_difference(weights, truth) == 0.0


def save_and_go_on(
    rank: int, source: Path, layout: Layout, is_sharded: bool, folder: Path
) -> tuple[dict[str, Tensor], UpdateResult, dict[str, Tensor]]:
    policy = build(source, layout, is_sharded=is_sharded)
    for _ in range(2):
        update(policy, layout)
    saver = CheckpointSaver(folder, in_background=is_sharded)
    saver.start(2, policy, {"cursor": 5})
    if not is_sharded:
        saver.finish(wait=True)
    saved = weights_of(policy)
    result = update(policy, layout)  # beside the writers of a sharded optimizer
    saver.finish(wait=True)
    return saved, result, weights_of(policy)


def load_and_go_on(
    rank: int, source: Path, layout: Layout, is_sharded: bool, folder: Path
) -> Future:
    policy = build(source, layout, is_sharded=is_sharded)
    state = load_checkpoint(folder, policy)
    result = update(policy, layout)
    return state, result, weights_of(policy)


@pytest.mark.parametrize(
    ("layout", "is_sharded"),
    [
        pytest.param(TP2_SP, False, id="tp2 sp"),
        pytest.param(PP2_VPP2, False, id="pp2 vpp2", marks=pytest.mark.slow),
        pytest.param(PP2, True, id="pp2 sharded optimizer"),
        pytest.param(DP2, True, id="dp2 sharded optimizer"),
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(
    source: Path, tmp_path: Path, layout: Layout, is_sharded: bool
) -> None:
    unbroken = run_on_ranks(save_and_go_on, source, layout, is_sharded, tmp_path, world_size=2)
    resumed = run_on_ranks(load_and_go_on, source, layout, is_sharded, tmp_path, world_size=2)
    for (_, expected, after), (state, result, weights) in zip(unbroken, resumed, strict=True):
        assert state == (2, {"cursor": 5})
        assert result == expected
        assert max_difference(weights, after) == 0.0


@pytest.mark.parametrize(
    ("before", "after", "is_sharded"),
    [
        pytest.param(TP2, PP2, False, id="tp2 to pp2", marks=pytest.mark.slow),
        pytest.param(PP2_VPP2, TP2, True, id="pp2 vpp2 to tp2, sharded optimizer"),
        pytest.param(TP2, DP2, True, id="tp2 to dp2, sharded optimizer", marks=pytest.mark.slow),
    ],
)
def test_another_layout_goes_on_with_the_same_numbers(
    source: Path, tmp_path: Path, before: Layout, after: Layout, is_sharded: bool
) -> None:
    unbroken = run_on_ranks(save_and_go_on, source, before, is_sharded, tmp_path, world_size=2)
    resumed = run_on_ranks(load_and_go_on, source, after, is_sharded, tmp_path, world_size=2)
    saved, expected, weights_then = unbroken[0]
    _, result, weights_now = resumed[0]
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    assert max_difference(weights_now, weights_then) < RESHARD_TOLERANCE
    assert max_difference(weights_then, saved) > 1e-4  # the update did something


@pytest.mark.parametrize(
    ("before", "after", "to_sharded"),
    [
        pytest.param(TP2, DP2, True, id="plain tp2 to distributed dp2"),
        pytest.param(DP2, PP2_VPP2, False, id="distributed dp2 to plain pp2 vpp2"),
    ],
)
def test_another_layout_and_kind_of_optimizer_goes_on_with_the_same_numbers(
    source: Path, tmp_path: Path, before: Layout, after: Layout, to_sharded: bool
) -> None:
    unbroken = run_on_ranks(save_and_go_on, source, before, not to_sharded, tmp_path, world_size=2)
    resumed = run_on_ranks(load_and_go_on, source, after, to_sharded, tmp_path, world_size=2)
    _, expected, weights_then = unbroken[0]
    for _, result, weights_now in resumed:
        assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
        assert max_difference(weights_now, weights_then) < RESHARD_TOLERANCE


TP2_PP2: Layout = {**TP2, **PP2}
TP2_DP2: Layout = {**TP2, **DP2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "num_before", "after", "num_after", "is_sharded"),
    [
        pytest.param(TP2_PP2, 4, {}, 1, False, id="tp2 pp2 to one"),
        pytest.param(TP2_PP2, 4, {}, 1, True, id="tp2 pp2 to one, sharded optimizer"),
        pytest.param({}, 1, TP2_DP2, 4, True, id="one to tp2 dp2, sharded optimizer"),
        pytest.param(TP2_DP2, 4, TP2_PP2, 4, True, id="tp2 dp2 to tp2 pp2, sharded optimizer"),
    ],
)
def test_another_number_of_ranks_goes_on_with_the_same_numbers(
    source: Path,
    tmp_path: Path,
    before: Layout,
    num_before: int,
    after: Layout,
    num_after: int,
    is_sharded: bool,
) -> None:
    unbroken = run_on_ranks(
        save_and_go_on, source, before, is_sharded, tmp_path, world_size=num_before
    )
    resumed = run_on_ranks(
        load_and_go_on, source, after, is_sharded, tmp_path, world_size=num_after
    )
    saved, expected, weights_then = unbroken[0]
    for state, result, weights_now in resumed:
        assert state == (2, {"cursor": 5})
        assert result.learning_rate == expected.learning_rate
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
        assert max_difference(weights_now, weights_then) < RESHARD_TOLERANCE
    assert max_difference(weights_then, saved) > 1e-4  # the update did something


@pytest.mark.slow
def test_offline_conversion_reads_what_several_ranks_wrote(source: Path, tmp_path: Path) -> None:
    layout = {**TP2, **PP2}
    saved, _, _ = run_on_ranks(
        save_and_go_on, source, layout, False, tmp_path / "run", world_size=4
    )[3]
    convert_to_hf(tmp_path / "run", tmp_path / "out")
    assert max_difference(load_file(tmp_path / "out" / "model.safetensors"), saved) == 0.0


def load_and_export(rank: int, source: Path, layout: Layout, folder: Path) -> dict[str, Tensor]:
    policy = build(source, layout)
    for chunk in policy.model_chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, -1.0)
    load_checkpoint(folder, policy)
    return weights_of(policy)


def test_a_converted_folder_loads_into_another_layout_and_vocabulary_padding(
    source: Path, tmp_path: Path
) -> None:
    convert_from_hf(source, tmp_path / "start")
    truth = load_file(source / "model.safetensors")
    results = run_on_ranks(load_and_export, source, TP2, tmp_path / "start", world_size=2)
    assert [max_difference(weights, truth) for weights in results] == [0.0, 0.0]


def load_damaged(rank: int, source: Path, folder: Path) -> str:
    policy = build(source, TP2)
    path = save_checkpoint(folder, 1, policy, {})
    if rank == 0:
        (path / "megatron" / "__1_0.distcp").write_bytes(b"")
    topology.run_on_first(lambda: None)  # nobody reads before the damage is done
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder / path.name, policy)
    return str(error.value)


def test_every_rank_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    source = write_model_folder(build_tiny_qwen3(), tmp_path / "model")
    messages = run_on_ranks(load_damaged, source, tmp_path / "checkpoints", world_size=2)
    assert messages[0] == messages[1]
    assert "__1_0.distcp: got 0 bytes" in messages[0]


def save_and_count_files(rank: int, source: Path, folder: Path) -> int:
    policy = build(source, TP2)
    save_checkpoint(folder, 1, policy, {})
    return len(policy.model_files)


def test_one_rank_keeps_the_models_files_and_saves_them(source: Path, tmp_path: Path) -> None:
    counts = run_on_ranks(save_and_count_files, source, tmp_path / "run", world_size=2)
    saved = sorted((tmp_path / "run" / "step-000001" / "hf").iterdir())
    assert counts == [len(saved), 0]
    assert {"config.json", "tokenizer.json"} <= {path.name for path in saved}
    assert [path.read_bytes() for path in saved] == [
        (source / path.name).read_bytes() for path in saved
    ]
