"""The policy-gradient estimators as pure tensor functions.

Shape suffix ``R``: rows of a stream, one per completion token. The functions return *sums*; the
only division, by the global number of trained tokens, happens where all ranks' sums meet.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Importance = Literal["none", "truncated", "ppo_clip"]

MAX_LOG_RATIO = 20.0
"""Bound on |log ratio| before ``exp``. float32 overflows at 88; ``exp(20)`` is 4.9e8, far beyond
any ratio that carries information. Rows beyond it are counted in ``loss/extreme_fraction``."""

ENTROPY = "loss/entropy_nats"
GAP_MEAN = "loss/logprob_gap_mean_nats"
GAP_MAX = "loss/logprob_gap_max_nats"
K1 = "loss/k1_nats"
K3 = "loss/k3_nats"
CLIPPED = "loss/clipped_fraction"
IMPORTANCE = "loss/importance_mean"
EXTREME = "loss/extreme_fraction"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """Sums over the rows of one stream."""

    summed_loss: Tensor
    """[] float32 with gradient: the minimised sum, to be divided by the global token count."""

    metric_sums: dict[str, Tensor]
    """[] float32 without gradient: sums over rows. Added over streams and ranks, then divided by
    the global number of trained tokens, each becomes the mean that its name promises."""

    metric_maxima: dict[str, Tensor]
    """[] float32 without gradient: maxima over rows, to be reduced by ``max``; 0 without rows."""


def metric_names(*, has_rollout_logprobs: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of ``metric_sums`` and ``metric_maxima``, in order.

    The same on every rank, so that a rank or stage without rows can take part in the reduction.
    """
    if not has_rollout_logprobs:
        return (ENTROPY,), ()
    return (ENTROPY, GAP_MEAN, K1, K3, CLIPPED, IMPORTANCE, EXTREME), (GAP_MAX,)


def policy_gradient_terms(
    *,
    policy_logprobs_R: Tensor,
    entropies_R: Tensor,
    advantages_R: Tensor,
    weights_R: Tensor,
    rollout_logprobs_R: Tensor | None,
    importance: Importance,
    max_importance: float,
    clip_low: float,
    clip_high: float,
    entropy_coefficient: float,
) -> LossTerms:
    """Return the summed loss and summed metrics of one stream.

    With ``ratio = exp(policy_logprobs - rollout_logprobs)`` the maximised term of a row is

    * ``none``: ``advantage * policy_logprob`` (REINFORCE),
    * ``truncated``: ``min(ratio, max_importance).detach() * advantage * policy_logprob``
      (truncated importance sampling per token),
    * ``ppo_clip``: ``min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) *
      advantage)`` (arXiv:1707.06347, with independent bounds, arXiv:2503.14476),

    plus ``entropy_coefficient * entropy``; ``summed_loss = -sum(weights * term)``.

    Metrics: ``loss/entropy_nats``; ``loss/logprob_gap_mean_nats`` and
    ``loss/logprob_gap_max_nats`` of ``|policy - rollout|``; ``loss/k1_nats``
    (``rollout - policy``) and ``loss/k3_nats`` (``ratio - 1 - log ratio``), both
    estimates of KL(rollout policy || policy);
    ``loss/clipped_fraction``, rows whose weight was cut (``truncated``) or whose gradient was
    removed (``ppo_clip``); ``loss/importance_mean``, the ratio before any cut;
    ``loss/extreme_fraction``, rows with ``|log ratio| > MAX_LOG_RATIO``. They are not weighted.

    Args:
        policy_logprobs_R: [R] float32, nats, of the sampled tokens under the trained policy at
            the sampling temperature; carries the gradient.
        entropies_R: [R] float32, nats, entropy of the policy's distribution at each row; carries
            the gradient when ``entropy_coefficient`` is not 0.
        advantages_R: [R] float32, constant within a completion.
        weights_R: [R] float32 aggregation weights.
        rollout_logprobs_R: [R] float32, nats, as reported by the engine; None where there are
            none (SFT), which leaves only the entropy among the metrics.
        importance: how the ratio to the rollout logprobs enters.
        max_importance: upper cut of ``truncated``.
        clip_low: ``ppo_clip`` does not reward a ratio below ``1 - clip_low``.
        clip_high: ``ppo_clip`` does not reward a ratio above ``1 + clip_high``.
        entropy_coefficient: weight of the entropy bonus.

    Raises:
        ValueError: if shapes differ, a tensor is not float32, or an importance weight is asked
            for without rollout logprobs.
    """
    _check_rows(policy_logprobs_R, entropies_R, advantages_R, weights_R, rollout_logprobs_R)
    if rollout_logprobs_R is None:
        if importance != "none":
            raise ValueError(
                f"loss.importance = {importance!r} needs rollout logprobs and the batch has none; "
                "set loss.importance = 'none' or use an engine that reports logprobs"
            )
        terms_R = advantages_R * policy_logprobs_R
        metric_sums: dict[str, Tensor] = {ENTROPY: _sum(entropies_R)}
        metric_maxima: dict[str, Tensor] = {}
    else:
        log_ratio_R = policy_logprobs_R - rollout_logprobs_R
        terms_R, is_clipped_R = _weighted_terms(
            policy_logprobs_R,
            log_ratio_R,
            advantages_R,
            importance=importance,
            max_importance=max_importance,
            clip_low=clip_low,
            clip_high=clip_high,
        )
        metric_sums, metric_maxima = _metrics(entropies_R, log_ratio_R, is_clipped_R)
    if entropy_coefficient:
        terms_R = terms_R + entropy_coefficient * entropies_R
    return LossTerms(
        summed_loss=-(weights_R * terms_R).sum(),
        metric_sums=metric_sums,
        metric_maxima=metric_maxima,
    )


def _check_rows(policy_logprobs_R: Tensor, *others: Tensor | None) -> None:
    """Refuse tensors that do not line up, and low precision."""
    for tensor in (policy_logprobs_R, *others):
        if tensor is None:
            continue
        if tensor.shape != policy_logprobs_R.shape or tensor.dim() != 1:
            raise ValueError(
                f"loss: expected [R] tensors of one length, got {tuple(tensor.shape)} beside "
                f"{tuple(policy_logprobs_R.shape)}"
            )
        if tensor.dtype != torch.float32:
            raise ValueError(f"loss: expected float32, got {tensor.dtype}; cast logprobs first")


def _weighted_terms(
    policy_logprobs_R: Tensor,
    log_ratio_R: Tensor,
    advantages_R: Tensor,
    *,
    importance: Importance,
    max_importance: float,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Return each row's maximised term, and which rows were clipped."""
    if importance == "none":
        clipped_R = torch.zeros_like(policy_logprobs_R, dtype=torch.bool)
        return advantages_R * policy_logprobs_R, clipped_R
    if importance == "truncated":
        ratio_R = _bounded_exp(log_ratio_R.detach())
        weight_R = ratio_R.clamp(max=max_importance)
        return weight_R * advantages_R * policy_logprobs_R, ratio_R > max_importance
    if importance == "ppo_clip":
        ratio_R = _bounded_exp(log_ratio_R)
        unclipped_R = ratio_R * advantages_R
        clipped_R = ratio_R.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_R
        return torch.minimum(unclipped_R, clipped_R), clipped_R < unclipped_R
    raise ValueError(f"importance must be none, truncated or ppo_clip, got {importance!r}")


def _metrics(
    entropies_R: Tensor, log_ratio_R: Tensor, is_clipped_R: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return sums and maxima over rows of the logged quantities."""
    log_ratio_R = log_ratio_R.detach()
    gap_R = log_ratio_R.abs()
    ratio_R = _bounded_exp(log_ratio_R)
    sums = {
        ENTROPY: _sum(entropies_R),
        GAP_MEAN: _sum(gap_R),
        K1: _sum(-log_ratio_R),
        K3: _sum(ratio_R - 1.0 - log_ratio_R),
        CLIPPED: _sum(is_clipped_R),
        IMPORTANCE: _sum(ratio_R),
        EXTREME: _sum(gap_R > MAX_LOG_RATIO),
    }
    return sums, {GAP_MAX: gap_R.amax() if gap_R.numel() else gap_R.sum()}


def _bounded_exp(log_ratio_R: Tensor) -> Tensor:
    """Return ``exp`` of the log ratio, bounded so that it stays finite in float32."""
    return log_ratio_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _sum(values_R: Tensor) -> Tensor:
    """Return the float32 sum without gradient."""
    return values_R.detach().to(torch.float32).sum()
