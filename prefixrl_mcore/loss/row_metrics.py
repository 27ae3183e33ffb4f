"""What the loss of one stream reports: sums and maxima over its rows.

The loss itself is ``prefixrl_kernels.reinforce_head``, which computes it together with the
logprobs; its formulas are in ``prefixrl_kernels.head.estimators``. Shape suffix ``R``: rows of a
stream, one per completion token.
"""

from dataclasses import dataclass

import torch
from prefixrl_kernels import HeadStatistics
from torch import Tensor

from prefixrl_mcore.loss.gap_histogram import count_gaps

ENTROPY = "loss/entropy_nats"
GAP_MEAN = "loss/logprob_gap_mean_nats"
GAP_P99 = "loss/logprob_gap_p99_nats"
GAP_MAX = "loss/logprob_gap_max_nats"
K1 = "loss/k1_nats"
K3 = "loss/k3_nats"
CLIPPED = "loss/clipped_fraction"
IMPORTANCE = "loss/importance_mean"
EXTREME = "loss/extreme_fraction"
REFERENCE_K1 = "loss/reference_k1_nats"
REFERENCE_K3 = "loss/reference_k3_nats"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossReport:
    """Sums over the rows of one stream."""

    summed_loss: Tensor
    """[] float32: the minimised sum, to be divided by the global token count."""

    metric_sums: dict[str, Tensor]
    """[] float32: sums over rows. Added over streams and ranks, then divided by the global number
    of trained tokens, each becomes the mean that its name promises."""

    metric_maxima: dict[str, Tensor]
    """[] float32: maxima over rows, to be reduced by ``max``; 0 without rows."""

    gap_counts: Tensor | None
    """[NUM_BINS] int64: the rows by their gap (``gap_histogram``), to be added up; None without
    rollout logprobs."""


def metric_names(
    *, has_rollout_logprobs: bool, has_reference: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of ``metric_sums`` and ``metric_maxima``, in order.

    The same on every rank, so that a rank or stage without rows can take part in the reduction.
    """
    reference = (REFERENCE_K1, REFERENCE_K3) if has_reference else ()
    if not has_rollout_logprobs:
        return (ENTROPY, *reference), ()
    rollout = (GAP_MEAN, K1, K3, CLIPPED, IMPORTANCE, EXTREME)
    return (ENTROPY, *reference, *rollout), (GAP_MAX,)


def report_rows(
    summed_loss: Tensor,
    statistics: HeadStatistics,
    *,
    has_rollout_logprobs: bool,
    has_reference: bool,
) -> LossReport:
    """Return the sums and maxima over the rows of one stream.

    Metrics, none of them weighted: ``loss/entropy_nats``; ``loss/logprob_gap_mean_nats`` and
    ``loss/logprob_gap_max_nats`` of ``|policy - rollout|``, whose counts give
    ``loss/logprob_gap_p99_nats``; ``loss/k1_nats``
    (``rollout - policy``) and ``loss/k3_nats`` (``ratio - 1 - log ratio``), both estimates of
    KL(rollout policy || policy); ``loss/clipped_fraction``, rows whose weight was cut or masked,
    or whose gradient was removed; ``loss/importance_mean``, the ratio before any cut;
    ``loss/extreme_fraction``, rows whose log ratio was beyond the bound of the head;
    ``loss/reference_k1_nats`` and ``loss/reference_k3_nats``, estimates of
    KL(policy || reference).

    Args:
        summed_loss: [] float32, the head's loss.
        statistics: of the same rows.
        has_rollout_logprobs: without them the gap and what depends on it are not reported.
        has_reference: without one there is no divergence from it.
    """
    sums = {ENTROPY: _sum(statistics.entropies_R)}
    if has_reference:
        sums |= {
            REFERENCE_K1: _sum(statistics.reference_k1_R),
            REFERENCE_K3: _sum(statistics.reference_k3_R),
        }
    if not has_rollout_logprobs:
        return LossReport(
            summed_loss=summed_loss, metric_sums=sums, metric_maxima={}, gap_counts=None
        )
    gaps_R = statistics.k1_R.abs()
    sums |= {
        GAP_MEAN: _sum(gaps_R),
        K1: _sum(statistics.k1_R),
        K3: _sum(statistics.k3_R),
        CLIPPED: _sum(statistics.is_clipped_R),
        IMPORTANCE: _sum(statistics.ratios_R),
        EXTREME: _sum(statistics.is_extreme_R),
    }
    maxima = {GAP_MAX: gaps_R.amax() if gaps_R.numel() else gaps_R.sum()}
    return LossReport(
        summed_loss=summed_loss,
        metric_sums=sums,
        metric_maxima=maxima,
        gap_counts=count_gaps(gaps_R),
    )


def _sum(values_R: Tensor) -> Tensor:
    """Return the float32 sum."""
    return values_R.to(torch.float32).sum()
