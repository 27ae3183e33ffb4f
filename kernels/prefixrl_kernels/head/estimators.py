"""The policy-gradient estimators, as the coefficients that they put on each row.

With ``logprob`` of a row's target, ``A`` its advantage, ``w`` its weight and ``N`` the global
count, the minimised loss is the sum over rows of

    (w / N) * (-term - entropy_coefficient * entropy + kl_coefficient * kl).

``ratio = exp(logprob - rollout_logprob)``, the log bounded by ``MAX_LOG_RATIO``. ``stop`` marks
what carries no gradient. The terms:

* ``none``: ``A logprob`` (REINFORCE);
* ``truncated``: ``A stop(min(ratio, max_importance)) logprob`` (truncated importance sampling);
* ``masked``: ``A stop(ratio) logprob`` where ``min_importance <= ratio <= max_importance``, else 0
  (masked importance sampling);
* ``ppo_clip``: ``min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`` (arXiv:1707.06347,
  with independent bounds, arXiv:2503.14476);
* ``cispo``: ``A stop(clip(ratio, 1 - clip_low, 1 + clip_high)) logprob`` (arXiv:2506.13585).

KL(policy || reference), with ``d = logprob - reference_logprob``: ``k1 = d``, ``k2 = d^2 / 2``,
``k3 = exp(-d) - 1 + d`` (-d bounded alike).

Near 0, ``exp(x) - 1`` and ``exp(x) - 1 - x`` are taken from their series: in float32 the
difference would be all rounding, and a divergence could come out negative.

All derivatives by the logprob need nothing but the row's own values. That is why the head can
make its gradient in the same pass as its loss.
"""

from dataclasses import dataclass
from typing import Literal

Importance = Literal["none", "truncated", "masked", "ppo_clip", "cispo"]
Kl = Literal["none", "k1", "k2", "k3"]

IMPORTANCES: tuple[Importance, ...] = ("none", "truncated", "masked", "ppo_clip", "cispo")
KLS: tuple[Kl, ...] = ("none", "k1", "k2", "k3")

MAX_LOG_RATIO = 20.0
"""Bound on a log ratio before ``exp``: float32 overflows at 88, and ``exp(20)`` is 4.9e8, far
beyond any ratio that carries information. Rows beyond it are flagged ``is_extreme``."""

SERIES_BELOW = 0.05
"""Size of x below which ``exp(x) - 1 - x`` comes from its first four terms; what they leave out is
below 2e-8 of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """Which terms the loss has; the module's docstring gives the formulas."""

    importance: Importance = "none"
    """How the ratio to the rollout logprobs enters."""

    min_importance: float = 0.5
    """Lower end of ``masked``'s band."""

    max_importance: float = 2.0
    """Upper cut of ``truncated``, upper end of ``masked``'s band."""

    clip_low: float = 0.2
    """``ppo_clip`` and ``cispo`` clip the ratio at ``1 - clip_low``."""

    clip_high: float = 0.2
    """``ppo_clip`` and ``cispo`` clip the ratio at ``1 + clip_high``."""

    kl: Kl = "none"
    """Estimate of the divergence from the reference policy that is added to the loss."""

    kl_coefficient: float = 0.0
    """Weight of ``kl``."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        """Refuse names and bounds that mean nothing."""
        if self.importance not in IMPORTANCES:
            raise ValueError(
                f"reinforce_head: importance must be one of {IMPORTANCES}, got {self.importance!r}"
            )
        if self.kl not in KLS:
            raise ValueError(f"reinforce_head: kl must be one of {KLS}, got {self.kl!r}")
        if not 0.0 <= self.min_importance <= self.max_importance:
            raise ValueError(
                "reinforce_head: expected 0 <= min_importance <= max_importance, got "
                f"{self.min_importance} and {self.max_importance}"
            )
        if not (0.0 <= self.clip_low <= 1.0 and self.clip_high >= 0.0):
            raise ValueError(
                "reinforce_head: expected 0 <= clip_low <= 1 and clip_high >= 0, got "
                f"{self.clip_low} and {self.clip_high}"
            )
