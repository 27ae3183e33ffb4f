"""The gap between engine and policy, where the engine's logprobs are wrong by a known amount."""

import dataclasses
import math
from pathlib import Path

import pytest

from prefixrl_mcore.config.policy import LossConfig, ParallelConfig
from prefixrl_mcore.loss.gap_histogram import RELATIVE_ERROR
from prefixrl_mcore.policy import topology
from prefixrl_mcore.records import TrainingSequence
from tests.support.layouts import LOGPROB_TOLERANCE, batch_for
from tests.support.policies import build_policy, make_batch, make_sequences
from tests.support.ranks import run_on_ranks
from tests.support.tiny_models import write_tiny_qwen3

BAD_ROW = 3.0
OTHER_ROWS = 0.25


def _poisoned(folder: Path) -> list[TrainingSequence]:
    """Return sequences whose rollout logprobs are wrong: one row by 3 nats, the rest by 1/4."""
    sequences = make_sequences()
    batch = make_batch(sequences)
    by_sequence: dict[int, list[float]] = {}
    policy = build_policy(folder)
    for stream, (logprobs_R, _) in zip(batch.streams, policy.row_statistics(batch), strict=True):
        for index, logprob in zip(stream.sequence_index_R.tolist(), logprobs_R, strict=True):
            by_sequence.setdefault(index, []).append(float(logprob) + OTHER_ROWS)
    by_sequence[0][0] += BAD_ROW - OTHER_ROWS
    names = batch.sequence_ids
    logprobs = {names[index]: tuple(values) for index, values in by_sequence.items()}
    return [dataclasses.replace(s, rollout_logprobs=logprobs[s.sequence_id]) for s in sequences]


def _metrics(
    _rank: int, folder: Path, parallel: ParallelConfig, sequences: list[TrainingSequence]
) -> dict[str, float]:
    policy = build_policy(folder, parallel=parallel, loss=LossConfig(importance="truncated"))
    return dict(policy.update(batch_for(parallel, sequences)).metrics)


def _assert_gaps(metrics: dict[str, float], num_rows: int) -> None:
    def mean(bad: float, other: float) -> float:
        return (bad + (num_rows - 1) * other) / num_rows

    def near(value: float) -> object:
        return pytest.approx(value, abs=4 * LOGPROB_TOLERANCE)

    assert metrics["loss/logprob_gap_mean_nats"] == near(mean(BAD_ROW, OTHER_ROWS))
    assert metrics["loss/logprob_gap_max_nats"] == near(BAD_ROW)
    assert metrics["loss/k1_nats"] == near(mean(BAD_ROW, OTHER_ROWS))  # the engine's are higher
    k3 = [math.exp(-gap) - 1 + gap for gap in (BAD_ROW, OTHER_ROWS)]
    assert metrics["loss/k3_nats"] == near(mean(*k3))
    share = math.ceil(0.99 * num_rows)
    p99 = BAD_ROW if share == num_rows else OTHER_ROWS
    assert metrics["loss/logprob_gap_p99_nats"] == pytest.approx(p99, rel=RELATIVE_ERROR + 1e-4)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainingSequence]]:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("model"))
    sequences = _poisoned(folder)
    _assert_gaps(_metrics(0, folder, ParallelConfig(), sequences), _num_rows(sequences))
    topology.shut_down()
    return folder, sequences


def _num_rows(sequences: list[TrainingSequence]) -> int:
    return sum(len(sequence.completion_token_ids) for sequence in sequences)


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(
            ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            id="tp2 pp2",
        ),
        pytest.param(ParallelConfig(context_parallel_size=2, data_parallel_size=2), id="cp2 dp2"),
    ],
)
def test_the_gap_is_that_of_all_ranks_rows_each_counted_once(
    poisoned: tuple[Path, list[TrainingSequence]], parallel: ParallelConfig
) -> None:
    folder, sequences = poisoned
    assert _num_rows(sequences) > 100  # so that the bad row is beyond the 99th percentile
    for metrics in run_on_ranks(_metrics, folder, parallel, sequences, world_size=4):
        _assert_gaps(metrics, _num_rows(sequences))
