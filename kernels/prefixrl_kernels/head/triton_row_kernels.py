"""The Triton kernels of ``triton_rows``: one row, or a few, per program, in a fixed order.

Offsets of rows are 64-bit, because rows x columns passes 2^31 at 16k rows. No global is NaN: a
launch compares the globals with those it was compiled with, and NaN differs from itself.

Shape suffixes: ``R`` rows, ``V`` columns as stored, ``W`` tensor-parallel ranks, ``K`` table
fields, ``T`` hidden rows, ``U`` different hidden rows, ``H`` hidden size.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - Triton takes a kernel's types from its arguments
# pyright: reportGeneralTypeIssues=false
# (a function with a store looks to pyright like one that never returns)

import triton
import triton.language as tl

from prefixrl_kernels.head import table
from prefixrl_kernels.head.estimators import IMPORTANCES, KLS, MAX_LOG_RATIO, SERIES_BELOW

_NEG_INF = tl.constexpr(float("-inf"))
_BOUND = tl.constexpr(MAX_LOG_RATIO)
_SERIES_BELOW = tl.constexpr(SERIES_BELOW)

_MAXIMUM = tl.constexpr(table.MAXIMUM)
_LOG_SUM = tl.constexpr(table.LOG_SUM)
_LOGPROB = tl.constexpr(table.LOGPROB)
_ENTROPY = tl.constexpr(table.ENTROPY)
_RATIO = tl.constexpr(table.RATIO)
_K1 = tl.constexpr(table.K1)
_K3 = tl.constexpr(table.K3)
_REFERENCE_K1 = tl.constexpr(table.REFERENCE_K1)
_REFERENCE_K3 = tl.constexpr(table.REFERENCE_K3)
_IS_CLIPPED = tl.constexpr(table.IS_CLIPPED)
_IS_EXTREME = tl.constexpr(table.IS_EXTREME)
_LOSS = tl.constexpr(table.LOSS)
_LOGPROB_GRAD = tl.constexpr(table.LOGPROB_GRAD)
_ENTROPY_GRAD = tl.constexpr(table.ENTROPY_GRAD)

_NONE = tl.constexpr(IMPORTANCES.index("none"))
_TRUNCATED = tl.constexpr(IMPORTANCES.index("truncated"))
_MASKED = tl.constexpr(IMPORTANCES.index("masked"))
_PPO_CLIP = tl.constexpr(IMPORTANCES.index("ppo_clip"))
_KL_K1 = tl.constexpr(KLS.index("k1"))
_KL_K2 = tl.constexpr(KLS.index("k2"))
_KL_K3 = tl.constexpr(KLS.index("k3"))


@triton.jit
def _accumulate(maximum, exp_sum, weighted_sum, z_V):
    """Take another block of logits into a row's online statistics.

    The weighted sum is kept centred on the running maximum, so that the entropy does not cancel
    at large logits. Blocks without a finite logit leave everything as it was.
    """
    new_maximum = tl.maximum(maximum, tl.max(z_V, 0))
    shift = tl.where(new_maximum == _NEG_INF, 0.0, new_maximum)
    delta = tl.where(maximum == _NEG_INF, 0.0, maximum - shift)
    decay = tl.exp(delta)
    centred_V = z_V - shift
    exp_V = tl.exp(centred_V)
    weighted_V = exp_V * tl.where(centred_V == _NEG_INF, 0.0, centred_V)
    weighted_sum = decay * (weighted_sum + exp_sum * delta) + tl.sum(weighted_V, 0)
    exp_sum = exp_sum * decay + tl.sum(exp_V, 0)
    return new_maximum, exp_sum, weighted_sum


@triton.jit
def _load_logits(row_ptr, columns_V, row_stride, num_columns):
    """Return a block of a row in float32, -inf beyond the true columns.

    The load is bounded by the stride, which is aligned, and not by the number of columns, which may
    be odd: only so is it a vector load. What lies between is read and thrown away.
    """
    z_V = tl.load(row_ptr + columns_V, mask=columns_V < row_stride, other=_NEG_INF)
    return tl.where(columns_V < num_columns, z_V.to(tl.float32), _NEG_INF)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "vocab_start"])
def statistics_kernel(
    logits_ptr,  # [R, V], rows `row_stride` apart
    targets_ptr,  # [R] int64
    partials_ptr,  # [4, R] float32
    num_rows,
    row_stride,
    num_columns,
    vocab_start,
    temperature,
    HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce one row to maximum, two sums and the target's logit."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    maximum = _NEG_INF
    exp_sum = 0.0
    weighted_sum = 0.0
    for start in range(0, num_columns, BLOCK):
        columns_V = start + tl.arange(0, BLOCK)
        z_V = _load_logits(row_ptr, columns_V, row_stride, num_columns)
        if HAS_TEMPERATURE:
            z_V = z_V / temperature
        maximum, exp_sum, weighted_sum = _accumulate(maximum, exp_sum, weighted_sum, z_V)
    column = tl.load(targets_ptr + row) - vocab_start
    is_local = (column >= 0) & (column < num_columns)
    target = tl.load(row_ptr + column, mask=is_local, other=float("nan")).to(tl.float32)
    if HAS_TEMPERATURE:
        target = target / temperature
    # A row with NaN says so in its maximum too: the maximum of nothing but NaN may come out as
    # -inf, and the merge would leave the shard out as one without columns.
    maximum = tl.where(exp_sum != exp_sum, float("nan"), maximum)
    tl.store(partials_ptr + row, maximum)
    tl.store(partials_ptr + num_rows + row, exp_sum)
    tl.store(partials_ptr + 2 * num_rows + row, weighted_sum)
    tl.store(partials_ptr + 3 * num_rows + row, target)


@triton.jit(do_not_specialize=["num_ranks", "num_rows", "field_stride"])
def merge_kernel(
    partials_ptr,  # [W, 4, R] float32
    table_ptr,  # [K, R] float32, fields `field_stride` apart
    num_ranks,
    num_rows,
    field_stride,
    BLOCK: tl.constexpr,
):
    """Merge the shards' statistics of a few rows, in rank order."""
    rows_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_R = rows_R < num_rows
    maximum_R = tl.full([BLOCK], _NEG_INF, tl.float32)
    for rank in range(num_ranks):
        rank_ptr = partials_ptr + rank * 4 * num_rows + rows_R
        maximum_R = tl.maximum(maximum_R, tl.load(rank_ptr, mask=mask_R, other=0.0))
    exp_sum_R = tl.zeros([BLOCK], tl.float32)
    weighted_sum_R = tl.zeros([BLOCK], tl.float32)
    target_R = tl.full([BLOCK], float("nan"), tl.float32)
    for rank in range(num_ranks):
        rank_ptr = partials_ptr + rank * 4 * num_rows + rows_R
        rank_maximum_R = tl.load(rank_ptr, mask=mask_R, other=0.0)
        rank_sum_R = tl.load(rank_ptr + num_rows, mask=mask_R, other=1.0)
        rank_weighted_R = tl.load(rank_ptr + 2 * num_rows, mask=mask_R, other=0.0)
        rank_target_R = tl.load(rank_ptr + 3 * num_rows, mask=mask_R, other=0.0)
        is_empty_R = rank_maximum_R == _NEG_INF
        shift_R = tl.where(is_empty_R, 0.0, rank_maximum_R - maximum_R)
        decay_R = tl.where(is_empty_R, 0.0, tl.exp(shift_R))
        exp_sum_R += rank_sum_R * decay_R
        weighted_sum_R += decay_R * (rank_weighted_R + rank_sum_R * shift_R)
        target_R = tl.where(target_R != target_R, rank_target_R, target_R)
    log_sum_R = tl.log(exp_sum_R)
    table_ptr += rows_R
    tl.store(table_ptr + _MAXIMUM * field_stride, maximum_R, mask=mask_R)
    tl.store(table_ptr + _LOG_SUM * field_stride, log_sum_R, mask=mask_R)
    logprob_R = (target_R - maximum_R) - log_sum_R
    tl.store(table_ptr + _LOGPROB * field_stride, logprob_R, mask=mask_R)
    entropy_R = log_sum_R - weighted_sum_R / exp_sum_R
    tl.store(table_ptr + _ENTROPY * field_stride, entropy_R, mask=mask_R)


@triton.jit
def _clamp(values, low, high):
    """Bound values from both sides; NaN stays NaN."""
    return tl.where(values < low, low, tl.where(values > high, high, values))


@triton.jit
def _k3(x_R):
    """Return ``exp(x) - 1 - x`` and ``exp(x) - 1``, with x bounded inside ``exp``."""
    tail_R = x_R * x_R * (0.5 + x_R * (1.0 / 6.0 + x_R * (1.0 / 24.0 + x_R / 120.0)))
    is_small_R = tl.abs(x_R) < _SERIES_BELOW
    exp_R = tl.exp(_clamp(x_R, -_BOUND, _BOUND))
    k3_R = tl.where(is_small_R, tail_R, exp_R - 1.0 - x_R)
    return k3_R, tl.where(is_small_R, x_R + tail_R, exp_R - 1.0)


@triton.jit
def _importance_terms(
    logprob_R,
    ratio_R,
    is_extreme_R,
    advantage_R,
    min_importance,
    max_importance,
    clip_low,
    clip_high,
    IMPORTANCE: tl.constexpr,
):
    """Return each row's factor on the logprob, its loss, and whether it was clipped."""
    low = 1.0 - clip_low
    high = 1.0 + clip_high
    if IMPORTANCE == _PPO_CLIP:
        unclipped_R = ratio_R * advantage_R
        clipped_R = _clamp(ratio_R, low, high) * advantage_R
        is_clipped_R = clipped_R < unclipped_R
        factor_R = tl.where(is_clipped_R | is_extreme_R, 0.0, unclipped_R)
        loss_R = -tl.where(is_clipped_R, clipped_R, unclipped_R)
    else:
        if IMPORTANCE == _NONE:
            is_clipped_R = ratio_R < 0.0  # never: a ratio is positive
            factor_R = advantage_R
        elif IMPORTANCE == _TRUNCATED:
            is_clipped_R = ratio_R > max_importance
            factor_R = advantage_R * tl.where(is_clipped_R, max_importance, ratio_R)
        elif IMPORTANCE == _MASKED:
            is_clipped_R = (ratio_R < min_importance) | (ratio_R > max_importance)
            factor_R = advantage_R * tl.where(is_clipped_R, 0.0, ratio_R)
        else:
            is_clipped_R = (ratio_R < low) | (ratio_R > high)
            factor_R = advantage_R * _clamp(ratio_R, low, high)
        # A factor of zero takes the row out even where its logprob is -inf; NaN stays NaN.
        is_out_R = (factor_R == 0.0) & (logprob_R == logprob_R)
        loss_R = tl.where(is_out_R, 0.0, -factor_R * logprob_R)
    return factor_R, loss_R, is_clipped_R


@triton.jit(do_not_specialize=["num_rows", "field_stride"])
def weigh_kernel(
    table_ptr,  # [K, R] float32, fields `field_stride` apart
    advantages_ptr,  # [R] float32
    weights_ptr,  # [R] float32, unread without HAS_WEIGHTS; the next two likewise
    rollout_ptr,
    reference_ptr,
    num_rows,
    field_stride,
    num_global_loss_tokens,
    min_importance,
    max_importance,
    clip_low,
    clip_high,
    kl_coefficient,
    entropy_coefficient,
    IMPORTANCE: tl.constexpr,
    KL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute loss, derivatives and statistics of a few rows."""
    rows_R = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_R = rows_R < num_rows
    table_ptr += rows_R
    logprob_R = tl.load(table_ptr + _LOGPROB * field_stride, mask=mask_R, other=0.0)
    entropy_R = tl.load(table_ptr + _ENTROPY * field_stride, mask=mask_R, other=0.0)
    advantage_R = tl.load(advantages_ptr + rows_R, mask=mask_R, other=0.0)
    weight_R = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_WEIGHTS:
        weight_R = tl.load(weights_ptr + rows_R, mask=mask_R, other=0.0)
    scale_R = weight_R / num_global_loss_tokens

    log_ratio_R = tl.zeros([BLOCK], tl.float32)
    if HAS_ROLLOUT:
        log_ratio_R = logprob_R - tl.load(rollout_ptr + rows_R, mask=mask_R, other=0.0)
    gap_R = tl.zeros([BLOCK], tl.float32)
    if HAS_REFERENCE:
        gap_R = logprob_R - tl.load(reference_ptr + rows_R, mask=mask_R, other=0.0)
    ratio_R = tl.exp(_clamp(log_ratio_R, -_BOUND, _BOUND))
    is_extreme_R = tl.abs(log_ratio_R) > _BOUND
    factor_R, loss_R, is_clipped_R = _importance_terms(
        logprob_R,
        ratio_R,
        is_extreme_R,
        advantage_R,
        min_importance,
        max_importance,
        clip_low,
        clip_high,
        IMPORTANCE,
    )
    is_far_R = tl.abs(gap_R) > _BOUND
    k3_R, _ = _k3(log_ratio_R)
    reference_k3_R, reference_expm1_R = _k3(-gap_R)
    if KL == _KL_K1:
        loss_R += kl_coefficient * gap_R
        factor_R -= kl_coefficient
    if KL == _KL_K2:
        loss_R += kl_coefficient * (gap_R * gap_R / 2.0)
        factor_R -= kl_coefficient * gap_R
    if KL == _KL_K3:
        loss_R += kl_coefficient * reference_k3_R
        factor_R -= kl_coefficient * tl.where(is_far_R, 1.0, -reference_expm1_R)
    if entropy_coefficient != 0.0:
        loss_R -= entropy_coefficient * entropy_R

    tl.store(table_ptr + _RATIO * field_stride, ratio_R, mask=mask_R)
    tl.store(table_ptr + _K1 * field_stride, -log_ratio_R, mask=mask_R)
    tl.store(table_ptr + _K3 * field_stride, k3_R, mask=mask_R)
    tl.store(table_ptr + _REFERENCE_K1 * field_stride, gap_R, mask=mask_R)
    tl.store(table_ptr + _REFERENCE_K3 * field_stride, reference_k3_R, mask=mask_R)
    tl.store(table_ptr + _IS_CLIPPED * field_stride, is_clipped_R.to(tl.float32), mask=mask_R)
    is_extreme_R = is_extreme_R | is_far_R
    tl.store(table_ptr + _IS_EXTREME * field_stride, is_extreme_R.to(tl.float32), mask=mask_R)
    # A row of weight zero is out of the loss even where its logprob is -inf; NaN stays NaN.
    is_out_R = (scale_R == 0.0) & (logprob_R == logprob_R)
    loss_R = tl.where(is_out_R, 0.0, scale_R * loss_R)
    tl.store(table_ptr + _LOSS * field_stride, loss_R, mask=mask_R)
    grad_R = tl.where(is_out_R, 0.0, -scale_R * factor_R)
    tl.store(table_ptr + _LOGPROB_GRAD * field_stride, grad_R, mask=mask_R)
    entropy_grad_R = -scale_R * entropy_coefficient
    tl.store(table_ptr + _ENTROPY_GRAD * field_stride, entropy_grad_R, mask=mask_R)


@triton.jit(do_not_specialize=["field_stride", "num_columns", "vocab_start"])
def grad_logits_kernel(
    logits_ptr,  # [R, V], rows `row_stride` apart
    out_ptr,  # [R, V], rows `out_stride` apart; may be logits_ptr
    table_ptr,  # [K, R] float32, fields `field_stride` apart
    targets_ptr,  # [R] int64
    row_stride,
    out_stride,
    field_stride,
    num_columns,
    num_written_columns,
    vocab_start,
    temperature,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn a block of one row's logits into the derivative of the loss."""
    row = tl.program_id(0).to(tl.int64)
    columns_V = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_true_V = columns_V < num_columns
    table_ptr += row
    maximum = tl.load(table_ptr + _MAXIMUM * field_stride)
    log_sum = tl.load(table_ptr + _LOG_SUM * field_stride)
    grad = tl.load(table_ptr + _LOGPROB_GRAD * field_stride)
    column = tl.load(targets_ptr + row) - vocab_start
    z_V = _load_logits(logits_ptr + row * row_stride, columns_V, row_stride, num_columns)
    if HAS_TEMPERATURE:
        z_V = z_V / temperature
    logprob_V = z_V - maximum - log_sum
    probability_V = tl.exp(logprob_V)
    grad_V = -grad * probability_V
    if HAS_ENTROPY_GRAD:
        entropy = tl.load(table_ptr + _ENTROPY * field_stride)
        entropy_grad = tl.load(table_ptr + _ENTROPY_GRAD * field_stride)
        surprise_V = tl.where(logprob_V == _NEG_INF, 0.0, logprob_V + entropy)
        grad_V -= entropy_grad * probability_V * surprise_V
    grad_V += tl.where(columns_V == column, grad, 0.0)
    if HAS_TEMPERATURE:
        grad_V = grad_V / temperature
    grad_V = tl.where(is_true_V, grad_V, 0.0)
    out_ptr += row * out_stride + columns_V
    tl.store(out_ptr, grad_V.to(out_ptr.dtype.element_ty), mask=columns_V < num_written_columns)


@triton.jit
def scatter_kernel(
    grad_ptr,  # [R, H] float32, contiguous
    out_ptr,  # [T, H], rows `out_stride` apart
    scale_ptr,  # [] float32
    unique_rows_ptr,  # [U] int64
    members_ptr,  # [R] int64
    starts_ptr,  # [U + 1] int64
    out_stride,
    hidden_size,
    BLOCK: tl.constexpr,
):
    """Add the gradients of one hidden row's uses up, in order."""
    segment = tl.program_id(0)
    columns_H = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_H = columns_H < hidden_size
    sum_H = tl.zeros([BLOCK], tl.float32)
    first = tl.load(starts_ptr + segment)
    end = tl.load(starts_ptr + segment + 1)
    for position in range(first, end):
        member = tl.load(members_ptr + position)
        sum_H += tl.load(grad_ptr + member * hidden_size + columns_H, mask=mask_H, other=0.0)
    sum_H *= tl.load(scale_ptr)
    out_ptr += tl.load(unique_rows_ptr + segment) * out_stride + columns_H
    tl.store(out_ptr, sum_H.to(out_ptr.dtype.element_ty), mask=mask_H)
