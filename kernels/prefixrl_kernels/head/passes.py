"""The head's work over blocks and chunks of rows: logits, statistics, gradients.

One call of the head goes through its rows in chunks (``plan.chunk_rows``), and through each chunk
in blocks (``plan.logit_rows``). A block's logits live from its matrix product until its gradient
has been written into the chunk's buffer; then the chunk enters the two products of the backward
pass. All rows of all ranks of a tensor-parallel group go through the same blocks, so that their
collectives meet.

Shape suffixes: ``R`` rows, ``V`` columns as stored, ``H`` hidden size, ``K`` table fields, ``T``
hidden rows.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from prefixrl_kernels.head import table
from prefixrl_kernels.head.estimators import Estimator
from prefixrl_kernels.head.matmul import multiply_into, wide_dtype
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.row_kernels import LossInputs, RowKernels
from prefixrl_kernels.head.vocab import (
    PendingSum,
    VocabShard,
    gather_partials,
    gather_sequence,
    start_sequence_sum,
    start_sum,
)
from prefixrl_kernels.head_plan import HeadPlan, even_slices


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadCall:
    """What stays the same during one call of the head, beside hidden states and weight."""

    targets_R: Tensor
    """[R] int64 token ids in the whole vocabulary."""

    index: RowIndex
    """The hidden rows that the rows read."""

    shard: VocabShard
    """This rank's columns."""

    temperature: float
    """Divides the logits."""

    logits_dtype: torch.dtype
    """What the logits are rounded to before anything else reads them."""

    tp_group: dist.ProcessGroup | None
    """Ranks that share the vocabulary; None when there is one."""

    is_sequence_parallel: bool
    """Whether each rank holds its share of the sequence's hidden states."""

    plan: HeadPlan
    """Mode and block sizes."""

    kernels: RowKernels
    """Implementation of the row-wise work."""

    def gather_rows(self, hidden_TH: Tensor) -> Tensor:
        """Return the head's rows, [R, H]; with sequence parallelism a collective."""
        if self.is_sequence_parallel and self.tp_group is not None:
            hidden_TH = gather_sequence(hidden_TH, self.tp_group)
        return self.index.gather(hidden_TH)

    def hidden_sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that the gradient of rows of ``dtype`` is kept in until it is scaled.

        It is float32 when something is still to be added to it, and in ``save_dlogits``, which has
        the room. Otherwise it takes no more room than the result; the one factor it may still meet,
        the loss's upstream gradient in ``grad_in_forward``, is exact for powers of two.
        """
        is_final = self.plan.mode != "save_dlogits" and self.tp_group is None
        return dtype if is_final and not self.index.has_duplicates else wide_dtype(dtype)

    def new_table(self, rows_RH: Tensor) -> Tensor:
        """Return an empty result table, [K, R]."""
        dtype = wide_dtype(rows_RH.dtype)
        shape = (table.NUM_FIELDS, rows_RH.size(0))
        return torch.empty(shape, dtype=dtype, device=rows_RH.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """The loss that ``fill_table`` evaluates in the same pass as the statistics."""

    inputs: LossInputs
    """Advantages, weights, other policies' logprobs."""

    estimator: Estimator
    """What is made of them."""

    @property
    def has_entropy_grad(self) -> bool:
        """Whether the entropy enters the loss."""
        return self.estimator.entropy_coefficient != 0.0


class Buffers:
    """The logits of a block and the gradients of a chunk's logits."""

    def __init__(self, call: HeadCall, weight_VH: Tensor, *, has_grads: bool) -> None:
        """Allocate for the call's plan; the logits share the gradients' memory if they can."""
        self._call = call
        self._weight_VH = weight_VH[: call.shard.num_columns]
        self.grads_RV = self._new(call.plan.chunk_rows, weight_VH.dtype) if has_grads else None
        self._is_in_place = has_grads and call.logits_dtype == weight_VH.dtype
        self._logits_RV = (
            None if self._is_in_place else self._new(call.plan.logit_rows, call.logits_dtype)
        )

    def compute_logits(self, rows_RH: Tensor, offset: int) -> Tensor:
        """Return the logits of a block that starts ``offset`` rows into its chunk, [R, V]."""
        num_rows = rows_RH.size(0)
        if self._is_in_place:
            logits_RV = self.chunk_grads(offset, num_rows)
        else:
            assert self._logits_RV is not None, "allocated unless in place"
            logits_RV = self._logits_RV[:num_rows, : self._call.shard.num_columns]
        multiply_into(logits_RV, rows_RH, self._weight_VH.T)
        return logits_RV

    def chunk_grads(self, offset: int, num_rows: int) -> Tensor:
        """Return the gradient buffer of rows ``offset`` and on of the chunk, [R, V]."""
        assert self.grads_RV is not None, "asked for a gradient without gradient buffers"
        return self.grads_RV[offset : offset + num_rows, : self._call.shard.num_columns]

    def _new(self, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Return an empty [rows, row stride] buffer, no longer than the call has rows."""
        num_rows = min(num_rows, self._call.targets_R.size(0))
        return torch.empty(
            (num_rows, self._call.shard.row_stride), dtype=dtype, device=self._weight_VH.device
        )


class GradientSums:
    """The gradients of hidden rows and weight, chunk by chunk.

    The sum of the hidden gradient over the tensor-parallel ranks runs beside the product for the
    weight. The weight's gradient accumulates in float32 whenever there is more than one summand.
    """

    def __init__(
        self,
        call: HeadCall,
        rows_RH: Tensor,
        weight_VH: Tensor,
        *,
        needs_hidden: bool,
        weight_target_VH: Tensor | None,
        is_target_added_to: bool = False,
        factor: Tensor | float | None = None,
    ) -> None:
        """Prepare the sums, which are complete after the last chunk.

        Args:
            call: the call.
            rows_RH: [R, H] the rows that the logits were made from.
            weight_VH: [V, H] the weight.
            needs_hidden: compute the gradient of the rows.
            weight_target_VH: [V, H] receives the gradient of the weight; None computes none.
            is_target_added_to: the target holds something that is added to, not garbage.
            factor: multiplies the weight's gradient, through the rows in their own precision:
                exact for powers of two. None is 1.
        """
        self._call = call
        self._weight_VH = weight_VH[: call.shard.num_columns]
        self._rows_RH = rows_RH if factor is None else (rows_RH * factor).to(rows_RH.dtype)
        self._target_VH = weight_target_VH
        self._is_added_to = is_target_added_to
        self.private_target_VH = None if is_target_added_to else weight_target_VH
        """[V, H] the weight's gradient, when it is nobody else's buffer."""
        self.hidden: Tensor | None = None
        """[R, H] summed gradient of the rows; with sequence parallelism, after the last chunk, the
        [T / tp, H] gradient of this rank's share of the sequence. None when not needed."""
        if needs_hidden:
            dtype = call.hidden_sum_dtype(rows_RH.dtype)
            self.hidden = torch.empty(rows_RH.shape, dtype=dtype, device=rows_RH.device)
        if weight_target_VH is not None and not is_target_added_to:
            covered = call.shard.num_columns if rows_RH.size(0) else 0
            weight_target_VH[covered:].zero_()

    def add(self, rows: slice, grads_RV: Tensor, *, is_last: bool) -> None:
        """Add the gradients of one chunk's logits, [R, V].

        All tensor-parallel ranks must call this with the same rows.
        """
        pending = self._start_hidden(rows, grads_RV, is_last)
        if self._target_VH is not None:
            target_VH = self._target_VH[: self._call.shard.num_columns]
            multiply_into(target_VH, grads_RV.T, self._rows_RH[rows], add=self._is_added_to)
            self._is_added_to = True
        if pending is not None:
            summed = pending.wait()
            if self._call.is_sequence_parallel:
                self.hidden = summed

    def _start_hidden(self, rows: slice, grads_RV: Tensor, is_last: bool) -> PendingSum | None:
        """Compute the gradient of the chunk's rows and start its sum over the ranks."""
        call = self._call
        if self.hidden is None:
            return None
        multiply_into(self.hidden[rows], grads_RV, self._weight_VH)
        if not call.is_sequence_parallel:
            return start_sum(self.hidden[rows], call.tp_group)
        if not is_last:
            return None
        assert call.tp_group is not None, "sequence parallelism has a group"
        sequence_TH = self.hidden.new_empty((call.index.num_hidden_rows, self.hidden.size(1)))
        call.kernels.scatter(self.hidden, call.index, sequence_TH, self.hidden.new_ones(()))
        return start_sequence_sum(sequence_TH, call.tp_group)


def finish_hidden(
    call: HeadCall,
    summed: Tensor,
    scale: Tensor | None,
    *,
    num_hidden_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of the hidden states that the call was given, times ``scale``.

    Args:
        call: the call.
        summed: ``GradientSums.hidden`` after the last chunk.
        scale: [] tensor; None is 1.
        num_hidden_rows: rows of the hidden states on this rank.
        dtype: of the hidden states.
    """
    shape = (num_hidden_rows, summed.size(1))
    if call.index.rows_R is None and summed.dtype == dtype and summed.shape == shape:
        return summed if scale is None else summed.mul_(scale)
    scale = torch.ones((), device=summed.device) if scale is None else scale
    out_TH = torch.empty(shape, dtype=dtype, device=summed.device)
    if not call.index.num_rows:
        return out_TH.zero_()
    if call.is_sequence_parallel:
        return torch.mul(summed, scale, out=out_TH)
    call.kernels.scatter(summed, call.index, out_TH, scale)
    return out_TH


def chunks_of(call: HeadCall) -> Iterator[tuple[slice, bool]]:
    """Yield the rows of each chunk, and whether it is the last."""
    num_rows = call.targets_R.size(0)
    for rows in even_slices(0, num_rows, call.plan.chunk_rows):
        yield rows, rows.stop == num_rows


def fill_table(
    call: HeadCall,
    rows_RH: Tensor,
    table_KR: Tensor,
    buffers: Buffers,
    chunk: slice,
    *,
    loss: Loss | None = None,
) -> None:
    """Fill the table's columns of one chunk, and its gradient buffer if there is one.

    All tensor-parallel ranks must call this with the same rows.
    """
    for rows in even_slices(chunk.start, chunk.stop, call.plan.logit_rows):
        logits_RV = buffers.compute_logits(rows_RH[rows], rows.start - chunk.start)
        partials_4R = call.kernels.statistics(
            logits_RV, call.targets_R[rows], shard=call.shard, temperature=call.temperature
        )
        call.kernels.merge(gather_partials(partials_4R, call.tp_group), table_KR[:, rows])
        if loss is None:
            continue
        call.kernels.weigh(table_KR[:, rows], loss.inputs[rows], loss.estimator)
        if buffers.grads_RV is not None:
            _write_grads(call, buffers, logits_RV, table_KR, rows, chunk, loss.has_entropy_grad)


def recompute_grads(
    call: HeadCall,
    rows_RH: Tensor,
    table_KR: Tensor,
    buffers: Buffers,
    chunk: slice,
    *,
    has_entropy_grad: bool,
) -> None:
    """Fill the gradient buffer of one chunk from logits that are made again."""
    for rows in even_slices(chunk.start, chunk.stop, call.plan.logit_rows):
        logits_RV = buffers.compute_logits(rows_RH[rows], rows.start - chunk.start)
        _write_grads(call, buffers, logits_RV, table_KR, rows, chunk, has_entropy_grad)


def _write_grads(
    call: HeadCall,
    buffers: Buffers,
    logits_RV: Tensor,
    table_KR: Tensor,
    rows: slice,
    chunk: slice,
    has_entropy_grad: bool,
) -> None:
    """Write the gradient of a block's logits into the chunk's buffer."""
    call.kernels.grad_logits(
        logits_RV,
        table_KR[:, rows],
        call.targets_R[rows],
        buffers.chunk_grads(rows.start - chunk.start, rows.stop - rows.start),
        shard=call.shard,
        temperature=call.temperature,
        has_entropy_grad=has_entropy_grad,
    )
