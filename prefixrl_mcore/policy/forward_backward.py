"""Streams through the model: Megatron's own schedules, with the loss contract of the project.

Shape suffixes: ``T`` tokens of a stream, ``R`` rows of a stream that predict a completion token;
under context parallelism, those of this rank's share of it.

Loss contract: the loss function returns the local *sum*, the local number of trained tokens and
metric sums. Megatron adds the gradients of all microbatches and ranks and divides them once by
the global token count (``calculate_per_token_loss``). Nothing else divides.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from prefixrl_kernels import RowIndex
from torch import Tensor

from prefixrl_mcore.accounting.model_flops import NO_WORK, Work
from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.data.packing import Stream
from prefixrl_mcore.loss.row_metrics import LossReport, metric_names, report_rows
from prefixrl_mcore.policy.build import unwrap
from prefixrl_mcore.policy.context import TokenShares, build_context_share, share_tokens
from prefixrl_mcore.policy.head import HeadOutput, HeadSettings, HeadTask, RowLoss, compute_head
from prefixrl_mcore.policy.packed import (
    PackedStream,
    build_packed_stream,
    build_shared_stream,
)
from prefixrl_mcore.policy.topology import Topology

RowReport = tuple[np.ndarray, np.ndarray]
"""[R] float32 logprobs and entropies of a stream's rows, nats."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over all microbatches and ranks; equal on every rank."""

    loss: float
    """Sum of the loss over all trained tokens."""

    metric_sums: dict[str, float]
    """Sums over all rows."""

    metric_maxima: dict[str, float]
    """Maxima over all rows."""


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
    share = _share_stream(stream, settings)
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


def run_schedule[T](
    chunks: Sequence[DistributedDataParallel],
    microbatches: Sequence[Microbatch],
    loss_function: Callable[[HeadOutput], tuple[Tensor, Tensor, T]],
    *,
    forward_only: bool,
    on_microbatch: Callable[[], None] = lambda: None,
) -> list[T]:
    """Run Megatron's forward(-backward) schedule and return what the loss function reported.

    Afterwards, unless ``forward_only``, every parameter's ``main_grad`` is the gradient of the
    global sum divided by the global token count. All ranks must call this with equally many
    microbatches (and, with pipeline stages, of equal length).

    Args:
        chunks: this rank's model chunks.
        microbatches: this data-parallel rank's microbatches, in order.
        loss_function: called on the last stage with the output of the head; returns the local
            sum, the local token count and anything to report.
        forward_only: compute no gradient.
        on_microbatch: called when a model chunk begins with a microbatch.

    Returns:
        One report per microbatch on the last pipeline stage, nothing on the others.
    """
    schedule = get_forward_backward_func()
    iterators = [_announced(microbatches, on_microbatch) for _ in chunks]
    with torch.set_grad_enabled(not forward_only):
        return schedule(
            forward_step_func=partial(_forward_step, loss_function=loss_function),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(microbatches),
            seq_length=_stream_length(microbatches[0]),  # Megatron divides it over the ranks
            micro_batch_size=1,
            forward_only=forward_only,
        )


def policy_loss(
    output: HeadOutput, *, has_rollout_logprobs: bool, has_reference: bool
) -> tuple[Tensor, Tensor, LossReport]:
    """Return the summed loss, the trained-token count and the report of one microbatch."""
    assert output.statistics is not None, "the microbatch was built with a loss"
    report = report_rows(
        output.summed_loss.detach(),
        output.statistics,
        has_rollout_logprobs=has_rollout_logprobs,
        has_reference=has_reference,
    )
    return output.summed_loss, _token_count(output), report


def row_report(output: HeadOutput) -> tuple[Tensor, Tensor, RowReport]:
    """Return a zero loss and, as report, the rows' logprobs and entropies (float32 numpy)."""
    both_2R = torch.stack((output.logprobs_R, output.entropies_R)).detach()
    logprobs_R, entropies_R = both_2R.cpu().numpy()
    return output.summed_loss, _token_count(output), (logprobs_R, entropies_R)


def reduce_totals(
    reports: Sequence[LossReport],
    topology: Topology,
    *,
    has_rollout_logprobs: bool,
    has_reference: bool,
) -> Totals:
    """Add up the reports of all microbatches and ranks; all ranks must call this.

    Data- and context-parallel ranks report different rows. The last pipeline stage has the
    reports; the others take part with zeros.
    """
    sum_names, max_names = metric_names(
        has_rollout_logprobs=has_rollout_logprobs, has_reference=has_reference
    )
    # float64 keeps the order of streams and ranks out of the reported digits.
    sums = torch.zeros(1 + len(sum_names), dtype=torch.float64)
    maxima = torch.zeros(len(max_names), dtype=torch.float64)
    for report in reports:
        rows = [report.summed_loss, *(report.metric_sums[name] for name in sum_names)]
        sums += torch.stack(rows).double().cpu()
        if max_names:
            largest = torch.stack([report.metric_maxima[name] for name in max_names])
            maxima = torch.maximum(maxima, largest.double().cpu())
    if topology.world_size > 1:
        # Tensor-parallel ranks hold the same reports: rank 0 of each group speaks for it.
        if topology.tp_rank:
            sums.zero_()
        dist.all_reduce(sums)
        if max_names:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    loss, *metric_sums = sums.tolist()
    return Totals(
        loss=loss,
        metric_sums=dict(zip(sum_names, metric_sums, strict=True)),
        metric_maxima=dict(zip(max_names, maxima.tolist(), strict=True)),
    )


def run_model(chunk: DistributedDataParallel, microbatch: Microbatch) -> HeadOutput:
    """Run one model chunk forward on one microbatch.

    Returns:
        The head's output on the last pipeline stage; on the others, whatever the annotation says,
        a tensor of hidden states for Megatron's schedule to send on.
    """
    return chunk(
        microbatch.token_ids_BT,
        microbatch.packed.position_ids_T,
        attention_mask=None,
        packed_seq_params=microbatch.packed,
        padding_mask=_stage_mask(chunk, microbatch.padding_mask_BT),
        output_processor=compute_head,
        output_processor_context=microbatch.head,
    )


def _announced(
    microbatches: Sequence[Microbatch], on_microbatch: Callable[[], None]
) -> Iterator[Microbatch]:
    """Yield the microbatches, saying so each time."""
    for microbatch in microbatches:
        on_microbatch()
        yield microbatch


def _stage_mask(chunk: DistributedDataParallel, padding_mask_BT: Tensor | None) -> Tensor | None:
    """Return the padding mask as the chunk takes it.

    With sequence parallelism Megatron gives each rank its share of the mask in the first pipeline
    stage, and leaves it whole in the others.
    """
    model = unwrap(chunk)
    if padding_mask_BT is None or model.pre_process or not model.config.sequence_parallel:
        return padding_mask_BT
    group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(group, dist.ProcessGroup), "initialize has built the groups"
    return padding_mask_BT.chunk(group.size(), dim=1)[group.rank()]


def _forward_step[T](
    data_iterator: Iterator[Microbatch],
    model: DistributedDataParallel,
    *,
    loss_function: Callable[[HeadOutput], tuple[Tensor, Tensor, T]],
) -> tuple[HeadOutput, Callable[[HeadOutput], tuple[Tensor, Tensor, T]]]:
    """Run one chunk on the next microbatch, as Megatron's schedules ask for it."""
    return run_model(model, next(data_iterator)), loss_function


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
class _StreamShare:
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


def _share_stream(
    stream: Stream, settings: StreamSettings, cp_rank: int | None = None
) -> _StreamShare:
    """Return the share of one context-parallel rank, this one when not said otherwise."""
    starts, num_tokens = _kept_sequences(stream, settings)
    if settings.cp_size == 1:
        return _StreamShare(
            starts=starts,
            tokens=slice(num_tokens),
            mine_R=slice(None),
            rows_R=stream.rows_R,
            token_shares=None,
        )
    rank = settings.cp_rank if cp_rank is None else cp_rank
    shares = share_tokens(starts, settings.cp_size)
    mine_R = np.flatnonzero(shares.rank_T[stream.rows_R] == rank)
    return _StreamShare(
        starts=starts,
        tokens=shares.tokens(rank),
        mine_R=mine_R,
        rows_R=shares.place_T[stream.rows_R[mine_R]],
        token_shares=shares,
    )


def _packed_stream(stream: Stream, share: _StreamShare, settings: StreamSettings) -> PackedStream:
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


def _stream_length(microbatch: Microbatch) -> int:
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


def _token_count(output: HeadOutput) -> Tensor:
    """Return the [] int32 number of trained tokens; int32 because Megatron sums it as such."""
    logprobs_R = output.logprobs_R
    return torch.full((), logprobs_R.size(0), dtype=torch.int32, device=logprobs_R.device)


def _to_device(values: np.ndarray, *, device: torch.device) -> Tensor:
    """Return an array as a tensor on ``device``; shares memory on the CPU.

    A GPU copies from pinned memory, so that the host does not wait for it.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def gather_row_reports(
    reports: Sequence[RowReport],
    topology: Topology,
    *,
    streams: Sequence[Stream],
    settings: StreamSettings,
) -> list[RowReport]:
    """Return every stream's (logprobs_R, entropies_R), in batch order, on every rank.

    All ranks must call this. Stream i belongs to data-parallel rank ``i % dp_size``; its rows are
    spread over the context-parallel ranks.
    """
    if topology.world_size == 1:
        return list(reports)
    speaks = topology.is_last_stage and topology.tp_rank == 0
    mine = ((topology.dp_rank, topology.cp_rank), list(reports)) if speaks else None
    gathered: list[tuple[tuple[int, int], list[RowReport]] | None] = [None] * topology.world_size
    dist.all_gather_object(gathered, mine)
    by_rank = dict(entry for entry in gathered if entry is not None)
    return [
        _join_rows(
            stream,
            [
                by_rank[index % topology.dp_size, cp_rank][index // topology.dp_size]
                for cp_rank in range(topology.cp_size)
            ],
            settings,
        )
        for index, stream in enumerate(streams)
    ]


def _join_rows(stream: Stream, parts: Sequence[RowReport], settings: StreamSettings) -> RowReport:
    """Return the report of a whole stream from those of its context-parallel ranks, in order."""
    if len(parts) == 1:
        return parts[0]
    logprobs_R, entropies_R = np.full((2, stream.num_rows), np.nan, dtype=np.float32)
    for cp_rank, (logprobs, entropies) in enumerate(parts):
        mine_R = _share_stream(stream, settings, cp_rank).mine_R
        logprobs_R[mine_R] = logprobs
        entropies_R[mine_R] = entropies
    return logprobs_R, entropies_R
