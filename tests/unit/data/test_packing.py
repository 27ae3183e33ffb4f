"""Packing against layouts worked out by hand, and properties over random batches."""

import itertools
import random

import numpy as np
import pytest

from prefixrl_mcore.accounting.model_flops import ModelFlops
from prefixrl_mcore.data.assignment import order_for_ranks
from prefixrl_mcore.data.packing import PackedBatch, Stream, pack
from prefixrl_mcore.records import TrainingSequence


def _sequence(
    name: str,
    context: tuple[int, ...],
    completion: tuple[int, ...],
    *,
    group: int = 0,
    advantage: float = 1.0,
    logprobs: tuple[float, ...] = (),
) -> TrainingSequence:
    return TrainingSequence(
        sequence_id=name,
        group_index=group,
        context_token_ids=context,
        completion_token_ids=completion,
        advantage=advantage,
        rollout_logprobs=logprobs,
    )


def _random_sequences(num: int, seed: int, max_length: int = 40) -> list[TrainingSequence]:
    rng = random.Random(seed)
    sequences = []
    for index in range(num):
        context = tuple(rng.randrange(1, 99) for _ in range(rng.randrange(1, max_length // 2)))
        completion = tuple(rng.randrange(1, 99) for _ in range(rng.randrange(1, max_length // 2)))
        sequences.append(
            _sequence(
                f"s{index}",
                context,
                completion,
                group=index // 4,
                advantage=rng.uniform(-1, 1),
                logprobs=tuple(-rng.random() for _ in completion),
            )
        )
    return sequences


def _num_rows(batch: PackedBatch) -> int:
    return sum(stream.num_rows for stream in batch.streams)


def test_two_sequences_in_one_stream_by_hand() -> None:
    a = _sequence("a", (1, 2, 3), (4, 5), advantage=0.5, logprobs=(-0.1, -0.2))
    b = _sequence("b", (6,), (7, 8), advantage=-0.5, logprobs=(-0.3, -0.4))
    batch = pack([a, b], stream_tokens=10, max_completion_tokens=4)
    (stream,) = batch.streams
    assert stream.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]
    assert stream.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]
    assert stream.sequence_starts.tolist() == [0, 5, 8, 10]
    # Row 2 holds the last context token of a and predicts 4; the last token predicts nothing.
    assert stream.rows_R.tolist() == [2, 3, 5, 6]
    assert stream.targets_R.tolist() == [4, 5, 7, 8]
    assert stream.advantages_R.tolist() == [0.5, 0.5, -0.5, -0.5]
    assert stream.weights_R.tolist() == [1.0, 1.0, 1.0, 1.0]
    assert stream.rollout_logprobs_R.tolist() == np.float32([-0.1, -0.2, -0.3, -0.4]).tolist()
    assert stream.sequence_index_R.tolist() == [0, 0, 1, 1]
    assert batch.sequence_ids == ("a", "b")
    assert (batch.num_trained_tokens, batch.num_sequences, batch.num_padding_tokens) == (4, 2, 2)
    assert batch.has_rollout_logprobs
    dtypes = [stream.token_ids_T.dtype, stream.position_ids_T.dtype, stream.sequence_starts.dtype]
    assert dtypes == [np.int64, np.int64, np.int32]
    dtypes = [stream.rows_R.dtype, stream.targets_R.dtype, stream.sequence_index_R.dtype]
    assert dtypes == [np.int64, np.int64, np.int32]
    dtypes = [stream.advantages_R.dtype, stream.weights_R.dtype, stream.rollout_logprobs_R.dtype]
    assert dtypes == [np.float32] * 3


def test_sequences_padded_to_a_multiple_by_hand() -> None:
    a = _sequence("a", (1, 2, 3), (4, 5))
    b = _sequence("b", (6,), (7, 8))
    batch = pack([a, b], stream_tokens=16, sequence_multiple=4, max_completion_tokens=4)
    (stream,) = batch.streams
    assert stream.token_ids_T.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 0, 0, 0, 0, 0]
    assert stream.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3]
    assert stream.sequence_starts.tolist() == [0, 8, 12, 16]
    assert stream.rows_R.tolist() == [2, 3, 8, 9]
    assert stream.targets_R.tolist() == [4, 5, 7, 8]
    assert (batch.num_padding_tokens, batch.sequence_multiple) == (8, 4)


def test_padding_behind_a_sequence_takes_room() -> None:
    sequences = [_sequence(name, (1, 2), (3, 4, 5), group=i) for i, name in enumerate("abc")]
    # 5 tokens each: three fit into 16; padded to 8 only two do.
    sizes = {1: 1, 4: 2}
    for multiple, num_streams in sizes.items():
        batch = pack(
            sequences, stream_tokens=16, sequence_multiple=multiple, max_completion_tokens=4
        )
        assert len(batch.streams) == num_streams
        assert batch.num_padding_tokens == 16 * num_streams - 15


def test_a_stream_that_is_no_multiple_of_the_sequence_multiple_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"stream_tokens = 18 .* sequence_multiple = 4; make it 20"
    ):
        pack(
            [_sequence("a", (1,), (2,))],
            stream_tokens=18,
            sequence_multiple=4,
            max_completion_tokens=4,
        )


def test_a_full_stream_has_no_padding_sequence() -> None:
    batch = pack([_sequence("a", (1, 2), (3, 4))], stream_tokens=4, max_completion_tokens=4)
    assert batch.streams[0].sequence_starts.tolist() == [0, 4]
    assert batch.num_padding_tokens == 0


def test_filler_streams_have_no_rows() -> None:
    batch = pack(
        [_sequence("a", (1,), (2,))], stream_tokens=3, num_ranks=2, max_completion_tokens=4
    )
    assert [stream.num_rows for stream in batch.streams] == [1, 0]
    filler = batch.streams[1]
    assert filler.token_ids_T.tolist() == [0, 0, 0]
    assert filler.position_ids_T.tolist() == [0, 1, 2]
    assert filler.sequence_starts.tolist() == [0, 3]
    assert filler.targets_R.tolist() == []
    assert batch.num_padding_tokens == 4


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        pytest.param("token_mean", [1.0, 1.0, 1.0, 1.0], id="token_mean"),
        # 4 tokens / (2 sequences * 3 tokens) and 4 / (2 * 1).
        pytest.param("sequence_mean", [2 / 3, 2 / 3, 2 / 3, 2.0], id="sequence_mean"),
        # 4 tokens / (2 sequences * 8).
        pytest.param("constant", [0.25, 0.25, 0.25, 0.25], id="constant"),
    ],
)
def test_weights_turn_the_token_mean_into_the_aggregation(
    aggregation: str, weights: list[float]
) -> None:
    sequences = [_sequence("a", (1,), (2, 3, 4)), _sequence("b", (1,), (2,))]
    batch = pack(
        sequences,
        stream_tokens=6,
        aggregation=aggregation,  # type: ignore[arg-type]
        max_completion_tokens=8,
    )
    assert batch.streams[0].weights_R.tolist() == pytest.approx(weights, rel=1e-7)


def test_sequence_mean_is_the_mean_of_the_sequences_token_means() -> None:
    sequences = _random_sequences(13, seed=1)
    batch = pack(sequences, stream_tokens=64, aggregation="sequence_mean", max_completion_tokens=64)
    # The term of a row is its advantage: each sequence's token mean is its advantage.
    total = sum(float((s.weights_R * s.advantages_R).sum()) for s in batch.streams)
    expected = sum(s.advantage for s in sequences) / len(sequences)
    assert total / batch.num_trained_tokens == pytest.approx(expected, rel=1e-5)


def test_a_group_that_fits_stays_in_one_stream() -> None:
    # Placed one by one and by length, the two sequences of 4 tokens would be in two streams.
    a = [_sequence(f"a{i}", (1, 2), (3, 4), group=0) for i in range(2)]
    b = [_sequence(f"b{i}", (1, 2), (3,), group=1) for i in range(2)]
    batch = pack([a[0], b[0], a[1], b[1]], stream_tokens=10, max_completion_tokens=4)
    members = [
        sorted({batch.sequence_ids[i] for i in stream.sequence_index_R}) for stream in batch.streams
    ]
    assert sorted(members) == [["a0", "a1"], ["b0", "b1"]]


def test_a_group_that_does_not_fit_is_split() -> None:
    sequences = [_sequence(f"s{i}", (1, 2, 3), (4, 5), group=7) for i in range(4)]
    batch = pack(sequences, stream_tokens=10, max_completion_tokens=4)
    assert [stream.num_rows for stream in batch.streams] == [4, 4]


def _restored(batch: PackedBatch) -> dict[str, tuple[list[int], list[int], float, list[float]]]:
    """Read every sequence back out of the streams: tokens, targets, advantage, logprobs."""
    found = {}
    for stream in batch.streams:
        starts = stream.sequence_starts.tolist()
        for begin, end in itertools.pairwise(starts):
            inside = (stream.rows_R >= begin) & (stream.rows_R < end)
            if not inside.any():
                continue
            (index,) = set(stream.sequence_index_R[inside].tolist())
            (advantage,) = set(stream.advantages_R[inside].tolist())
            found[batch.sequence_ids[index]] = (
                stream.token_ids_T[begin:end].tolist(),
                stream.targets_R[inside].tolist(),
                advantage,
                stream.rollout_logprobs_R[inside].tolist(),
            )
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("num_ranks", "multiple"), [(1, 1), (2, 1), (4, 3)])
def test_every_sequence_can_be_read_back(seed: int, num_ranks: int, multiple: int) -> None:
    sequences = _random_sequences(37, seed=seed)
    batch = pack(
        sequences,
        stream_tokens=64,
        num_ranks=num_ranks,
        streams_multiple=multiple,
        max_completion_tokens=64,
    )
    assert len(batch.streams) % (num_ranks * multiple) == 0
    found = _restored(batch)
    assert set(found) == {s.sequence_id for s in sequences}
    for s in sequences:
        tokens, targets, advantage, logprobs = found[s.sequence_id]
        assert tokens == list(s.context_token_ids + s.completion_token_ids)
        assert targets == list(s.completion_token_ids)
        assert advantage == np.float32(s.advantage)
        assert logprobs == np.float32(s.rollout_logprobs).tolist()
    assert _num_rows(batch) == batch.num_trained_tokens
    assert batch.num_padding_tokens == 64 * len(batch.streams) - sum(
        len(f[0]) for f in found.values()
    )
    by_rank = [stream for rank in range(num_ranks) for stream in batch.rank_streams(rank)]
    assert len(by_rank) == len(batch.streams)


def test_packing_is_deterministic() -> None:
    def arrays(stream: Stream) -> list[list[int]]:
        return [stream.token_ids_T.tolist(), stream.rows_R.tolist()]

    first, second = (
        pack(_random_sequences(50, seed=3), stream_tokens=64, num_ranks=2, max_completion_tokens=64)
        for _ in range(2)
    )
    assert [arrays(s) for s in first.streams] == [arrays(s) for s in second.streams]


def test_the_order_of_the_sequences_does_not_change_the_streams_contents_in_sum() -> None:
    sequences = _random_sequences(20, seed=4)
    forward = pack(sequences, stream_tokens=64, max_completion_tokens=64)
    backward = pack(sequences[::-1], stream_tokens=64, max_completion_tokens=64)
    assert _restored(forward) == _restored(backward)
    assert forward.num_trained_tokens == backward.num_trained_tokens


def test_ranks_get_streams_of_equal_cost() -> None:
    # Rounds of two: (8, 7), (6, 5), (4, 3), (2, 1); loads 8/7, 13/13, 17/16, 18/18.
    order, balance = order_for_ranks([1, 2, 3, 4, 5, 6, 7, 8], 2)
    loads = [sum((i + 1) for i in order[rank::2]) for rank in range(2)]
    assert loads == [18, 18]
    assert balance == 1.0
    assert sorted(order) == list(range(8))


def test_balance_is_by_flops_and_not_by_tokens() -> None:
    # A token costs 10, a token that another one sees 1. A sequence of 20 tokens has 20 * 21 / 2 =
    # 210 pairs and costs 410; one of 5 tokens has 15 and costs 65, four of them 260. By tokens
    # the four would be as much work as one long one. By FLOPs the long ones fill three streams
    # and the short ones share the fourth.
    long = [_sequence(f"l{i}", (1,) * 10, (2,) * 10, group=i) for i in range(3)]
    short = [_sequence(f"s{i}", (1,), (2,) * 4, group=10 + i) for i in range(4)]
    batch = pack(
        long + short,
        stream_tokens=40,
        num_ranks=4,
        max_completion_tokens=16,
        model_flops=ModelFlops(per_token=10.0, per_row=0.0, per_pair=1.0),
    )
    assert sorted(stream.num_rows for stream in batch.streams) == [10, 10, 10, 16]
    assert batch.cost_balance == pytest.approx(410 / ((3 * 410 + 260) / 4))


def test_two_ranks_share_long_and_short_sequences_by_flops_with_equally_many_streams() -> None:
    # The longest sequence costs 60 + 60 * 61 / 2 = 1890 where a pair costs as much as a token;
    # the 15 of four tokens cost 14 each. By tokens 60 and 60 are even; by FLOPs they are 1890 and
    # 210, and there is no better split, so that the balance tells of it: 1890 / 1050.
    long = [_sequence("long", (1,) * 30, (2,) * 30, group=0)]
    short = [_sequence(f"s{i}", (1, 1), (2, 2), group=1 + i) for i in range(15)]
    shape = {"stream_tokens": 64, "num_ranks": 2, "max_completion_tokens": 30}
    pairs = ModelFlops(per_token=1.0, per_row=0.0, per_pair=1.0)
    batch = pack(long + short, **shape, model_flops=pairs)
    assert [len(batch.rank_streams(rank)) for rank in range(2)] == [1, 1]
    assert batch.cost_balance == pytest.approx(1890 / 1050)
    assert pack(long + short, **shape).cost_balance == 1.0


def test_rows_count_in_the_balance() -> None:
    # Four sequences of 8 tokens in streams of 16: two have 7 rows, two have 1. Whatever the
    # tokens say, each stream gets one of either kind: 16 tokens and 8 rows that cost 100.
    sequences = [_sequence(f"many{i}", (1,), (2,) * 7, group=i) for i in range(2)]
    sequences += [_sequence(f"few{i}", (1,) * 7, (2,), group=2 + i) for i in range(2)]
    batch = pack(
        sequences,
        stream_tokens=16,
        num_ranks=2,
        max_completion_tokens=8,
        model_flops=ModelFlops(per_token=1.0, per_row=100.0, per_pair=0.0),
    )
    assert [stream.num_rows for stream in batch.streams] == [8, 8]
    assert batch.cost_balance == 1.0


def test_random_batches_are_balanced_over_ranks() -> None:
    batch = pack(
        _random_sequences(400, seed=9), stream_tokens=512, num_ranks=4, max_completion_tokens=64
    )
    assert batch.cost_balance < 1.02
    padding = batch.num_padding_tokens / (len(batch.streams) * 512)
    assert padding < 0.15


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        pytest.param([], "no sequences", id="empty"),
        pytest.param(
            [_sequence("7/0/3", (1,) * 8, (2,) * 3)],
            "'7/0/3': 8 context \\+ 3 completion tokens exceed stream_tokens = 10",
            id="too-long",
        ),
        pytest.param([_sequence("a", (), (2,))], "'a': 0 context", id="no-context"),
        pytest.param([_sequence("a", (1,), ())], "0 completion", id="no-completion"),
        pytest.param(
            [_sequence("a", (1,), (2,)), _sequence("a", (1,), (2,))], "twice", id="duplicate"
        ),
        pytest.param(
            [_sequence("a", (1,), (2, 3), logprobs=(-0.1,))],
            "2 completion tokens but 1 rollout logprobs",
            id="logprobs",
        ),
        pytest.param(
            [_sequence("a", (1,), (2,), logprobs=(-0.1,)), _sequence("b", (1,), (2,))],
            "1 of 2 sequences have no rollout logprobs, first 'b'",
            id="mixed-logprobs",
        ),
        pytest.param([_sequence("a", (1,), (2,), advantage=float("nan"))], "finite", id="nan"),
    ],
)
def test_bad_sequences_are_refused(sequences: list[TrainingSequence], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(sequences, stream_tokens=10, max_completion_tokens=4)


def test_bad_counts_are_refused() -> None:
    sequences = [_sequence("a", (1,), (2,))]
    with pytest.raises(ValueError, match="num_ranks must be at least 1, got 0"):
        pack(sequences, stream_tokens=10, num_ranks=0, max_completion_tokens=4)
    with pytest.raises(ValueError, match="'mean'"):
        pack(sequences, stream_tokens=10, aggregation="mean", max_completion_tokens=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"0\.\.0, got 1"):
        pack(sequences, stream_tokens=10, max_completion_tokens=4).rank_streams(1)


def test_sft_sequences_have_zero_rollout_logprobs() -> None:
    batch = pack([_sequence("a", (1,), (2, 3))], stream_tokens=4, max_completion_tokens=4)
    assert not batch.has_rollout_logprobs
    assert batch.streams[0].rollout_logprobs_R.tolist() == [0.0, 0.0]
