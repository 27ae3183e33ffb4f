"""The head in plain PyTorch: what every faster implementation is compared with.

Vocabulary-parallel softmax over ``z = hidden @ weight.T / temperature``. Each rank holds ``V``
columns; with the row maximum ``m`` over all columns,

    s = sum exp(z - m),   a = sum exp(z - m) (z - m)          (summed over columns and ranks)
    logprob = (z[target] - m) - log s,   entropy = log s - a / s

and, for gradients ``g`` of the logprob and ``e`` of the entropy, with ``log p = z - m - log s``,

    dz = g (onehot - p) - e p (log p + entropy).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def head_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float,
    true_vocab_size: int,
    tp_group: dist.ProcessGroup | None,
    vocab_start: int,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Return [R] float32 logprobs and entropies; see ``prefixrl_kernels.head.head_logprobs``."""
    # Padding is a tail of the vocabulary: it is cut off, so that it can enter no sum.
    num_true = min(max(true_vocab_size - vocab_start, 0), weight_VH.size(0))
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    logprobs_R, entropies_R = _Head.apply(
        hidden_RH,
        weight_VH if num_true == weight_VH.size(0) else weight_VH[:num_true],
        targets_R - vocab_start,
        temperature,
        tp_group,
        chunk_rows,
    )
    return logprobs_R, entropies_R


class _Head(torch.autograd.Function):
    """Chunked forward; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares *args
        ctx: Any,  # noqa: ANN401  (torch's context)
        hidden_RH: Tensor,
        weight_VH: Tensor,
        local_targets_R: Tensor,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
        chunk_rows: int,
    ) -> tuple[Tensor, Tensor]:
        """Compute logprobs and entropies chunk by chunk."""
        num_rows = hidden_RH.size(0)
        log_normalizers_R = hidden_RH.new_empty(num_rows, dtype=torch.float32)
        logprobs_R = torch.empty_like(log_normalizers_R)
        entropies_R = torch.empty_like(log_normalizers_R)
        for first in range(0, num_rows, chunk_rows):
            rows = slice(first, first + chunk_rows)
            logits_RV = _logits(hidden_RH[rows], weight_VH, temperature)
            maxima_R = _row_maxima(logits_RV, tp_group)
            targets_R, is_local_R = _local_targets(local_targets_R[rows], logits_RV.size(1))
            shifted_RV = logits_RV - maxima_R[:, None]
            if logits_RV.size(1):
                target_R = shifted_RV.gather(1, targets_R[:, None])[:, 0] * is_local_R
            else:
                target_R = torch.zeros_like(maxima_R)
            exponentials_RV = shifted_RV.exp()
            sums = torch.stack(
                (exponentials_RV.sum(1), (exponentials_RV * shifted_RV).sum(1), target_R)
            )
            if tp_group is not None:
                dist.all_reduce(sums, group=tp_group)
            exp_sums_R, weighted_sums_R, target_R = sums
            log_sums_R = exp_sums_R.log()
            log_normalizers_R[rows] = maxima_R + log_sums_R
            logprobs_R[rows] = target_R - log_sums_R
            entropies_R[rows] = log_sums_R - weighted_sums_R / exp_sums_R
        ctx.save_for_backward(hidden_RH, weight_VH, local_targets_R, log_normalizers_R, entropies_R)
        ctx.temperature, ctx.tp_group, ctx.chunk_rows = temperature, tp_group, chunk_rows
        return logprobs_R, entropies_R

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # once_differentiable
        ctx: Any,  # noqa: ANN401  (torch's context)
        *grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states and weight."""
        grad_logprobs_R, grad_entropies_R = grads
        hidden_RH, weight_VH, local_targets_R, log_normalizers_R, entropies_R = ctx.saved_tensors
        grad_hidden_RH = torch.empty_like(hidden_RH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        for first in range(0, hidden_RH.size(0), ctx.chunk_rows):
            rows = slice(first, first + ctx.chunk_rows)
            logits_RV = _logits(hidden_RH[rows], weight_VH, ctx.temperature)
            logprobs_RV = logits_RV - log_normalizers_R[rows, None]
            probabilities_RV = logprobs_RV.exp()
            grad_logits_RV = -probabilities_RV * (
                grad_logprobs_R[rows, None]
                + grad_entropies_R[rows, None] * (logprobs_RV + entropies_R[rows, None])
            )
            if grad_logits_RV.size(1):
                targets_R, is_local_R = _local_targets(
                    local_targets_R[rows], grad_logits_RV.size(1)
                )
                grad_logits_RV.scatter_add_(
                    1, targets_R[:, None], (grad_logprobs_R[rows] * is_local_R)[:, None]
                )
            grad_logits_RV = (grad_logits_RV / ctx.temperature).to(weight_VH.dtype)
            grad_hidden_RH[rows] = grad_logits_RV @ weight_VH
            grad_weight_VH += (grad_logits_RV.T @ hidden_RH[rows]).float()
        if ctx.tp_group is not None:
            dist.all_reduce(grad_hidden_RH, group=ctx.tp_group)
        return grad_hidden_RH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None


def _logits(hidden_RH: Tensor, weight_VH: Tensor, temperature: float) -> Tensor:
    """Return this rank's [R, V] float32 logits."""
    return (hidden_RH @ weight_VH.T).float() / temperature


def _row_maxima(logits_RV: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Return the [R] largest logit of each row over all ranks."""
    if logits_RV.size(1):
        maxima_R = logits_RV.amax(1)
    else:  # a rank whose share is nothing but padding
        maxima_R = logits_RV.new_full((logits_RV.size(0),), float("-inf"))
    if tp_group is not None:
        dist.all_reduce(maxima_R, op=dist.ReduceOp.MAX, group=tp_group)
    return maxima_R


def _local_targets(targets_R: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Return column indices that are safe to gather, and which rows' targets are really here."""
    is_local_R = (targets_R >= 0) & (targets_R < num_columns)
    return torch.where(is_local_R, targets_R, 0), is_local_R
