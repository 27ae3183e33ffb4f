"""The kernels of ``linear_logprob``: a product whose epilogue makes statistics of its rows.

Triton fuses the loops over column tiles and hidden tiles of ``row_statistics_kernel`` into one
(``flatten``), so that the next tile is on its way while the epilogue runs. For that the epilogue
stays free of branches around the accumulators: with one, ptxas serialises the matrix instructions
(C7514), and a branch that yields loop-carried values breaks Triton 3.6's fusion pass.

Shape suffixes: ``R`` rows of a tile, ``V`` its columns, ``H`` its hidden elements, ``S`` splits of
the vocabulary, 4 the partial statistics.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - Triton takes a kernel's types from its arguments
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# (a launch passes Python values for constexpr parameters, and options the kernel does not name)

import triton
import triton.language as tl

# No NaN here: a launch compares the globals with those it was compiled with, and NaN differs.
_NEG_INF = tl.constexpr(float("-inf"))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.0e38)
"""Stands for -inf where it would be multiplied by 0; above the lowest float32."""


@triton.jit
def _locate(item, num_row_blocks, num_splits, group_blocks):
    """Return row block and split of a work item; consecutive items share a split."""
    group = item // (group_blocks * num_splits)
    first_block = group * group_blocks
    num_blocks = min(num_row_blocks - first_block, group_blocks)
    within = item - first_block * num_splits
    return first_block + within % num_blocks, within // num_blocks


@triton.jit
def _store_statistics(pointers_R, field, mask_R, maximum_R, exp_sum_R, weighted_sum_R, target_R):
    """Write the statistics of a block of rows, whose fields are ``field`` elements apart."""
    # A row with NaN says so in its maximum too: a shard whose columns are all NaN would otherwise
    # look like one without columns, and be left out of the merge.
    maximum_R = tl.where(exp_sum_R != exp_sum_R, float("nan"), maximum_R)
    tl.store(pointers_R, maximum_R, mask=mask_R)
    tl.store(pointers_R + field, exp_sum_R, mask=mask_R)
    tl.store(pointers_R + 2 * field, weighted_sum_R, mask=mask_R)
    tl.store(pointers_R + 3 * field, target_R, mask=mask_R)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_columns",
        "vocab_start",
        "num_row_blocks",
        "num_splits",
        "tiles_per_split",
        "group_blocks",
    ]
)
def row_statistics_kernel(
    hidden_desc,  # [R, H], box [ROWS, HIDDEN]
    weight_desc,  # [V, H], true columns only, box [COLUMNS, HIDDEN]
    targets_ptr,  # [R] int64, token ids of the whole vocabulary
    partials_ptr,  # [S, 4, R] float32
    num_rows,
    num_columns,
    vocab_start,
    temperature,
    num_row_blocks,
    num_splits,
    tiles_per_split,
    group_blocks,
    HAS_TEMPERATURE: tl.constexpr,
    WIDEN: tl.constexpr,
    HIDDEN_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Multiply tiles and reduce each, while it is in registers, to statistics of its rows."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_items = tl.cdiv(num_row_blocks * num_splits - program, num_programs)
    maximum_R = tl.full([ROWS], _NEG_INF, tl.float32)
    exp_sum_R = tl.zeros([ROWS], tl.float32)
    weighted_sum_R = tl.zeros([ROWS], tl.float32)
    target_R = tl.full([ROWS], float("nan"), tl.float32)
    for step in tl.range(0, num_items * tiles_per_split, flatten=True):
        item = program + (step // tiles_per_split) * num_programs
        tile = step % tiles_per_split
        row_block, split = _locate(item, num_row_blocks, num_splits, group_blocks)
        row_start = row_block * ROWS
        column_start = (split * tiles_per_split + tile) * COLUMNS

        z_RV = tl.zeros([ROWS, COLUMNS], tl.float32)
        for hidden_tile in range(HIDDEN_TILES):
            hidden_RH = hidden_desc.load([row_start, hidden_tile * HIDDEN])
            weight_VH = weight_desc.load([column_start, hidden_tile * HIDDEN])
            if WIDEN:
                hidden_RH = hidden_RH.to(tl.float32)
                weight_VH = weight_VH.to(tl.float32)
            z_RV = tl.dot(hidden_RH, weight_VH.T, z_RV, input_precision="ieee")

        rows_R = row_start + tl.arange(0, ROWS)
        columns_V = tl.arange(0, COLUMNS)
        # Columns are counted from the tile's first one: that takes fewer instructions. Targets are
        # compared in 64 bits, since a row without one may hold any number.
        token_R = tl.load(targets_ptr + rows_R, mask=rows_R < num_rows, other=-1)
        token_R -= vocab_start + column_start.to(tl.int64)
        num_valid = min(num_columns - column_start, COLUMNS)
        is_ours_R = (token_R >= 0) & (token_R < num_valid)
        token_R = tl.where(is_ours_R, token_R, -1).to(tl.int32)

        if HAS_TEMPERATURE:
            z_RV = z_RV / temperature
        z_RV = tl.where((columns_V < num_valid)[None, :], z_RV, _NEG_INF)
        new_maximum_R = tl.maximum(maximum_R, tl.max(z_RV, 1))
        is_target_RV = columns_V[None, :] == token_R[:, None]
        target_R = tl.where(is_ours_R, tl.sum(tl.where(is_target_RV, z_RV, 0.0), 1), target_R)

        # -inf - -inf is NaN: rows that have seen nothing but -inf are centred on 0.
        centre_R = tl.where(new_maximum_R == _NEG_INF, 0.0, new_maximum_R)
        shift_R = tl.where(maximum_R == _NEG_INF, 0.0, maximum_R - centre_R)
        decay_R = tl.exp2(shift_R * _LOG2_E)
        centred_RV = z_RV - centre_R[:, None]
        # exp2 is one instruction, exp several (it keeps denormals, which are lost in the sum). Not
        # of the bounded value: the bound would turn NaN into a number.
        exp_RV = tl.exp2(centred_RV * _LOG2_E)
        weighted_RV = exp_RV * tl.maximum(centred_RV, _LOWEST)
        weighted_sum_R = (weighted_sum_R + exp_sum_R * shift_R) * decay_R + tl.sum(weighted_RV, 1)
        exp_sum_R = exp_sum_R * decay_R + tl.sum(exp_RV, 1)
        maximum_R = new_maximum_R

        is_last = tile == tiles_per_split - 1
        if is_last:
            field = num_rows.to(tl.int64)
            pointers_R = partials_ptr + split.to(tl.int64) * 4 * field + rows_R
            mask_R = rows_R < num_rows
            _store_statistics(
                pointers_R, field, mask_R, maximum_R, exp_sum_R, weighted_sum_R, target_R
            )
        maximum_R = tl.where(is_last, _NEG_INF, maximum_R)
        exp_sum_R = tl.where(is_last, 0.0, exp_sum_R)
        weighted_sum_R = tl.where(is_last, 0.0, weighted_sum_R)
        target_R = tl.where(is_last, float("nan"), target_R)


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def merge_splits_kernel(
    partials_ptr,  # [S, 4, R] float32
    merged_ptr,  # [4, R] float32
    num_splits,
    num_rows,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merge the splits' statistics of a block of rows."""
    rows_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    splits_S = tl.arange(0, SPLITS)
    mask_R = rows_R < num_rows
    mask_SR = (splits_S < num_splits)[:, None] & mask_R[None, :]
    field = num_rows.to(tl.int64)
    pointers_SR = partials_ptr + splits_S[:, None] * 4 * field + rows_R[None, :]
    maxima_SR = tl.load(pointers_SR, mask=mask_SR, other=_NEG_INF)
    exp_sums_SR = tl.load(pointers_SR + field, mask=mask_SR, other=0.0)
    weighted_sums_SR = tl.load(pointers_SR + 2 * field, mask=mask_SR, other=0.0)
    targets_SR = tl.load(pointers_SR + 3 * field, mask=mask_SR, other=float("nan"))

    maximum_R = tl.max(maxima_SR, 0)
    # The sums of a split without a possible token are 0, whatever they are multiplied by.
    centre_R = tl.where(maximum_R == _NEG_INF, 0.0, maximum_R)
    shift_SR = tl.where(maxima_SR == _NEG_INF, 0.0, maxima_SR - centre_R[None, :])
    decay_SR = tl.exp(shift_SR)
    exp_sum_R = tl.sum(exp_sums_SR * decay_SR, 0)
    weighted_sum_R = tl.sum(decay_SR * (weighted_sums_SR + exp_sums_SR * shift_SR), 0)
    is_found_SR = targets_SR == targets_SR
    target_R = tl.sum(tl.where(is_found_SR, targets_SR, 0.0), 0)
    target_R = tl.where(tl.max(is_found_SR.to(tl.int32), 0) > 0, target_R, float("nan"))
    _store_statistics(
        merged_ptr + rows_R, field, mask_R, maximum_R, exp_sum_R, weighted_sum_R, target_R
    )
