"""Batches in which every position is a row and weights do the selection."""

import dataclasses

import numpy as np

from prefixrl_mcore.data.packing import PackedBatch, Stream


def with_every_position_a_row(
    batch: PackedBatch, *, garbage: float, garbage_target: int
) -> PackedBatch:
    """Return ``batch`` with all positions as rows, those that were none with weight 0.

    The new rows have ``garbage`` as advantage and rollout logprob, and ``garbage_target`` as
    target.
    """
    streams = []
    for stream in batch.streams:
        mask_T = _row_mask(stream)
        streams.append(
            dataclasses.replace(
                stream,
                rows_R=np.arange(mask_T.size),
                targets_R=_spread(stream.targets_R, mask_T, garbage_target),
                advantages_R=_spread(stream.advantages_R, mask_T, garbage),
                weights_R=_spread(stream.weights_R, mask_T, 0.0),
                rollout_logprobs_R=_spread(stream.rollout_logprobs_R, mask_T, garbage),
                sequence_index_R=_spread(stream.sequence_index_R, mask_T, 0),
            )
        )
    return dataclasses.replace(batch, streams=tuple(streams))


def _row_mask(stream: Stream) -> np.ndarray:
    mask = np.zeros(len(stream.token_ids_T), dtype=bool)
    mask[stream.rows_R] = True
    return mask


def _spread(values_R: np.ndarray, mask_T: np.ndarray, filler: float) -> np.ndarray:
    """Return [T] values: those of rows at the rows, ``filler`` everywhere else."""
    values_T = np.full(mask_T.size, filler, dtype=values_R.dtype)
    values_T[mask_T] = values_R
    return values_T
