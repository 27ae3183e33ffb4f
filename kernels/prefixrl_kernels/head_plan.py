"""How much of the work is kept, and how much is done twice: chosen from a memory budget.

With ``R`` rows, ``H`` hidden size and ``V`` columns, one matrix product costs ``2 R H V`` FLOPs.

=================  =====  =====================================================================
mode               FLOPs  what it holds between the forward and the backward pass
=================  =====  =====================================================================
``save_dlogits``   6RHV   the gradient of all logits, in the operands' precision
``grad_in_forward``  6RHV   the finished gradients of hidden states and weight
``recompute``      8RHV   nothing of size V; the backward pass makes the logits again
``no_grad``        2RHV   nothing
=================  =====  =====================================================================

Two block sizes bound the buffers. *Logits* exist for ``logit_rows`` rows at a time. *Gradients of
logits* are collected for ``chunk_rows`` rows before they enter the matrix products: each chunk
reads and writes the whole float32 weight gradient, so chunks should be large.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Mode = Literal["save_dlogits", "grad_in_forward", "recompute", "no_grad"]

MODES: tuple[Mode, ...] = ("save_dlogits", "grad_in_forward", "recompute", "no_grad")

DEFAULT_BUDGET_BYTES = 1_500_000_000

COLUMN_MULTIPLE = 64
"""Rows of logits start at multiples of this many elements: cuBLAS takes its fast kernels only
when the leading dimension keeps 16-byte alignment."""

CPU_ELEMENTS_AT_ONCE = 2**21
"""Logits in one go of elementwise work without Triton: temporaries stay in the processor's
cache."""

_ROW_MULTIPLE = 128
"""Blocks of rows are multiples of a GEMM tile's height."""

_LOGITS_SHARE = 0.25
"""Part of the budget that one block of logits may take."""

_MIN_CHUNK_ROWS = 1024
"""Chunks are no smaller, whatever the budget: the traffic of the weight's gradient would come to
cost more than the products."""

_MIN_CHUNK_ROWS_OVER_BUDGET = 2048
"""Once no plan fits, smaller chunks would save little beside what cannot be saved."""

_TABLE_BYTES = 2 * 14 * 4 + 4 * 4
"""Result table, its copy with scaled derivatives, and partial statistics, per row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShape:
    """The sizes that memory depends on."""

    num_rows: int
    """Rows that enter the matrix products."""

    num_columns: int
    """This rank's columns of the vocabulary, as stored (see ``VocabShard.row_stride``)."""

    hidden_size: int
    """Width of a hidden state."""

    operand_bytes: int
    """Bytes of an element of hidden states, weight and gradient of logits."""

    logit_bytes: int
    """Bytes of an element of the logits."""

    num_ranks: int = 1
    """Tensor-parallel ranks."""

    is_copied: bool = True
    """Whether the rows are gathered from the hidden states, rather than being all of them."""

    has_duplicates: bool = False
    """Whether a hidden row is used several times."""

    num_sequence_rows: int = 0
    """Hidden rows of the whole sequence when ranks hold shares of it (sequence parallelism): it is
    gathered in the forward pass, and its gradient summed in float32 in the backward pass."""

    @property
    def is_in_place(self) -> bool:
        """Whether the gradient of the logits can overwrite the logits."""
        return self.logit_bytes == self.operand_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadPlan:
    """One call's mode and block sizes."""

    mode: Mode
    """What is kept for the backward pass."""

    chunk_rows: int
    """Rows whose gradient of logits is held at once."""

    logit_rows: int
    """Rows of logits held at once."""

    peak_bytes: int
    """Largest extra memory during forward and backward pass: all buffers of the head, without its
    inputs, and without the gradients that it returns or adds to."""

    budget_bytes: int
    """What was asked for; exceeded only when what cannot be saved already does so."""

    def describe(self) -> str:
        """Return one line for a log."""
        excess = "" if self.peak_bytes <= self.budget_bytes else ", OVER BUDGET"
        return (
            f"head: {self.mode}, {self.chunk_rows} rows a chunk, {self.logit_rows} rows of logits "
            f"at once, {self.peak_bytes / 1e9:.2f} of {self.budget_bytes / 1e9:.2f} GB{excess}"
        )


def row_stride(num_columns: int) -> int:
    """Return the elements from one row of a logits buffer to the next."""
    return -(-num_columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def plan_head(
    shape: HeadShape,
    *,
    mode: Mode | Literal["auto"] = "auto",
    memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    has_private_weight_grad: bool = True,
    is_weight_grad_summed: bool = True,
) -> HeadPlan:
    """Return the fastest plan within the budget, or the one with the smallest peak when none is.

    Args:
        shape: sizes of the call.
        mode: a mode to keep to; ``auto`` takes the first of save_dlogits, grad_in_forward and
            recompute that fits.
        memory_budget_bytes: extra memory that the head may use.
        has_private_weight_grad: ``grad_in_forward`` holds a float32 weight gradient of its own
            between the passes (it does unless it may write ``main_grad`` in the forward pass).
        is_weight_grad_summed: several chunks need a float32 weight gradient beside the returned
            one (they do unless ``main_grad`` takes the sum).

    Raises:
        ValueError: if the budget is not positive or the mode unknown.
    """
    if memory_budget_bytes <= 0:
        raise ValueError(f"head: memory_budget_bytes must be positive, got {memory_budget_bytes}")
    if mode not in (*MODES, "auto"):
        raise ValueError(f"head: mode must be auto or one of {MODES}, got {mode!r}")
    budget = memory_budget_bytes
    candidates = ("save_dlogits", "grad_in_forward", "recompute") if mode == "auto" else (mode,)
    allowances = (budget, has_private_weight_grad, is_weight_grad_summed)
    for candidate in candidates:
        plan = _plan(shape, candidate, *allowances, _MIN_CHUNK_ROWS)
        if plan.peak_bytes <= budget:
            return plan
    plans = [_plan(shape, name, *allowances, _MIN_CHUNK_ROWS_OVER_BUDGET) for name in candidates]
    return min(plans, key=lambda plan: plan.peak_bytes)


def _plan(
    shape: HeadShape,
    mode: Mode,
    budget_bytes: int,
    has_private_weight_grad: bool,
    is_weight_grad_summed: bool,
    min_chunk_rows: int,
) -> HeadPlan:
    """Return the plan of one mode with the largest chunks that fit, or with the smallest ones."""
    rows = max(shape.num_rows, 1)
    logit_row = shape.num_columns * shape.logit_bytes
    grad_row = shape.num_columns * shape.operand_bytes
    weight_bytes = 4 * shape.num_columns * shape.hidden_size
    fixed = shape.num_rows * _TABLE_BYTES
    if shape.is_copied:
        fixed += shape.num_rows * shape.hidden_size * shape.operand_bytes
    logit_rows = _round_rows(_LOGITS_SHARE * budget_bytes / max(logit_row, 1), rows)
    if mode == "no_grad":
        fixed += shape.num_sequence_rows * shape.hidden_size * shape.operand_bytes
        peak = fixed + min(logit_rows, shape.num_rows) * logit_row
        return HeadPlan(
            mode=mode,
            chunk_rows=logit_rows,
            logit_rows=logit_rows,
            peak_bytes=peak,
            budget_bytes=budget_bytes,
        )
    fixed += _hidden_grad_bytes(shape, mode)
    if mode == "grad_in_forward" and has_private_weight_grad:
        fixed += weight_bytes
    block = 0 if shape.is_in_place else logit_rows * logit_row
    chunk_rows = rows
    if mode != "save_dlogits":
        chunk_rows = _chunk_rows(budget_bytes - fixed - block, grad_row, rows, min_chunk_rows)
        if mode == "recompute" and chunk_rows < rows and is_weight_grad_summed:
            fixed += weight_bytes
            chunk_rows = _chunk_rows(budget_bytes - fixed - block, grad_row, rows, min_chunk_rows)
    if shape.is_in_place:
        logit_rows = chunk_rows
    logit_rows = min(logit_rows, chunk_rows)
    block = 0 if shape.is_in_place else logit_rows * logit_row
    return HeadPlan(
        mode=mode,
        chunk_rows=chunk_rows,
        logit_rows=logit_rows,
        peak_bytes=fixed + (block + chunk_rows * grad_row if shape.num_rows else 0),
        budget_bytes=budget_bytes,
    )


def _hidden_grad_bytes(shape: HeadShape, mode: Mode) -> int:
    """Return what the gradient of the rows takes beside the returned gradient."""
    row = shape.hidden_size * shape.operand_bytes
    if mode == "save_dlogits":  # in float32, and the rows times the loss's upstream gradient
        rows_bytes = shape.num_rows * (4 * shape.hidden_size + row)
    elif shape.num_ranks > 1 or shape.has_duplicates:  # in float32: something is added to it
        rows_bytes = shape.num_rows * 4 * shape.hidden_size
    else:
        rows_bytes = shape.num_rows * row if shape.is_copied else 0
    # With sequence parallelism, the whole sequence's and this rank's share, in float32.
    share = -(-shape.num_sequence_rows // shape.num_ranks)
    return rows_bytes + (shape.num_sequence_rows + share) * 4 * shape.hidden_size


def _chunk_rows(affordable_bytes: int, grad_row: int, rows: int, min_rows: int) -> int:
    """Return the rows of the largest of the even slices that the affordable bytes allow."""
    most = _round_rows(max(affordable_bytes / max(grad_row, 1), min_rows), rows)
    return max(part.stop - part.start for part in even_slices(0, rows, most))


def even_slices(start: int, stop: int, most: int) -> Iterator[slice]:
    """Cut rows into as few slices as ``most`` allows, equal up to one GEMM tile.

    A small slice at the end would read the whole weight for a few rows. When ``most`` is no
    multiple of a tile's height, slices are equal up to one row.
    """
    if stop <= start:
        return
    tile_rows = 1 if most % _ROW_MULTIPLE else _ROW_MULTIPLE
    num_tiles = -(-(stop - start) // tile_rows)
    num_slices = -(-(stop - start) // most)
    tiles, num_larger = divmod(num_tiles, num_slices)
    first = start
    for index in range(num_slices):
        rows = (tiles + (index < num_larger)) * tile_rows
        yield slice(first, min(first + rows, stop))
        first += rows


def _round_rows(affordable: float, rows: int) -> int:
    """Return the affordable rows as a multiple of a GEMM tile: at least one tile, at most all."""
    return min(rows, max(int(affordable) // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE)
