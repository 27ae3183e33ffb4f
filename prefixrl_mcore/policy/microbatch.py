"""Packed streams as what the model takes: this rank's tokens, rows and boundaries.

Shape suffixes: ``T`` tokens of a stream, ``R`` rows of a stream that predict a completion token;
under context parallelism, those of this rank's share of it.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from prefixrl_kernels import RowIndex
from torch import Tensor

from prefixrl_mcore.accounting.model_flops import NO_WORK, Work
from prefixrl_mcore.config.policy import LossConfig, ParallelConfig
from prefixrl_mcore.data.packing import PackedBatch, Stream
from prefixrl_mcore.policy.context import TokenShares, build_context_share, share_tokens
from prefixrl_mcore.policy.head import HeadSettings, HeadTask, RowLoss
from prefixrl_mcore.policy.packed import (
    PackedStream,
    build_packed_stream,
    build_shared_stream,
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Microbatch:
    """One stream as tensors on the model's device."""

    token_ids_BT: Tensor
    """[1, T] int64."""

    packed: PackedStream
    """Positions and sequence boundaries."""

    head: HeadTask
    """Rows, targets and loss."""

    padding_mask_BT: Tensor | None
    """[1, T] bool, True on padding, for routers of experts; None when the model has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSettings:
    """How streams become microbatches."""

    head: HeadSettings
    """How the head computes."""

    is_static: bool
    """Keep the padding, so that all microbatches have one length: pipeline stages send each other
    tensors of a fixed shape. Otherwise the padding is cut off and costs nothing."""

    multiple: int
    """The kept length is a multiple of this (context and sequence parallelism split it evenly)."""

    padding_length: int
    """Kept padding is cut into sequences of at most this many tokens, a multiple of those that
    context parallelism can cut."""

    has_padded_layout: bool
    """Attention wants the padded layout of ``packed.py``; otherwise cumulative lengths."""

    cp_size: int
    """Context-parallel ranks, which share each stream."""

    cp_rank: int
    """This rank among them."""

    has_experts: bool
    """The model routes tokens to experts."""

    device: torch.device
    """Where the tensors are put."""


def check_batch(batch: PackedBatch, parallel: ParallelConfig, *, stream_tokens: int) -> None:
    """Refuse a batch that was packed for another layout.

    Raises:
        ValueError: naming the argument of ``pack`` that is off.
    """
    dp_size = parallel.data_parallel_size
    if batch.num_ranks != dp_size:
        raise ValueError(
            f"batch was packed for {batch.num_ranks} data-parallel rank(s), the policy has "
            f"{dp_size}; pass num_ranks={dp_size} to pack()"
        )
    lengths = {len(stream.token_ids_T) for stream in batch.streams}
    if lengths != {stream_tokens}:
        raise ValueError(
            f"batch has streams of {sorted(lengths)} tokens, the policy was built for "
            f"{stream_tokens}"
        )
    needed, context = parallel.sequence_multiple, parallel.context_parallel_size
    if batch.sequence_multiple % needed:
        raise ValueError(
            f"batch has sequences of a multiple of {batch.sequence_multiple} tokens, "
            f"context_parallel_size = {context} needs a multiple of {needed} (2 chunks x "
            f"{context}); pass sequence_multiple={needed} to pack()"
        )
    per_rank = len(batch.streams) // dp_size
    multiple = parallel.microbatch_multiple
    if per_rank % multiple:
        raise ValueError(
            f"batch has {per_rank} streams per rank; the interleaved schedule needs a "
            f"multiple of {multiple}; pass streams_multiple={multiple} to pack()"
        )


def build_microbatch(
    stream: Stream,
    settings: StreamSettings,
    *,
    loss: LossConfig | None = None,
    has_rollout_logprobs: bool = False,
    reference_logprobs_R: np.ndarray | None = None,
) -> Microbatch:
    """Return one packed stream as tensors.

    Args:
        stream: the stream.
        settings: what is kept of it, and where it goes.
        loss: estimator; None makes a microbatch that is only scored.
        has_rollout_logprobs: the stream's rollout logprobs mean something.
        reference_logprobs_R: [R] float32 nats of this rank's rows; None without a KL term.
    """
    share = share_stream(stream, settings)
    to_device = partial(_to_device, device=settings.device)
    row_loss = None
    if loss is not None:
        row_loss = RowLoss(
            advantages_R=to_device(stream.advantages_R[share.mine_R]),
            weights_R=to_device(stream.weights_R[share.mine_R]),
            rollout_logprobs_R=(
                to_device(stream.rollout_logprobs_R[share.mine_R]) if has_rollout_logprobs else None
            ),
            reference_logprobs_R=(
                None if reference_logprobs_R is None else to_device(reference_logprobs_R)
            ),
            config=loss,
        )
    token_ids_T = stream.token_ids_T[share.tokens]
    head = HeadTask(
        index=RowIndex.build(
            share.rows_R, num_hidden_rows=len(token_ids_T), device=settings.device
        ),
        targets_R=to_device(stream.targets_R[share.mine_R]),
        settings=settings.head,
        loss=row_loss,
    )
    return Microbatch(
        token_ids_BT=to_device(token_ids_T[None]),
        packed=_packed_stream(stream, share, settings),
        head=head,
        padding_mask_BT=(
            to_device(is_padding(stream)[share.tokens][None]) if settings.has_experts else None
        ),
    )


def is_padding(stream: Stream) -> np.ndarray:
    """Return [T] bool, True on tokens that no row sees: behind the last one of each sequence."""
    starts = np.asarray(stream.sequence_starts, dtype=np.int64)
    last_rows = np.full(len(starts) - 1, -2, dtype=np.int64)  # a sequence without rows is padding
    np.maximum.at(last_rows, np.searchsorted(starts, stream.rows_R, "right") - 1, stream.rows_R)
    is_padding_T = np.ones(len(stream.token_ids_T), dtype=np.bool_)
    sequence_T = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    # The last row predicts the last token, which is real too.
    is_padding_T[: starts[-1]] = np.arange(starts[-1]) > last_rows[sequence_T] + 1
    return is_padding_T


def _kept_sequences(stream: Stream, settings: StreamSettings) -> tuple[np.ndarray, int]:
    """Return the sequence starts without a padding sequence, and the tokens to keep.

    What padding is kept becomes short sequences, so that its attention is free.
    """
    starts = np.asarray(stream.sequence_starts, dtype=np.int64)
    if not len(stream.rows_R):
        starts = starts[:1]
    elif stream.rows_R[-1] < starts[-2]:
        starts = starts[:-1]  # no row in the last sequence: it is the padding
    end = int(starts[-1])
    num_tokens = len(stream.token_ids_T)
    if not settings.is_static:
        num_tokens = min(num_tokens, -(-max(end, 1) // settings.multiple) * settings.multiple)
    if num_tokens % settings.multiple:
        raise ValueError(
            f"stream of {num_tokens} tokens does not divide into {settings.multiple} equal parts; "
            f"make batch.stream_tokens a multiple of {settings.multiple}"
        )
    padding = np.arange(end + settings.padding_length, num_tokens, settings.padding_length)
    last = [num_tokens] if num_tokens > end else []
    return np.concatenate((starts, padding, np.asarray(last, dtype=np.int64))), num_tokens


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StreamShare:
    """What one context-parallel rank has of a stream; all of it when there is one."""

    starts: np.ndarray
    """[num_sequences + 1] int64 of the whole stream, kept padding included."""

    tokens: slice | np.ndarray
    """The rank's tokens, in its order."""

    mine_R: slice | np.ndarray
    """Which rows of the stream are at these tokens."""

    rows_R: np.ndarray
    """[R] int64 their places among the rank's tokens."""

    token_shares: TokenShares | None
    """Who has which token; None when there is one rank."""


def share_stream(
    stream: Stream, settings: StreamSettings, cp_rank: int | None = None
) -> StreamShare:
    """Return the share of one context-parallel rank, this one when not said otherwise."""
    starts, num_tokens = _kept_sequences(stream, settings)
    if settings.cp_size == 1:
        return StreamShare(
            starts=starts,
            tokens=slice(num_tokens),
            mine_R=slice(None),
            rows_R=stream.rows_R,
            token_shares=None,
        )
    rank = settings.cp_rank if cp_rank is None else cp_rank
    shares = share_tokens(starts, settings.cp_size)
    mine_R = np.flatnonzero(shares.rank_T[stream.rows_R] == rank)
    return StreamShare(
        starts=starts,
        tokens=shares.tokens(rank),
        mine_R=mine_R,
        rows_R=shares.place_T[stream.rows_R[mine_R]],
        token_shares=shares,
    )


def _packed_stream(stream: Stream, share: StreamShare, settings: StreamSettings) -> PackedStream:
    """Return positions and attention of one rank's share."""
    positions = _to_device(stream.position_ids_T[share.tokens], device=settings.device)
    if share.token_shares is None:
        return build_packed_stream(
            sequence_starts=share.starts,
            position_ids_T=positions,
            device=settings.device,
            has_padded_layout=settings.has_padded_layout,
        )
    context = build_context_share(
        share.starts, share.token_shares, settings.cp_rank, device=settings.device
    )
    return build_shared_stream(
        context=context,
        position_ids_S=positions,
        sequence_starts=share.starts,
    )


def stream_length(microbatch: Microbatch) -> int:
    """Return the tokens of the whole stream."""
    context = microbatch.packed.context
    return microbatch.token_ids_BT.size(1) * (1 if context is None else context.size)


def count_work(streams: Sequence[Stream], settings: StreamSettings) -> Work:
    """Return what the model runs of the streams, kept padding included."""
    total = NO_WORK
    for stream in streams:
        starts, num_tokens = _kept_sequences(stream, settings)
        lengths = np.diff(starts)
        num_pairs = int(np.sum(lengths * (lengths + 1) // 2))
        total += Work(num_tokens=num_tokens, num_rows=stream.num_rows, num_pairs=num_pairs)
    return total


def count_real_tokens(streams: Sequence[Stream]) -> int:
    """Return the context and completion tokens of the streams."""
    return sum(int(np.count_nonzero(~is_padding(stream))) for stream in streams)


def _to_device(values: np.ndarray, *, device: torch.device) -> Tensor:
    """Return an array as a tensor on ``device``; shares memory on the CPU.

    A GPU copies from pinned memory, so that the host does not wait for it.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
