"""Unbiased pass@k, accuracy, confidence intervals and prefix-length bins: plain arithmetic.

Problems are the units that vary: standard errors and bootstrap intervals are taken over problems,
never over the pooled samples, because samples of one problem are far from independent.

Shape legend: ``P`` problems.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_RESAMPLES_PER_CHUNK = 256
"""Bootstrap resamples drawn together; bounds the index array at 256 x P int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value with its confidence interval."""

    value: float
    """The point estimate; NaN when there was nothing to estimate from."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixBin:
    """A range of prefix fractions: ``low < fraction <= high``, or exactly no prefix."""

    low: float
    """Lower edge, excluded; 0 together with ``high == 0`` is the bin without a prefix."""

    high: float
    """Upper edge, included."""

    @property
    def name(self) -> str:
        """``0.20-0.40``; ``0.00-0.00`` is the bin without a prefix."""
        return f"{self.low:.2f}-{self.high:.2f}"

    @property
    def is_no_prefix(self) -> bool:
        """The bin holds the rollouts that had no prefix."""
        return self.high == 0.0

    def holds(self, fraction: float) -> bool:
        """Answer whether a rollout with this prefix fraction belongs here."""
        return fraction == 0.0 if self.is_no_prefix else self.low < fraction <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class BinAccuracy:
    """Accuracy of the rollouts whose prefix fraction fell into one bin."""

    prefix_bin: PrefixBin
    """The bin."""

    accuracy: Estimate
    """Share of correct rollouts with its Wilson interval; NaN when the bin is empty."""

    num_rollouts: int
    """Rollouts in the bin."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the unbiased probability that one of ``k`` samples is correct (arXiv:2107.03374).

    ``1 - C(n - c, k) / C(n, k)``, as a product of factors of at most 1, so nothing overflows.

    Args:
        num_samples: n, samples drawn for the problem.
        num_correct: c, correct ones among them.
        k: size of the drawn subset; at most n.

    Raises:
        ValueError: unless ``0 <= num_correct <= num_samples`` and ``1 <= k <= num_samples``.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"num_correct must be within 0..num_samples, got {num_correct} of {num_samples}"
        )
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k must be within 1..num_samples, got k = {k} with {num_samples} samples; "
            "leave out this k or draw more samples"
        )
    if num_samples - num_correct < k:
        return 1.0
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= (num_samples - num_correct - i) / (num_samples - i)
    return 1.0 - all_wrong


def mean_pass_at_k(
    num_samples_P: Sequence[int],
    num_correct_P: Sequence[int],
    k: int,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return pass@k averaged over problems, with a bootstrap interval over problems.

    Args:
        num_samples_P: [P] samples drawn per problem.
        num_correct_P: [P] correct ones among them.
        k: size of the drawn subset; at most the smallest number of samples.
        confidence: coverage of the interval.
        num_resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: if there is no problem, the lengths differ, or a count is out of range.
    """
    values_P = [pass_at_k(n, c, k) for n, c in zip(num_samples_P, num_correct_P, strict=True)]
    return bootstrap_mean(values_P, confidence=confidence, num_resamples=num_resamples, seed=seed)


def bootstrap_mean(
    values_P: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return the mean of values in [0, 1] with a percentile bootstrap interval.

    When all values are 0 (or all are 1) every resample is equal and a bootstrap would claim
    certainty. The exact binomial bound is used instead: if the share of problems that are not 0
    were p, seeing none in P draws has probability ``(1 - p)^P``, and the mean is at most p.

    Args:
        values_P: [P] one value per problem, each within [0, 1].
        confidence: coverage of the interval.
        num_resamples: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: if there is no value or one lies outside [0, 1].
    """
    array_P = np.asarray(values_P, dtype=np.float64)
    if array_P.size == 0:
        raise ValueError("bootstrap over problems: expected at least one problem, got none")
    if not ((array_P >= 0.0) & (array_P <= 1.0)).all():
        raise ValueError(
            f"bootstrap over problems: expected values within [0, 1], got {array_P.min()}"
            f"..{array_P.max()}"
        )
    tail = (1.0 - _checked_confidence(confidence)) / 2.0
    mean = float(array_P.mean())
    margin = 1.0 - tail ** (1.0 / array_P.size)
    if mean == 0.0:
        return Estimate(value=0.0, low=0.0, high=margin)
    if mean == 1.0:
        return Estimate(value=1.0, low=1.0 - margin, high=1.0)
    generator = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, _RESAMPLES_PER_CHUNK):
        rows = min(_RESAMPLES_PER_CHUNK, num_resamples - start)
        chosen = generator.integers(0, array_P.size, size=(rows, array_P.size))
        means.append(array_P[chosen].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
    return Estimate(value=mean, low=float(min(low, mean)), high=float(max(high, mean)))


def accuracy_with_stderr(
    num_samples_P: Sequence[int], num_correct_P: Sequence[int]
) -> tuple[float, float]:
    """Return the mean over problems of each problem's accuracy, and its standard error.

    Args:
        num_samples_P: [P] samples drawn per problem, each at least 1.
        num_correct_P: [P] correct ones among them.

    Returns:
        Accuracy, and the standard error over problems (NaN for a single problem).

    Raises:
        ValueError: if there is no problem, the lengths differ, or a count is out of range.
    """
    shares_P = [pass_at_k(n, c, 1) for n, c in zip(num_samples_P, num_correct_P, strict=True)]
    if not shares_P:
        raise ValueError("accuracy: expected at least one problem, got none")
    mean = math.fsum(shares_P) / len(shares_P)
    if len(shares_P) == 1:
        return mean, math.nan
    variance = math.fsum((s - mean) ** 2 for s in shares_P) / (len(shares_P) - 1)
    return mean, math.sqrt(variance / len(shares_P))


def wilson_interval(num_correct: int, num_trials: int, *, confidence: float = 0.95) -> Estimate:
    """Return a proportion with its Wilson score interval, which stays within [0, 1].

    The trials are taken as independent. Without any trial the value is NaN and the interval is
    all of [0, 1].

    Raises:
        ValueError: unless ``0 <= num_correct <= num_trials``.
    """
    if not 0 <= num_correct <= num_trials:
        raise ValueError(
            f"num_correct must be within 0..num_trials, got {num_correct} of {num_trials}"
        )
    z = NormalDist().inv_cdf(0.5 + _checked_confidence(confidence) / 2.0)
    if num_trials == 0:
        return Estimate(value=math.nan, low=0.0, high=1.0)
    share = num_correct / num_trials
    scale = 1.0 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / scale
    spread = share * (1.0 - share) / num_trials + z * z / (4 * num_trials * num_trials)
    half = z * math.sqrt(spread) / scale
    # Rounding leaves 1e-17 where the ends are exactly 0 and 1.
    low = 0.0 if num_correct == 0 else centre - half
    high = 1.0 if num_correct == num_trials else centre + half
    return Estimate(value=share, low=low, high=high)


def prefix_bins(edges: Sequence[float]) -> tuple[PrefixBin, ...]:
    """Return the bin without a prefix, followed by one bin between each pair of edges.

    Raises:
        ValueError: if there are fewer than two edges, or they do not rise within [0, 1].
    """
    rises = all(a < b for a, b in itertools.pairwise(edges))
    if len(edges) < 2 or not rises or edges[0] < 0.0 or edges[-1] > 1.0:
        raise ValueError(
            "evaluation.prefix_bins must be at least two rising edges within [0, 1], got "
            f"{tuple(edges)}"
        )
    between = (PrefixBin(low=low, high=high) for low, high in itertools.pairwise(edges))
    return (PrefixBin(low=0.0, high=0.0), *between)


def assign_bin(fraction: float, bins: Sequence[PrefixBin]) -> PrefixBin | None:
    """Return the bin of a prefix fraction, or None if no bin covers it; the caller counts those.

    Raises:
        ValueError: if the fraction is not within [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"a prefix fraction lies within [0, 1], got {fraction}")
    return next((prefix_bin for prefix_bin in bins if prefix_bin.holds(fraction)), None)


def accuracy_by_bin(
    outcomes: Iterable[tuple[float, bool]],
    bins: Sequence[PrefixBin],
    *,
    confidence: float = 0.95,
) -> tuple[list[BinAccuracy], int]:
    """Return accuracy per bin in the order of ``bins``, and how many rollouts no bin covers.

    Args:
        outcomes: (prefix fraction, is correct) of each rollout.
        bins: the bins; see :func:`prefix_bins`.
        confidence: coverage of the Wilson intervals.

    Raises:
        ValueError: if a fraction is not within [0, 1].
    """
    num_correct = dict.fromkeys(bins, 0)
    num_rollouts = dict.fromkeys(bins, 0)
    num_outside = 0
    for fraction, is_correct in outcomes:
        prefix_bin = assign_bin(fraction, bins)
        if prefix_bin is None:
            num_outside += 1
            continue
        num_rollouts[prefix_bin] += 1
        num_correct[prefix_bin] += is_correct
    accuracies = [
        BinAccuracy(
            prefix_bin=b,
            accuracy=wilson_interval(num_correct[b], num_rollouts[b], confidence=confidence),
            num_rollouts=num_rollouts[b],
        )
        for b in bins
    ]
    return accuracies, num_outside


def _checked_confidence(confidence: float) -> float:
    """Return ``confidence``, refusing what is no coverage probability."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    return confidence
