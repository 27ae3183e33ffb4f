"""Refusal of arguments that do not fit together. Nothing is read back from a device."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefixrl_kernels.head.autograd import WEIGHT_GRADS
from prefixrl_kernels.head.estimators import Estimator
from prefixrl_kernels.head.main_grad import main_grad_of
from prefixrl_kernels.head.matmul import wide_dtype
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.row_kernels import LossInputs

if TYPE_CHECKING:
    from prefixrl_kernels.head.passes import HeadCall

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
"""Not float16: the gradient of the logits, about p A / N, is written in the operands' dtype before
a loss scale could reach it, and underflows there."""


def check_operands(name: str, hidden_TH: Tensor, weight_VH: Tensor) -> None:
    """Refuse hidden states and a weight that cannot be multiplied."""
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.size(1) != weight_VH.size(1):
        raise ValueError(
            f"{name}: expected hidden [T, H] and weight [V, H], got {tuple(hidden_TH.shape)} "
            f"and {tuple(weight_VH.shape)}; flatten batch and sequence first"
        )
    if hidden_TH.dtype != weight_VH.dtype or hidden_TH.dtype not in _FLOAT_DTYPES:
        raise ValueError(
            f"{name}: hidden and weight must have one floating dtype, bfloat16, float32 or "
            f"float64; got {hidden_TH.dtype} and {weight_VH.dtype}"
        )
    if hidden_TH.device != weight_VH.device:
        raise ValueError(
            f"{name}: hidden and weight must be on one device, got {hidden_TH.device} and "
            f"{weight_VH.device}"
        )
    if not weight_VH.size(0) or not weight_VH.size(1):
        raise ValueError(f"{name}: weight [V, H] is empty: {tuple(weight_VH.shape)}")


def check_weight_grad(
    name: str, weight_VH: Tensor, weight_grad: str, promised_upstream: float | None
) -> None:
    """Refuse a place for the weight's gradient that does not exist."""
    if weight_grad not in WEIGHT_GRADS:
        raise ValueError(f"{name}: weight_grad must be one of {WEIGHT_GRADS}, got {weight_grad!r}")
    if weight_grad == "main_grad" and weight_VH.requires_grad:
        main_grad_of(weight_VH)
    if promised_upstream is not None and weight_grad != "main_grad":
        raise ValueError(
            f"{name}: promised_upstream = {promised_upstream} has a meaning only with "
            "weight_grad='main_grad'; leave it out"
        )


def check_rows(
    name: str,
    index: RowIndex,
    num_hidden_rows: int,
    targets_R: Tensor,
    device: torch.device,
) -> None:
    """Refuse an index or targets that do not fit the hidden states."""
    if index.num_hidden_rows != num_hidden_rows:
        raise ValueError(
            f"{name}: the row index was built for {index.num_hidden_rows} hidden rows, got "
            f"{num_hidden_rows} (of the whole sequence)"
        )
    if targets_R.dtype != torch.int64 or targets_R.shape != (index.num_rows,):
        raise ValueError(
            f"{name}: expected targets [{index.num_rows}] int64, one per row, got "
            f"{tuple(targets_R.shape)} {targets_R.dtype}"
        )
    rows_device = device if index.rows_R is None else index.rows_R.device
    if targets_R.device != device or rows_device != device:
        raise ValueError(
            f"{name}: targets are on {targets_R.device} and the row index on {rows_device}, the "
            f"hidden states on {device}; put them on one device"
        )


def check_vocabulary(name: str, temperature: float, true_vocab_size: int, vocab_start: int) -> None:
    """Refuse a temperature or vocabulary range without meaning."""
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")
    if true_vocab_size < 1 or vocab_start < 0:
        raise ValueError(
            f"{name}: true_vocab_size must be at least 1 and vocab_start at least 0, got "
            f"{true_vocab_size} and {vocab_start}"
        )


def resolve_logits_dtype(
    name: str, logits_dtype: torch.dtype | None, operand_dtype: torch.dtype
) -> torch.dtype:
    """Return the dtype of the logits; None is float32, or float64 for float64 operands."""
    full = wide_dtype(operand_dtype)
    if logits_dtype in (None, full, operand_dtype):
        return logits_dtype or full
    raise ValueError(
        f"{name}: logits_dtype must be {full} or the operands' {operand_dtype}, got {logits_dtype}"
    )


def check_loss(
    inputs: LossInputs, estimator: Estimator, call: "HeadCall", *, is_counted: bool
) -> None:
    """Refuse inputs of the loss that are missing or do not line up with the rows."""
    if inputs.weights_R is None and not is_counted:
        raise ValueError(
            "reinforce_head: give num_global_loss_tokens (the loss is divided by it), or weights_R "
            "that include the division; a mean over the local rows is never implied"
        )
    if not inputs.num_global_loss_tokens > 0:
        raise ValueError(
            "reinforce_head: num_global_loss_tokens must be positive, got "
            f"{inputs.num_global_loss_tokens}"
        )
    if estimator.importance != "none" and inputs.rollout_logprobs_R is None:
        raise ValueError(
            f"reinforce_head: importance = {estimator.importance!r} needs rollout_logprobs_R; "
            "pass them, or set importance='none'"
        )
    if estimator.kl != "none" and inputs.reference_logprobs_R is None:
        raise ValueError(
            f"reinforce_head: kl = {estimator.kl!r} needs reference_logprobs_R; pass them, or set "
            "kl='none'"
        )
    if estimator.kl == "none" and estimator.kl_coefficient:
        raise ValueError(
            f"reinforce_head: kl_coefficient = {estimator.kl_coefficient} without kl has no "
            "effect; choose kl='k1', 'k2' or 'k3'"
        )
    for field in ("advantages_R", "weights_R", "rollout_logprobs_R", "reference_logprobs_R"):
        values_R: Tensor | None = getattr(inputs, field)
        if values_R is not None:
            _check_values(field, values_R, call.targets_R)


def _check_values(field: str, values_R: Tensor, targets_R: Tensor) -> None:
    """Refuse per-row values that do not line up, or in low precision."""
    if values_R.shape != targets_R.shape or values_R.device != targets_R.device:
        raise ValueError(
            f"reinforce_head: expected {field} [{targets_R.size(0)}] on {targets_R.device}, got "
            f"{tuple(values_R.shape)} on {values_R.device}"
        )
    if values_R.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"reinforce_head: expected {field} in float32, got {values_R.dtype}; cast it first"
        )
    if values_R.requires_grad:
        raise ValueError(
            f"reinforce_head: {field} carries a gradient, which the head does not propagate; pass "
            f"{field}.detach()"
        )
