"""Logprobs and entropies of given rows, whose logits never reach memory. No gradient.

A matrix product on tensor cores whose epilogue keeps, per row, the online statistics of the
softmax, in place of storing the product. What it writes is [S, 4, R] float32, for at most 128
splits S of the vocabulary, merged in order by a second kernel; no atomics.

* **Work.** A work item is a block of rows and a split of the vocabulary. One program per
  multiprocessor takes every ``num_programs``-th item and walks the column tiles of its split. Items
  are numbered so that the programs running at one time share few row blocks, which stay in the L2
  cache, and sweep the same part of the vocabulary: the weight is read from memory once per group
  of row blocks, not once per row block.
* **Order of summation.** How the vocabulary is cut depends on its size and on the tiles alone. So
  a row's result does not depend, bitwise, on the other rows of the call or on how many there are.

Shape suffixes: ``R`` rows, ``V`` columns of the vocabulary, ``H`` hidden size, ``S`` splits, 4 the
partial statistics.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes Python values for constexpr parameters, and options the kernel does not name)

from dataclasses import dataclass

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prefixrl_kernels.head import checks
from prefixrl_kernels.head.reference import merge_partials
from prefixrl_kernels.head.triton_linear import merge_splits_kernel, row_statistics_kernel
from prefixrl_kernels.head.vocab import VocabShard, gather_partials

_DTYPES = (torch.bfloat16, torch.float32)

_ALIGNMENT_BYTES = 16
"""What a tensor descriptor asks of its address and of its row stride."""

_MAX_SPLITS = 128
"""Enough to fill every multiprocessor from a few blocks of rows on, while at most 1/128 of the
tiles is outside of the vocabulary; the partial statistics take 2 KiB per row."""

_L2_BYTES = 16 * 1024**2
"""Share of the L2 cache (50 MB, in two halves, on an H100) for the rows being worked on."""

_MERGE_ELEMENTS = 4096
"""Rows times splits of a program that merges splits."""

_INTERPRETED_PROGRAMS = 3
"""Programs without a GPU: few, so that each has several work items."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """Tiles of the product and resources of a program.

    ``columns`` and ``num_splits`` set the order of summation: other values, other last bits.
    """

    rows: int
    """Rows of a tile; a power of two, at least 16."""

    columns: int
    """Columns of a tile; a power of two from 16 to 256, the widest box of a descriptor."""

    hidden: int
    """Hidden elements per step of the product; a power of two, at least 16."""

    num_warps: int
    """Warps of a program; 32 threads each."""

    num_stages: int
    """Steps of the product whose operands are in shared memory or on their way."""

    num_splits: int | None = None
    """Most splits of the vocabulary; None: 128. Fewer where there are fewer column tiles."""

    def __post_init__(self) -> None:
        """Refuse what no kernel can be compiled for."""
        for name, size, most in (
            ("rows", self.rows, 1024),
            ("columns", self.columns, 256),
            ("hidden", self.hidden, 1024),
        ):
            if not 16 <= size <= most or size & (size - 1):
                raise ValueError(
                    f"TileConfig.{name} must be a power of two from 16 to {most}, got {size}"
                )
        num_splits = 1 if self.num_splits is None else self.num_splits
        if min(self.num_warps, self.num_stages, num_splits) < 1:
            raise ValueError(
                f"TileConfig: num_warps, num_stages and num_splits must be at least 1, got {self}"
            )


# Fixed: autotuning would choose the order of summation by a clock. From the compiler's report for
# an H100 (tests/kernels/test_linear_logprob_compiles.py): no spilled register, and as many stages
# as shared memory holds.
_LARGE = TileConfig(rows=128, columns=256, hidden=64, num_warps=8, num_stages=4)
_SMALL = TileConfig(rows=64, columns=64, hidden=32, num_warps=8, num_stages=3)


def linear_logprob_forward(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float = 1.0,
    true_vocab_size: int,
    vocab_start: int = 0,
    tp_group: dist.ProcessGroup | None = None,
    tiles: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logprob of each row's target and the entropy of each row, without gradients.

    With ``z = hidden @ weight.T / temperature``, accumulated and divided in float32, and ``p =
    softmax(z)`` over the columns below ``true_vocab_size``: ``log p[target]`` and ``-sum(p log
    p)``. No logit is ever stored; the extra memory is 2 KiB per row. A row's result does not
    depend on the other rows. NaN and +inf among a row's logits give NaN in that row; -inf is a
    token that cannot occur.

    All ranks of ``tp_group`` must call this, with equal ``hidden_RH`` and ``targets_R``; the
    result is bitwise equal on all of them.

    Args:
        hidden_RH: [R, H] bfloat16 or float32; R may be 0. Copied if a row does not start
            at a multiple of 16 bytes or is not contiguous.
        weight_VH: [V, H] of the same dtype, this rank's rows of the output embedding. Never
            copied: its rows must be contiguous and start at multiples of 16 bytes.
        targets_R: [R] int64 token ids in the whole vocabulary; NaN is the logprob of an id that is
            not below ``true_vocab_size``.
        temperature: divides the logits; positive.
        true_vocab_size: tokens of the vocabulary; rows of the embedding from there on are padding.
        vocab_start: token id of the first row of ``weight_VH``.
        tp_group: ranks that share the vocabulary; None when ``weight_VH`` is all of it.
        tiles: None for the device's own.

    Returns:
        logprobs_R: [R] float32, nats.
        entropies_R: [R] float32, nats.

    Raises:
        ValueError: if shapes, dtypes, devices or ranges do not fit, or the weight is laid out so
            that only a copy of it could be used.
    """
    checks.check_operands("linear_logprob_forward", hidden_RH, weight_VH)
    checks.check_vocabulary("linear_logprob_forward", temperature, true_vocab_size, vocab_start)
    _check_kernel_arguments(hidden_RH, weight_VH, targets_R)
    shard = VocabShard.build(
        num_columns=weight_VH.size(0), start=vocab_start, true_vocab_size=true_vocab_size
    )
    partials_4R = fused_row_statistics(
        hidden_RH,
        weight_VH,
        targets_R,
        num_true_columns=shard.num_true_columns,
        vocab_start=vocab_start,
        temperature=float(temperature),
        tiles=tiles,
    )
    _, _, logprobs_R, entropies_R = merge_partials(gather_partials(partials_4R, tp_group))
    return logprobs_R, entropies_R


@torch.no_grad()
def fused_row_statistics(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    num_true_columns: int,
    vocab_start: int,
    temperature: float,
    tiles: TileConfig | None = None,
) -> Tensor:
    """Return one vocabulary shard's statistics of each row, from hidden states and weight.

    Args:
        hidden_RH: [R, H], see ``linear_logprob_forward``.
        weight_VH: [V, H], see there; checked there.
        targets_R: [R] int64 token ids in the whole vocabulary.
        num_true_columns: columns that are tokens, the first ones of the shard; may be 0.
        vocab_start: token id of the first column.
        temperature: divides the logits.
        tiles: None for the device's own.

    Returns:
        [4, R] float32: maximum, sum of ``exp(z - maximum)``, sum of ``exp(z - maximum) (z -
        maximum)``, and the target's logit or NaN when the target is not in this shard. All four
        but the last are NaN in a row with a logit that is NaN or +inf. A shard without true
        columns gives (-inf, 0, 0, NaN).
    """
    num_rows, hidden_size = hidden_RH.shape
    partials_4R = torch.empty((4, num_rows), dtype=torch.float32, device=hidden_RH.device)
    if num_rows == 0:
        return partials_4R
    if num_true_columns == 0:
        empty_4 = torch.tensor([float("-inf"), 0.0, 0.0, float("nan")], device=hidden_RH.device)
        return partials_4R.copy_(empty_4[:, None])

    tiles = tiles or default_tiles(hidden_RH.dtype, hidden_RH.device)
    hidden_RH = _describable(hidden_RH)
    num_row_blocks = _ceil_div(num_rows, tiles.rows)
    tiles_per_split, num_splits = split_columns(num_true_columns, tiles)
    row_block_bytes = tiles.rows * hidden_size * hidden_RH.element_size()
    partials_S4R = partials_4R.new_empty((num_splits, 4, num_rows))
    with torch.cuda.device_of(hidden_RH):
        num_programs = min(_num_multiprocessors(hidden_RH.device), num_row_blocks * num_splits)
        row_statistics_kernel[(num_programs,)](
            _descriptor(hidden_RH, num_rows, (tiles.rows, tiles.hidden)),
            # Padding is outside of the descriptor: it is not even read.
            _descriptor(weight_VH, num_true_columns, (tiles.columns, tiles.hidden)),
            targets_R.contiguous(),
            partials_S4R,
            num_rows,
            num_true_columns,
            vocab_start,
            temperature,
            num_row_blocks,
            num_splits,
            tiles_per_split,
            _group_blocks(num_row_blocks, row_block_bytes),
            HAS_TEMPERATURE=temperature != 1.0,
            # Triton 3.6's interpreter multiplies the bit patterns of bfloat16 numbers. In float32
            # the products are the same.
            WIDEN=_is_interpreted(),
            HIDDEN_TILES=_ceil_div(hidden_size, tiles.hidden),
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            HIDDEN=tiles.hidden,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        if num_splits == 1:
            return partials_S4R[0]
        split_block = triton.next_power_of_2(num_splits)
        merge_rows = max(_MERGE_ELEMENTS // split_block, 1)
        merge_splits_kernel[(_ceil_div(num_rows, merge_rows),)](
            partials_S4R, partials_4R, num_splits, num_rows, SPLITS=split_block, ROWS=merge_rows
        )
    return partials_4R


def default_tiles(dtype: torch.dtype, device: torch.device) -> TileConfig:
    """Return the tiles for operands of ``dtype`` on ``device``; a CPU gets those of an H100."""
    has_room = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    return _LARGE if has_room and dtype != torch.float32 else _SMALL


def split_columns(num_columns: int, tiles: TileConfig) -> tuple[int, int]:
    """Return column tiles per split and number of splits; the same for any number of rows."""
    num_tiles = _ceil_div(num_columns, tiles.columns)
    tiles_per_split = _ceil_div(num_tiles, min(tiles.num_splits or _MAX_SPLITS, num_tiles))
    return tiles_per_split, _ceil_div(num_tiles, tiles_per_split)


def _group_blocks(num_row_blocks: int, row_block_bytes: int) -> int:
    """Return how many row blocks are worked on together: as many as stay in the L2 cache."""
    most = max(_L2_BYTES // row_block_bytes, 1)
    return _ceil_div(num_row_blocks, _ceil_div(num_row_blocks, most))


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_interpreted() -> bool:
    return not isinstance(row_statistics_kernel, triton.JITFunction)


def _descriptor(values: Tensor, num_rows: int, box: tuple[int, int]) -> TensorDescriptor:
    """Describe the first rows of a matrix; what lies outside is read as 0."""
    shape = [num_rows, values.size(1)]
    return TensorDescriptor(values, shape, [values.stride(0), 1], list(box))


def _is_describable(values: Tensor) -> bool:
    """Whether a descriptor can address the rows of ``values``."""
    row_bytes = values.stride(0) * values.element_size()
    return (
        values.stride(1) == 1
        and values.stride(0) >= values.size(1)
        and row_bytes % _ALIGNMENT_BYTES == 0
        and values.data_ptr() % _ALIGNMENT_BYTES == 0
    )


def _describable(values_RH: Tensor) -> Tensor:
    """Return the rows where a descriptor can address them: as they are, or a copy."""
    if _is_describable(values_RH):
        return values_RH
    multiple = _ALIGNMENT_BYTES // values_RH.element_size()
    width = _ceil_div(values_RH.size(1), multiple) * multiple
    return values_RH.new_empty((values_RH.size(0), width))[:, : values_RH.size(1)].copy_(values_RH)


def _check_kernel_arguments(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> None:
    """Refuse what this kernel cannot take, though ``head_logprobs`` may."""
    name = "linear_logprob_forward"
    remedy = "use head_logprobs, which takes any layout and dtype in chunks of logits"
    if hidden_RH.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: expected bfloat16 or float32 operands, got {hidden_RH.dtype}; {remedy}"
        )
    if targets_R.dtype != torch.int64 or targets_R.shape != hidden_RH.shape[:1]:
        raise ValueError(
            f"{name}: expected targets [{hidden_RH.size(0)}] int64, one per row, got "
            f"{tuple(targets_R.shape)} {targets_R.dtype}"
        )
    if targets_R.device != hidden_RH.device:
        raise ValueError(
            f"{name}: targets are on {targets_R.device} and the hidden states on "
            f"{hidden_RH.device}; put them on one device"
        )
    if not (hidden_RH.is_cuda or _is_interpreted()):
        raise ValueError(
            f"{name}: expected CUDA tensors, got {hidden_RH.device} ones; {remedy}, or set "
            "TRITON_INTERPRET=1 before the first import of triton, for tests"
        )
    if not _is_describable(weight_VH):
        raise ValueError(
            f"{name}: expected a weight whose rows are contiguous and start at multiples of "
            f"{_ALIGNMENT_BYTES} bytes, got shape {tuple(weight_VH.shape)}, strides "
            f"{weight_VH.stride()} of {weight_VH.dtype} at an address that is "
            f"{weight_VH.data_ptr() % _ALIGNMENT_BYTES} modulo {_ALIGNMENT_BYTES}; it is not "
            f"copied silently, because of its size: {remedy}"
        )
