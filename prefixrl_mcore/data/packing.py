"""Packing of training sequences into streams of one fixed length (numpy only).

Shape suffixes: ``T`` tokens of a stream, ``R`` rows of a stream, that is positions whose hidden
state predicts a completion token. Everything that the loss needs is per row; prompt, prefix and
padding have no rows, so they cannot enter the loss.

The batch is packed once, globally, on known lengths, so that every rank knows every count
without communication. The loss is ``sum_R(weights * term) / num_trained_tokens`` with the global
token count; any other normalisation is already in the weights.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from prefixrl_mcore.accounting.model_flops import ModelFlops, sequence_work
from prefixrl_mcore.data.assignment import assign_to_streams, order_for_ranks
from prefixrl_mcore.records import TrainingSequence

Aggregation = Literal["token_mean", "sequence_mean", "constant"]

PADDING_TOKEN_ID = 0
"""Token id of padding; any id of the vocabulary does, since padding attends only to itself and
has no rows."""

BY_TOKENS = ModelFlops(per_token=1.0, per_row=0.0, per_pair=0.0)
"""Work that is the number of tokens: for batches that no model is known of."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stream:
    """One microbatch: whole sequences one after the other, padded to a fixed length."""

    token_ids_T: NDArray[np.int64]
    """[stream_tokens] contexts and completions; ``PADDING_TOKEN_ID`` behind each sequence, up to
    ``sequence_multiple``, and at the end."""

    position_ids_T: NDArray[np.int64]
    """[stream_tokens] counts from 0 within each sequence, padding included."""

    sequence_starts: NDArray[np.int32]
    """[num_sequences + 1] cumulative lengths, from 0 to ``stream_tokens``, with each sequence's own
    padding; the padding at the stream's end is a sequence of its own when there is any."""

    rows_R: NDArray[np.int64]
    """[num_rows] ascending positions whose hidden state predicts a completion token; the first of
    a sequence is its last context token."""

    targets_R: NDArray[np.int64]
    """[num_rows] the completion token that each row predicts."""

    advantages_R: NDArray[np.float32]
    """[num_rows] coefficient of the row's logprob; constant within a sequence."""

    weights_R: NDArray[np.float32]
    """[num_rows] aggregation weight; 1.0 for ``token_mean``."""

    rollout_logprobs_R: NDArray[np.float32]
    """[num_rows] nats, as reported by the engine; 0 where there are none."""

    sequence_index_R: NDArray[np.int32]
    """[num_rows] index into ``PackedBatch.sequence_ids``."""

    @property
    def num_rows(self) -> int:
        """Completion tokens in this stream."""
        return len(self.rows_R)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PackedBatch:
    """All streams of one optimizer step, equal on every rank."""

    streams: tuple[Stream, ...]
    """Multiple of ``num_ranks``; data-parallel rank r takes ``streams[r::num_ranks]``."""

    num_ranks: int
    """Data-parallel ranks that the batch was packed for."""

    num_trained_tokens: int
    """Completion tokens over all streams: the denominator of the loss."""

    num_sequences: int
    """Sequences over all streams, padding not counted."""

    sequence_ids: tuple[str, ...]
    """[num_sequences] ids in the order in which the sequences were given."""

    sequence_multiple: int
    """Each sequence, and the padding at a stream's end, is a multiple of this many tokens."""

    has_rollout_logprobs: bool
    """True when every sequence came with the engine's logprobs."""

    num_padding_tokens: int
    """Padding over all streams: behind sequences, at streams' ends, and in filler streams."""

    cost_balance: float
    """FLOPs of the busiest data-parallel rank divided by the mean over them; 1.0 is even. Padding
    is not counted."""

    def rank_streams(self, rank: int) -> tuple[Stream, ...]:
        """Return the streams of one data-parallel rank, in the order of its microbatches."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"data-parallel rank must be in 0..{self.num_ranks - 1}, got {rank}")
        return self.streams[rank :: self.num_ranks]


def pack(
    sequences: Sequence[TrainingSequence],
    *,
    stream_tokens: int,
    num_ranks: int = 1,
    streams_multiple: int = 1,
    sequence_multiple: int = 1,
    aggregation: Aggregation = "token_mean",
    max_completion_tokens: int,
    model_flops: ModelFlops = BY_TOKENS,
) -> PackedBatch:
    """Pack sequences into streams of ``stream_tokens``; the result depends on nothing else.

    Sequences are never cut. A group (equal ``group_index``) stays in one stream when it fits into
    one, otherwise its sequences are placed one by one. Streams are as few as first-fit-decreasing
    finds, rounded up to a multiple of ``num_ranks * streams_multiple``; over that number the work
    is spread evenly by estimated FLOPs. Streams that remain empty are fillers without rows.

    Args:
        sequences: what to train on; ``sequence_id`` must be unique.
        stream_tokens: length of every stream.
        num_ranks: data-parallel ranks.
        streams_multiple: the number of streams of a rank is a multiple of this (interleaved
            pipelines need a multiple of the number of stages).
        sequence_multiple: sequences are padded to a multiple of this many tokens (context
            parallelism cuts each of them into equal chunks). The padding comes last, where no
            token of the sequence sees it.
        aggregation: ``token_mean`` (weight 1), ``sequence_mean`` (mean over sequences of each
            sequence's token mean) or ``constant`` (sum / (sequences x ``max_completion_tokens``)).
        max_completion_tokens: the constant of ``constant``; unused otherwise.
        model_flops: what the model computes for a token, for a row and for a token that another
            one sees; the work of streams and ranks is balanced by it. The default counts tokens.

    Raises:
        ValueError: if ``stream_tokens`` is no multiple of ``sequence_multiple``, there are no
            sequences, one has no context or no completion, is longer than a stream, has a
            non-finite advantage or logprobs of the wrong length, if an id occurs twice, or if only
            some have rollout logprobs.
    """
    _check_counts(
        stream_tokens=stream_tokens,
        num_ranks=num_ranks,
        streams_multiple=streams_multiple,
        sequence_multiple=sequence_multiple,
        max_completion_tokens=max_completion_tokens,
    )
    _check_sequences(sequences, stream_tokens)
    lengths = [len(s.context_token_ids) + len(s.completion_token_ids) for s in sequences]
    costs = [
        model_flops.forward(sequence_work(length, len(s.completion_token_ids)))
        for length, s in zip(lengths, sequences, strict=True)
    ]
    assigned = assign_to_streams(
        lengths=[_padded(length, sequence_multiple) for length in lengths],
        costs=costs,
        group_indices=[s.group_index for s in sequences],
        stream_tokens=stream_tokens,
        multiple=num_ranks * streams_multiple,
    )
    stream_costs = [sum(costs[index] for index in members) for members in assigned]
    order, cost_balance = order_for_ranks(stream_costs, num_ranks)

    num_trained_tokens = sum(len(s.completion_token_ids) for s in sequences)
    weights = _sequence_weights(sequences, aggregation, num_trained_tokens, max_completion_tokens)
    streams = tuple(
        _fill(sequences, assigned[i], weights, stream_tokens, sequence_multiple) for i in order
    )
    return PackedBatch(
        streams=streams,
        num_ranks=num_ranks,
        num_trained_tokens=num_trained_tokens,
        num_sequences=len(sequences),
        sequence_ids=tuple(s.sequence_id for s in sequences),
        sequence_multiple=sequence_multiple,
        has_rollout_logprobs=_has_rollout_logprobs(sequences),
        num_padding_tokens=len(streams) * stream_tokens - sum(lengths),
        cost_balance=cost_balance,
    )


def _check_counts(*, stream_tokens: int, sequence_multiple: int, **others: int) -> None:
    """Refuse counts below their minimum, and streams that are no whole number of chunks."""
    minima = {"stream_tokens": 2}
    counts = {"stream_tokens": stream_tokens, "sequence_multiple": sequence_multiple, **others}
    for name, value in counts.items():
        if value < minima.get(name, 1):
            raise ValueError(f"{name} must be at least {minima.get(name, 1)}, got {value}")
    if stream_tokens % sequence_multiple:
        raise ValueError(
            f"stream_tokens = {stream_tokens} must be a multiple of sequence_multiple = "
            f"{sequence_multiple}; make it {_padded(stream_tokens, sequence_multiple)}"
        )


def _padded(length: int, multiple: int) -> int:
    """Return ``length`` rounded up to a multiple."""
    return -(-length // multiple) * multiple


def _check_sequences(sequences: Sequence[TrainingSequence], stream_tokens: int) -> None:
    """Refuse sequences that cannot be packed or trained on."""
    if not sequences:
        raise ValueError("pack: got no sequences, expected at least one; skip the step instead")
    seen: set[str] = set()
    for sequence in sequences:
        name = f"sequence {sequence.sequence_id!r}"
        if sequence.sequence_id in seen:
            raise ValueError(f"{name}: occurs twice in one batch; ids must be unique")
        seen.add(sequence.sequence_id)
        num_context = len(sequence.context_token_ids)
        num_completion = len(sequence.completion_token_ids)
        num_logprobs = len(sequence.rollout_logprobs)
        if not num_context or not num_completion:
            raise ValueError(
                f"{name}: {num_context} context and {num_completion} completion tokens; "
                "both must be at least 1"
            )
        if num_context + num_completion > stream_tokens:
            raise ValueError(
                f"{name}: {num_context} context + {num_completion} completion tokens exceed "
                f"stream_tokens = {stream_tokens}; raise batch.stream_tokens or lower "
                "rollout.max_total_tokens"
            )
        if num_logprobs not in (0, num_completion):
            raise ValueError(
                f"{name}: {num_completion} completion tokens but {num_logprobs} rollout logprobs"
            )
        if not np.isfinite(sequence.advantage):
            raise ValueError(f"{name}: advantage must be finite, got {sequence.advantage}")


def _has_rollout_logprobs(sequences: Sequence[TrainingSequence]) -> bool:
    """Return whether all sequences have logprobs; refuse a mixture."""
    without = [s.sequence_id for s in sequences if not s.rollout_logprobs]
    if without and len(without) < len(sequences):
        raise ValueError(
            f"{len(without)} of {len(sequences)} sequences have no rollout logprobs, first "
            f"{without[0]!r}; a batch has them for all sequences or for none"
        )
    return not without


def _sequence_weights(
    sequences: Sequence[TrainingSequence],
    aggregation: Aggregation,
    num_trained_tokens: int,
    max_completion_tokens: int,
) -> list[float]:
    """Return each sequence's weight per row, so that dividing by the token count is right."""
    if aggregation == "token_mean":
        return [1.0] * len(sequences)
    if aggregation == "sequence_mean":
        return [
            num_trained_tokens / (len(sequences) * len(s.completion_token_ids)) for s in sequences
        ]
    if aggregation == "constant":
        return [num_trained_tokens / (len(sequences) * max_completion_tokens)] * len(sequences)
    raise ValueError(
        f"aggregation must be token_mean, sequence_mean or constant, got {aggregation!r}"
    )


def _fill(
    sequences: Sequence[TrainingSequence],
    members: Sequence[int],
    weights: Sequence[float],
    stream_tokens: int,
    sequence_multiple: int,
) -> Stream:
    """Lay out the member sequences one after the other and pad."""
    token_ids_T = np.full(stream_tokens, PADDING_TOKEN_ID, dtype=np.int64)
    position_ids_T = np.zeros(stream_tokens, dtype=np.int64)
    starts = [0]
    rows: list[NDArray[np.int64]] = []
    for index in members:
        sequence = sequences[index]
        start = starts[-1]
        first_row = start + len(sequence.context_token_ids) - 1
        end = first_row + 1 + len(sequence.completion_token_ids)
        padded_end = start + _padded(end - start, sequence_multiple)
        token_ids_T[start : first_row + 1] = sequence.context_token_ids
        token_ids_T[first_row + 1 : end] = sequence.completion_token_ids
        position_ids_T[start:padded_end] = np.arange(padded_end - start)
        rows.append(np.arange(first_row, end - 1, dtype=np.int64))
        starts.append(padded_end)
    if starts[-1] < stream_tokens:
        position_ids_T[starts[-1] :] = np.arange(stream_tokens - starts[-1])
        starts.append(stream_tokens)

    rows_R = np.concatenate([*rows, np.empty(0, dtype=np.int64)])
    counts = [len(row) for row in rows]
    logprobs = [
        np.asarray(sequences[i].rollout_logprobs or [0.0] * n, dtype=np.float32)
        for i, n in zip(members, counts, strict=True)
    ]
    return Stream(
        token_ids_T=token_ids_T,
        position_ids_T=position_ids_T,
        sequence_starts=np.asarray(starts, dtype=np.int32),
        rows_R=rows_R,
        targets_R=token_ids_T[rows_R + 1],
        advantages_R=_repeat([sequences[i].advantage for i in members], counts),
        weights_R=_repeat([weights[i] for i in members], counts),
        rollout_logprobs_R=np.concatenate([*logprobs, np.empty(0, dtype=np.float32)]),
        sequence_index_R=np.repeat(np.asarray(members, dtype=np.int32), counts),
    )


def _repeat(values: Sequence[float], counts: Sequence[int]) -> NDArray[np.float32]:
    """Repeat each sequence's value for each of its rows."""
    return np.repeat(np.asarray(values, dtype=np.float32), np.asarray(counts, dtype=np.int64))
