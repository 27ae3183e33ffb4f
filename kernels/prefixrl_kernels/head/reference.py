"""The row kernels in plain PyTorch: the path without a GPU, and what Triton is compared with.

Computes in float32, or in float64 when it is given float64. Shape suffixes: ``R`` rows, ``V``
columns as stored, ``W`` tensor-parallel ranks, ``K`` table fields, ``T`` hidden rows, ``H`` hidden
size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from prefixrl_kernels.head import table
from prefixrl_kernels.head.estimators import MAX_LOG_RATIO, SERIES_BELOW, Estimator
from prefixrl_kernels.head.matmul import wide_dtype
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.row_kernels import LossInputs
from prefixrl_kernels.head.vocab import VocabShard
from prefixrl_kernels.head_plan import CPU_ELEMENTS_AT_ONCE

_NEG_INF = float("-inf")


class TorchRows:
    """Row kernels made of PyTorch operations, for any device and dtype."""

    def statistics(
        self, logits_RV: Tensor, targets_R: Tensor, *, shard: VocabShard, temperature: float
    ) -> Tensor:
        """Return this shard's [4, R] partial statistics."""
        dtype = wide_dtype(logits_RV.dtype)
        partials_4R = torch.empty((4, logits_RV.size(0)), dtype=dtype, device=logits_RV.device)
        for rows in _row_slices(logits_RV):
            columns_RV = logits_RV[rows, : shard.num_true_columns].to(dtype)
            z_RV = columns_RV / temperature if temperature != 1.0 else columns_RV
            partials_4R[:, rows] = _partials(z_RV, targets_R[rows] - shard.start)
        return partials_4R

    def merge(self, partials_W4R: Tensor, table_KR: Tensor) -> None:
        """Merge the ranks' statistics into the table."""
        maxima_R, log_sums_R, logprobs_R, entropies_R = merge_partials(partials_W4R)
        table_KR[table.MAXIMUM] = maxima_R
        table_KR[table.LOG_SUM] = log_sums_R
        table_KR[table.LOGPROB] = logprobs_R
        table_KR[table.ENTROPY] = entropies_R

    def weigh(self, table_KR: Tensor, inputs: LossInputs, estimator: Estimator) -> None:
        """Fill in loss, derivatives and statistics of each row."""
        logprobs_R, entropies_R = table_KR[table.LOGPROB], table_KR[table.ENTROPY]
        ones_R, zeros_R = torch.ones_like(logprobs_R), torch.zeros_like(logprobs_R)
        weights_R = ones_R if inputs.weights_R is None else inputs.weights_R.to(ones_R.dtype)
        scales_R = weights_R / inputs.num_global_loss_tokens

        log_ratios_R, reference_gaps_R = zeros_R, zeros_R
        if inputs.rollout_logprobs_R is not None:
            log_ratios_R = logprobs_R - inputs.rollout_logprobs_R
        if inputs.reference_logprobs_R is not None:
            reference_gaps_R = logprobs_R - inputs.reference_logprobs_R
        ratios_R = log_ratios_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        is_extreme_R = log_ratios_R.abs() > MAX_LOG_RATIO
        factors_R, losses_R, is_clipped_R = _importance_terms(
            estimator, logprobs_R, ratios_R, is_extreme_R, inputs.advantages_R
        )
        k3_R, _ = _k3(log_ratios_R)
        reference_k3_R, reference_expm1_R = _k3(-reference_gaps_R)
        is_far_R = reference_gaps_R.abs() > MAX_LOG_RATIO
        kl_R, kl_grads_R = _kl_terms(
            estimator, reference_gaps_R, reference_k3_R, reference_expm1_R, is_far_R
        )
        if estimator.kl_coefficient:
            losses_R = losses_R + estimator.kl_coefficient * kl_R
            factors_R = factors_R - estimator.kl_coefficient * kl_grads_R
        if estimator.entropy_coefficient:
            losses_R = losses_R - estimator.entropy_coefficient * entropies_R

        table_KR[table.RATIO] = ratios_R
        table_KR[table.K1] = -log_ratios_R
        table_KR[table.K3] = k3_R
        table_KR[table.REFERENCE_K1] = reference_gaps_R
        table_KR[table.REFERENCE_K3] = reference_k3_R
        table_KR[table.IS_CLIPPED] = is_clipped_R.to(table_KR.dtype)
        table_KR[table.IS_EXTREME] = (is_extreme_R | is_far_R).to(table_KR.dtype)
        # A row of weight zero is out of the loss even where its logprob is -inf; NaN stays NaN.
        is_out_R = (scales_R == 0.0) & ~logprobs_R.isnan()
        table_KR[table.LOSS] = torch.where(is_out_R, 0.0, scales_R * losses_R)
        table_KR[table.LOGPROB_GRAD] = torch.where(is_out_R, 0.0, -scales_R * factors_R)
        table_KR[table.ENTROPY_GRAD] = -scales_R * estimator.entropy_coefficient

    def grad_logits(
        self,
        logits_RV: Tensor,
        table_KR: Tensor,
        targets_R: Tensor,
        out_RV: Tensor,
        *,
        shard: VocabShard,
        temperature: float,
        has_entropy_grad: bool,
    ) -> None:
        """Write the derivative of the loss by the logits."""
        num_true = shard.num_true_columns
        for rows in _row_slices(logits_RV):
            grad_RV = _grad_logits(
                logits_RV[rows, :num_true].to(table_KR.dtype),
                table_KR[:, rows],
                targets_R[rows] - shard.start,
                temperature,
                has_entropy_grad=has_entropy_grad,
            )
            out_RV[rows, :num_true] = grad_RV.to(out_RV.dtype)
        out_RV[:, num_true:] = 0.0

    def scatter(self, grad_RH: Tensor, index: RowIndex, out_TH: Tensor, scale: Tensor) -> None:
        """Add the gradient of the rows up into the hidden rows."""
        if index.rows_R is None:
            torch.mul(grad_RH, scale, out=out_TH)
            return
        sums_TH = torch.zeros(out_TH.shape, dtype=grad_RH.dtype, device=grad_RH.device)
        for layer in index.layers:
            # No row occurs twice in a layer: the addition has one order on every device.
            positions, hidden_rows = (torch.from_numpy(rows).to(grad_RH.device) for rows in layer)
            sums_TH[hidden_rows] += grad_RH[positions]
        out_TH.copy_(sums_TH * scale)


def merge_partials(partials_W4R: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return maximum, log sum, logprob and entropy ([R] each) from the shards' statistics.

    Adds in the order of the first dimension, so that equal inputs give equal bits.
    """
    maxima_WR, exp_sums_WR, weighted_sums_WR, targets_WR = partials_W4R.unbind(1)
    maxima_R = maxima_WR.amax(0)
    exp_sums_R = torch.zeros_like(maxima_R)
    weighted_sums_R = torch.zeros_like(maxima_R)
    targets_R = torch.full_like(maxima_R, float("nan"))
    for rank in range(partials_W4R.size(0)):
        is_empty_R = maxima_WR[rank] == _NEG_INF
        shifts_R = torch.where(is_empty_R, 0.0, maxima_WR[rank] - maxima_R)
        decays_R = torch.where(is_empty_R, 0.0, shifts_R.exp())
        exp_sums_R += exp_sums_WR[rank] * decays_R
        weighted_sums_R += decays_R * (weighted_sums_WR[rank] + exp_sums_WR[rank] * shifts_R)
        targets_R = torch.where(targets_R.isnan(), targets_WR[rank], targets_R)
    log_sums_R = exp_sums_R.log()
    logprobs_R = (targets_R - maxima_R) - log_sums_R
    return maxima_R, log_sums_R, logprobs_R, log_sums_R - weighted_sums_R / exp_sums_R


def _partials(z_RV: Tensor, columns_R: Tensor) -> Tensor:
    """Return the [4, R] partial statistics of true columns."""
    num_rows, num_columns = z_RV.shape
    if not num_columns:
        partials_4R = z_RV.new_zeros((4, num_rows))
        partials_4R[0], partials_4R[3] = _NEG_INF, float("nan")
        return partials_4R
    maxima_R = z_RV.amax(1)
    shifted_RV = z_RV - torch.where(maxima_R == _NEG_INF, 0.0, maxima_R)[:, None]
    exponentials_RV = shifted_RV.exp()
    exp_sums_R = exponentials_RV.sum(1)
    exponentials_RV *= shifted_RV.masked_fill_(shifted_RV == _NEG_INF, 0.0)
    is_local_R = (columns_R >= 0) & (columns_R < num_columns)
    safe_R = torch.where(is_local_R, columns_R, 0)
    targets_R = z_RV.gather(1, safe_R[:, None])[:, 0].masked_fill(~is_local_R, float("nan"))
    return torch.stack((maxima_R, exp_sums_R, exponentials_RV.sum(1), targets_R))


def _grad_logits(
    logits_RV: Tensor,
    table_KR: Tensor,
    columns_R: Tensor,
    temperature: float,
    *,
    has_entropy_grad: bool,
) -> Tensor:
    """Return the derivative by the logits of true columns, in the table's precision."""
    num_columns = logits_RV.size(1)
    if not num_columns:
        return logits_RV
    grads_R1 = table_KR[table.LOGPROB_GRAD][:, None]
    z_RV = logits_RV / temperature if temperature != 1.0 else logits_RV
    logprobs_RV = z_RV - table_KR[table.MAXIMUM][:, None] - table_KR[table.LOG_SUM][:, None]
    probabilities_RV = logprobs_RV.exp()
    grad_RV = -grads_R1 * probabilities_RV
    if has_entropy_grad:
        surprises_RV = (logprobs_RV + table_KR[table.ENTROPY][:, None]).masked_fill_(
            logprobs_RV == _NEG_INF, 0.0
        )
        grad_RV -= table_KR[table.ENTROPY_GRAD][:, None] * probabilities_RV * surprises_RV
    is_local_R = (columns_R >= 0) & (columns_R < num_columns)
    safe_R1 = torch.where(is_local_R, columns_R, 0)[:, None]
    grad_RV.scatter_add_(1, safe_R1, torch.where(is_local_R[:, None], grads_R1, 0.0))
    return grad_RV / temperature if temperature != 1.0 else grad_RV


def _importance_terms(
    estimator: Estimator,
    logprobs_R: Tensor,
    ratios_R: Tensor,
    is_extreme_R: Tensor,
    advantages_R: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's factor on the logprob, its loss, and whether it was clipped."""
    low, high = 1.0 - estimator.clip_low, 1.0 + estimator.clip_high
    if estimator.importance == "ppo_clip":
        unclipped_R = ratios_R * advantages_R
        clipped_R = ratios_R.clamp(low, high) * advantages_R
        is_clipped_R = clipped_R < unclipped_R
        factors_R = torch.where(is_clipped_R | is_extreme_R, 0.0, unclipped_R)
        return factors_R, -torch.minimum(unclipped_R, clipped_R), is_clipped_R
    if estimator.importance == "none":
        multipliers_R = torch.ones_like(ratios_R)
        is_clipped_R = torch.zeros_like(is_extreme_R)
    elif estimator.importance == "truncated":
        multipliers_R = ratios_R.clamp(max=estimator.max_importance)
        is_clipped_R = ratios_R > estimator.max_importance
    elif estimator.importance == "masked":
        is_clipped_R = (ratios_R < estimator.min_importance) | (ratios_R > estimator.max_importance)
        multipliers_R = torch.where(is_clipped_R, 0.0, ratios_R)
    else:  # cispo
        is_clipped_R = (ratios_R < low) | (ratios_R > high)
        multipliers_R = ratios_R.clamp(low, high)
    factors_R = advantages_R * multipliers_R
    # A factor of zero takes the row out even where its logprob is -inf; NaN stays NaN.
    is_out_R = (factors_R == 0.0) & ~logprobs_R.isnan()
    return factors_R, torch.where(is_out_R, 0.0, -factors_R * logprobs_R), is_clipped_R


def _k3(x_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``exp(x) - 1 - x`` and ``exp(x) - 1``, with x bounded inside ``exp``."""
    expm1_R = x_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expm1()
    if x_R.dtype == torch.float64:
        return expm1_R - x_R, expm1_R
    tail_R = x_R * x_R * (0.5 + x_R * (1.0 / 6.0 + x_R * (1.0 / 24.0 + x_R / 120.0)))
    return torch.where(x_R.abs() < SERIES_BELOW, tail_R, expm1_R - x_R), expm1_R


def _kl_terms(
    estimator: Estimator, gaps_R: Tensor, k3_R: Tensor, expm1_R: Tensor, is_far_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each row's divergence from the reference, and its derivative by the logprob.

    ``expm1_R`` is ``exp(-gap) - 1``; beyond its bound the exponential is constant.
    """
    if estimator.kl == "k1":
        return gaps_R, torch.ones_like(gaps_R)
    if estimator.kl == "k2":
        return gaps_R.square() / 2.0, gaps_R
    if estimator.kl == "k3":
        return k3_R, torch.where(is_far_R, 1.0, -expm1_R)
    return torch.zeros_like(gaps_R), torch.zeros_like(gaps_R)


def _row_slices(logits_RV: Tensor) -> Iterator[slice]:
    """Yield slices of rows that hold few enough elements."""
    step = max(1, CPU_ELEMENTS_AT_ONCE // max(logits_RV.size(1), 1))
    for first in range(0, logits_RV.size(0), step):
        yield slice(first, first + step)
