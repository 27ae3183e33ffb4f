"""The truth: logprobs, loss and gradients in float64, and how far an implementation is from it.

Shape suffixes as in ``cases``. The truth is kept on the host, so that it takes no memory from the
implementations that are measured.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Inputs, Rows

_CHUNK_BYTES = 2**30
"""Bound on one chunk of float64 logits."""
_COMPARE_ROWS = 16384


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """Results of one case in float64."""

    logprobs_A: Tensor
    """[A] float64, nats."""

    loss: float
    """Mean negative logprob of the active rows, less the coefficient times their mean entropy."""

    grad_hidden_TH: Tensor
    """[T, H] float32, rounded from float64; zero where a row carries no loss."""

    grad_hidden_AH: Tensor
    """[A, H] float32: its active rows."""

    grad_weight_VH: Tensor
    """[V, H] float32, rounded from float64."""

    max_abs_logit: float
    """Largest magnitude among the logits of active rows; rounding errors grow with it."""

    def grad_hidden(self, rows: Rows) -> Tensor:
        """Return the gradient of the hidden states that an implementation was given."""
        return self.grad_hidden_TH if rows == "all" else self.grad_hidden_AH


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Distance from the truth; None where an implementation does not have the quantity."""

    logprob_max_abs: float | None = None
    """Largest difference of a logprob, nats."""

    loss_abs: float | None = None
    """Difference of the loss, nats."""

    hidden_relative: float | None = None
    """Frobenius norm of the difference of hidden states' gradients over the norm of the truth."""

    weight_relative: float | None = None
    """The same for the weight's gradient."""

    def exceeded(self, bounds: "Errors") -> list[str]:
        """Return the names of the errors above their bounds; NaN is above any."""
        found = []
        for name in self.__slots__:
            error, bound = getattr(self, name), getattr(bounds, name)
            if error is not None and bound is not None and not error <= bound:
                found.append(name)
        return found


def compute_truth(inputs: Inputs, *, entropy_coefficient: float = 0.0) -> Truth:
    """Return the truth of a whole batch, chunk by chunk of rows, on the batch's device.

    With ``p = softmax(hidden @ weight.T)`` the loss is ``sum over active rows of (-log p[target] -
    entropy_coefficient * entropy) / A``, and its gradient in the logits is
    ``(p - onehot + entropy_coefficient * p * (log p + entropy)) / A``.
    """
    device = inputs.hidden_RH.device
    rows_A, targets_A = inputs.active_rows.to(device), inputs.active_targets
    weight_VH = inputs.weight_VH.double()
    grad_weight_VH = torch.zeros_like(weight_VH)
    grad_hidden_TH = torch.zeros_like(inputs.hidden_RH, dtype=torch.float32)
    logprobs, losses, peaks = [], [], []
    chunk_rows = max(1, _CHUNK_BYTES // (8 * weight_VH.size(0)))
    for first in range(0, inputs.num_active, chunk_rows):
        rows_C, targets_C = rows_A[first : first + chunk_rows], targets_A[first:][:chunk_rows, None]
        hidden_CH = inputs.hidden_RH[rows_C].double()
        logits_CV = hidden_CH @ weight_VH.T
        peaks.append(logits_CV.abs().max())
        logprobs_CV = torch.log_softmax(logits_CV, dim=1)
        del logits_CV
        logprobs_C = logprobs_CV.gather(1, targets_C)
        grad_CV = logprobs_CV.exp()
        entropies_C = -(grad_CV * logprobs_CV).sum(1, keepdim=True)
        if entropy_coefficient:
            grad_CV *= 1.0 + entropy_coefficient * (logprobs_CV + entropies_C)
        grad_CV.scatter_add_(1, targets_C, -torch.ones_like(logprobs_C))
        grad_CV /= inputs.num_active
        grad_hidden_TH[rows_C] = (grad_CV @ weight_VH).float()
        grad_weight_VH += grad_CV.T @ hidden_CH
        logprobs.append(logprobs_C[:, 0].cpu())
        losses.append((-logprobs_C - entropy_coefficient * entropies_C).sum())
    return Truth(
        logprobs_A=torch.cat(logprobs),
        loss=float(torch.stack(losses).sum()) / inputs.num_active,
        grad_hidden_TH=_on_host(grad_hidden_TH),
        grad_hidden_AH=_on_host(grad_hidden_TH[rows_A]),
        grad_weight_VH=_on_host(grad_weight_VH.float()),
        max_abs_logit=float(torch.stack(peaks).max()),
    )


def _on_host(values: Tensor) -> Tensor:
    """Return a copy on the host; in locked memory, from which it goes back quickly."""
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return copy.copy_(values)


def relative_error(values: Tensor, truth: Tensor) -> float:
    """Return ``|values - truth| / |truth|`` in the Frobenius norm, summed in float64.

    A truth of zero gives 0 for zeros and infinity otherwise.
    """
    if values.shape != truth.shape:
        raise ValueError(
            f"relative_error: shapes differ, {tuple(values.shape)} and {tuple(truth.shape)}"
        )
    difference, total = 0.0, 0.0
    for first in range(0, truth.size(0), _COMPARE_ROWS):
        block = truth[first : first + _COMPARE_ROWS].to(values.device).double()
        difference += float((values[first : first + _COMPARE_ROWS].double() - block).square().sum())
        total += float(block.square().sum())
    if total == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return (difference / total) ** 0.5
