"""The head's definition in float64, differentiated by PyTorch, and comparisons that say where.

Nothing here comes from the code under test: the full logits are made in one product, the
probabilities by ``log_softmax``, the estimators by ``torch.minimum``, ``clamp`` and ``detach`` as
their papers write them, and every gradient by autograd.

Shape suffixes: ``T`` hidden rows, ``R`` rows of the head, ``H`` hidden size, ``V`` vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

MAX_LOG_RATIO = 20.0
"""The bound on log ratios that the operation promises."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleLoss:
    """The options of the loss, named as the operation's arguments are."""

    importance: Literal["none", "truncated", "masked", "ppo_clip", "cispo"] = "none"
    min_importance: float = 0.5
    max_importance: float = 2.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleRows:
    """What the loss reads per row, all [R]; None where the option does not need it."""

    advantages: Tensor
    weights: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    num_global_loss_tokens: float = 1.0


def oracle_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    rows_R: Tensor | None = None,
    true_vocab_size: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies [R], carrying gradient, from the full logits."""
    rows_RH = hidden_TH if rows_R is None else hidden_TH[rows_R]
    logits_RV = (rows_RH @ weight_VH[:true_vocab_size].T) / temperature
    return logprobs_of_logits(logits_RV, targets_R)


def logprobs_of_logits(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return logprobs and entropies [R] of tempered logits; -inf columns are banned tokens."""
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    is_banned_RV = logits_RV == float("-inf")
    surprises_RV = -logprobs_RV.masked_fill(is_banned_RV, 0.0)
    entropies_R = (logprobs_RV.exp() * surprises_RV).sum(-1)
    return logprobs_RV.gather(1, targets_R[:, None])[:, 0], entropies_R


def oracle_loss(
    logprobs_R: Tensor, entropies_R: Tensor, rows: OracleRows, options: OracleLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, carrying gradient, and the statistics under the operation's names."""
    zeros_R = torch.zeros_like(logprobs_R)
    log_ratios_R = zeros_R if rows.rollout_logprobs is None else logprobs_R - rows.rollout_logprobs
    gaps_R = zeros_R if rows.reference_logprobs is None else logprobs_R - rows.reference_logprobs
    ratios_R = log_ratios_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    terms_R, is_clipped_R = _terms(logprobs_R, ratios_R, rows.advantages, options)
    k3_R = (-gaps_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() - 1.0 + gaps_R
    kl_R = {"none": zeros_R, "k1": gaps_R, "k2": gaps_R**2 / 2, "k3": k3_R}[options.kl]
    losses_R = -terms_R + options.kl_coefficient * kl_R - options.entropy_coefficient * entropies_R
    if rows.weights is not None:
        losses_R = losses_R * rows.weights
    is_extreme_R = (log_ratios_R.abs() > MAX_LOG_RATIO) | (gaps_R.abs() > MAX_LOG_RATIO)
    statistics = {
        "logprobs_R": logprobs_R,
        "entropies_R": entropies_R,
        "ratios_R": ratios_R,
        "k1_R": -log_ratios_R,
        "k3_R": ratios_R - 1.0 - log_ratios_R,
        "reference_k1_R": gaps_R,
        "reference_k3_R": k3_R,
        "is_clipped_R": is_clipped_R,
        "is_extreme_R": is_extreme_R,
    }
    detached = {name: values_R.detach() for name, values_R in statistics.items()}
    return losses_R.sum() / rows.num_global_loss_tokens, detached


def _terms(
    logprobs_R: Tensor, ratios_R: Tensor, advantages_R: Tensor, options: OracleLoss
) -> tuple[Tensor, Tensor]:
    """Return what is maximised per row, and whether the estimator cut the row's ratio."""
    low, high = 1.0 - options.clip_low, 1.0 + options.clip_high
    constant_R = ratios_R.detach()
    if options.importance == "none":
        return advantages_R * logprobs_R, torch.zeros_like(ratios_R, dtype=torch.bool)
    if options.importance == "truncated":
        capped_R = torch.clamp(constant_R, max=options.max_importance)
        return advantages_R * capped_R * logprobs_R, constant_R > options.max_importance
    if options.importance == "masked":
        is_outside_R = (constant_R < options.min_importance) | (constant_R > options.max_importance)
        kept_R = torch.where(is_outside_R, 0.0, constant_R)
        return advantages_R * kept_R * logprobs_R, is_outside_R
    if options.importance == "cispo":
        is_outside_R = (constant_R < low) | (constant_R > high)
        return advantages_R * constant_R.clamp(low, high) * logprobs_R, is_outside_R
    assert options.importance == "ppo_clip", options.importance
    unclipped_R = ratios_R * advantages_R
    clipped_R = ratios_R.clamp(low, high) * advantages_R
    return torch.minimum(unclipped_R, clipped_R), (clipped_R < unclipped_R).detach()


def plain_low_precision(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    advantages_R: Tensor,
    *,
    num_global_loss_tokens: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs [R] and both gradients of REINFORCE as ordinary training code has them.

    The output layer rounds its logits to the operands' dtype, ``log_softmax`` widens them, and
    autograd rounds the gradient of the logits: what an implementation must not be worse than.
    """
    hidden_TH = hidden_TH.detach().requires_grad_()
    weight_VH = weight_VH.detach().requires_grad_()
    logprobs_RV = torch.log_softmax(functional.linear(hidden_TH, weight_VH).float(), dim=-1)
    logprobs_R = logprobs_RV.gather(1, targets_R[:, None])[:, 0]
    loss = -(advantages_R * logprobs_R).sum() / num_global_loss_tokens
    grad_hidden_TH, grad_weight_VH = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    return logprobs_R.detach(), grad_hidden_TH, grad_weight_VH


def relative_norm(got: Tensor, expected: Tensor) -> float:
    """Return the Frobenius norm of the difference as a fraction of that of ``expected``."""
    wanted = expected.detach().double().cpu()
    difference = got.detach().double().cpu() - wanted
    return float(difference.norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))


def assert_close(
    name: str, got: Tensor, expected: Tensor, *, atol: float, rtol: float = 0.0
) -> None:
    """Fail unless every element is within ``atol + rtol |expected|``; name the worst one.

    Infinities and NaN must stand at the same places, infinities with the same sign.
    """
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    ours, wanted = got.detach().double().cpu(), expected.detach().double().cpu()
    bounds = atol + rtol * wanted.abs().nan_to_num(nan=0.0, posinf=0.0)
    is_same = (ours == wanted) | (ours.isnan() & wanted.isnan())
    errors = torch.where(is_same, 0.0, (ours - wanted).abs())
    is_near = ours.isfinite() & wanted.isfinite() & (errors <= bounds)
    is_wrong = ~is_same & ~is_near
    if not is_wrong.any():
        return
    excess = torch.where(is_wrong, (errors - bounds).nan_to_num(nan=float("inf")), -1.0)
    index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    raise AssertionError(
        f"{name}: {int(is_wrong.sum())} of {is_wrong.numel()} elements are off; worst at "
        f"{list(index)}: got {ours[index].item():.9g}, expected {wanted[index].item():.9g}, error "
        f"{errors[index].item():.3g}, bound {bounds[index].item():.3g}"
    )


def assert_relative_norm(name: str, got: Tensor, expected: Tensor, bound: float) -> None:
    """Fail unless ``relative_norm`` is at most ``bound``; name the worst element too."""
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    ratio = relative_norm(got, expected)
    if ratio <= bound:
        return
    errors = (got.detach().double().cpu() - expected.detach().double().cpu()).abs()
    worst = errors.nan_to_num(nan=float("inf")).argmax()
    index = tuple(int(i) for i in torch.unravel_index(worst, errors.shape))
    raise AssertionError(
        f"{name}: relative error {ratio:.3g} in the Frobenius norm, bound {bound:.3g}; worst at "
        f"{list(index)}: got {got[index].item():.9g}, expected {expected[index].item():.9g}"
    )


def assert_bitwise(name: str, got: Tensor, expected: Tensor) -> None:
    """Fail unless dtype and every bit but the sign of zero agree; NaN equals NaN."""
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, expected {expected.dtype}"
    assert_close(name, got, expected, atol=0.0)
