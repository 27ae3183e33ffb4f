"""Streams through the model: Megatron's own schedules, with the loss contract of the project.

Shape suffixes: ``T`` tokens of a stream, ``R`` rows of a stream that predict a completion token;
under context parallelism, those of this rank's share of it.

Loss contract: the loss function returns the local *sum*, the local number of trained tokens and
metric sums. Megatron adds the gradients of all microbatches and ranks and divides them once by
the global token count (``calculate_per_token_loss``). Nothing else divides.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from prefixrl_mcore.data.packing import Stream
from prefixrl_mcore.loss.gap_histogram import NUM_BINS, quantile
from prefixrl_mcore.loss.row_metrics import GAP_P99, LossReport, metric_names, report_rows
from prefixrl_mcore.policy.build import unwrap
from prefixrl_mcore.policy.head import HeadOutput, compute_head
from prefixrl_mcore.policy.microbatch import (
    Microbatch,
    StreamSettings,
    share_stream,
    stream_length,
)
from prefixrl_mcore.policy.topology import Topology

RowReport = tuple[np.ndarray, np.ndarray]
"""[R] float32 logprobs and entropies of a stream's rows, nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over all microbatches and ranks; equal on every rank."""

    loss: float
    """Sum of the loss over all trained tokens."""

    metric_sums: dict[str, float]
    """Sums over all rows."""

    metric_maxima: dict[str, float]
    """Maxima over all rows."""

    metric_quantiles: dict[str, float]
    """Quantiles over all rows."""


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
            seq_length=stream_length(microbatches[0]),  # Megatron divides it over the ranks
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
    gap_counts = torch.zeros(NUM_BINS, dtype=torch.int64)
    for report in reports:
        rows = [report.summed_loss, *(report.metric_sums[name] for name in sum_names)]
        sums += torch.stack(rows).double().cpu()
        if max_names:
            largest = torch.stack([report.metric_maxima[name] for name in max_names])
            maxima = torch.maximum(maxima, largest.double().cpu())
        if report.gap_counts is not None:
            gap_counts += report.gap_counts.cpu()
    if topology.world_size > 1:
        # Tensor-parallel ranks hold the same reports: rank 0 of each group speaks for it.
        if topology.tp_rank:
            sums.zero_()
            gap_counts.zero_()
        dist.all_reduce(sums)
        if has_rollout_logprobs:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
            dist.all_reduce(gap_counts)
    loss, *metric_sums = sums.tolist()
    return Totals(
        loss=loss,
        metric_sums=dict(zip(sum_names, metric_sums, strict=True)),
        metric_maxima=dict(zip(max_names, maxima.tolist(), strict=True)),
        metric_quantiles={GAP_P99: quantile(gap_counts, 0.99)} if has_rollout_logprobs else {},
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


def _token_count(output: HeadOutput) -> Tensor:
    """Return the [] int32 number of trained tokens; int32 because Megatron sums it as such."""
    logprobs_R = output.logprobs_R
    return torch.full((), logprobs_R.size(0), dtype=torch.int32, device=logprobs_R.device)


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
        mine_R = share_stream(stream, settings, cp_rank).mine_R
        logprobs_R[mine_R] = logprobs
        entropies_R[mine_R] = entropies
    return logprobs_R, entropies_R
