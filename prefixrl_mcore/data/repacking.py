"""Packing a batch again for another layout, from its streams alone (numpy only)."""

import itertools
from dataclasses import replace

import numpy as np

from prefixrl_mcore.data.packing import PackedBatch, pack
from prefixrl_mcore.records import TrainingSequence


def repack(
    batch: PackedBatch,
    *,
    stream_tokens: int,
    num_ranks: int,
    streams_multiple: int = 1,
    sequence_multiple: int = 1,
) -> PackedBatch:
    """Return the same sequences with the same weights, packed for another layout.

    A batch that fits the layout already keeps its streams. Otherwise sequences that shared a
    stream share one again if they fit; see ``pack`` for the arguments and what it refuses.
    """
    lengths = {len(stream.token_ids_T) for stream in batch.streams}
    if (
        lengths == {stream_tokens}
        and len(batch.streams) % (num_ranks * streams_multiple) == 0
        and batch.sequence_multiple % sequence_multiple == 0
    ):
        return replace(batch, num_ranks=num_ranks)
    sequences, weights = unpack(batch)
    packed = pack(
        sequences,
        stream_tokens=stream_tokens,
        num_ranks=num_ranks,
        streams_multiple=streams_multiple,
        sequence_multiple=sequence_multiple,
        max_completion_tokens=1,  # of an aggregation that is not used: the weights are known
    )
    streams = tuple(
        replace(stream, weights_R=weights[stream.sequence_index_R]) for stream in packed.streams
    )
    return replace(packed, streams=streams)


def unpack(batch: PackedBatch) -> tuple[list[TrainingSequence], np.ndarray]:
    """Return the sequences of a batch, in the order of ``sequence_ids``, and their row weights.

    Groups are lost; ``group_index`` is the number of the stream.

    Returns:
        The sequences, and [num_sequences] float32, the weight of each sequence's rows.
    """
    found: dict[int, TrainingSequence] = {}
    weights = np.zeros(batch.num_sequences, dtype=np.float32)
    for number, stream in enumerate(batch.streams):
        for first, last in itertools.pairwise(stream.sequence_starts):
            rows = np.flatnonzero((stream.rows_R >= first) & (stream.rows_R < last))
            if not len(rows):
                continue  # padding at the end of the stream
            index, begin = int(stream.sequence_index_R[rows[0]]), int(stream.rows_R[rows[0]]) + 1
            logprobs = stream.rollout_logprobs_R[rows] if batch.has_rollout_logprobs else []
            weights[index] = stream.weights_R[rows[0]]
            found[index] = TrainingSequence(
                sequence_id=batch.sequence_ids[index],
                group_index=number,
                context_token_ids=tuple(map(int, stream.token_ids_T[first:begin])),
                completion_token_ids=tuple(map(int, stream.targets_R[rows])),
                advantage=float(stream.advantages_R[rows[0]]),
                rollout_logprobs=tuple(map(float, logprobs)),
            )
    return [found[index] for index in range(batch.num_sequences)], weights
