"""Unbiased pass@k, accuracy, confidence intervals and prefix-length bins: plain arithmetic.

Problems are the units that vary: standard errors and bootstrap intervals are taken over problems,
never over the pooled samples, because samples of one problem are far from independent.

Shape legend: ``P`` problems.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_CONFIDENCE = 0.95
"""Coverage of the intervals."""

_NUM_RESAMPLES = 2000
"""Bootstrap resamples."""

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


def mean_pass_at_k(num_samples_P: Sequence[int], num_correct_P: Sequence[int], k: int) -> Estimate:
    """Return pass@k averaged over problems, with a bootstrap interval over problems.

    Args:
        num_samples_P: [P] samples drawn per problem.
        num_correct_P: [P] correct ones among them.
        k: size of the drawn subset; at most the smallest number of samples.

    Raises:
        ValueError: if there is no problem, the lengths differ, or a count is out of range.
    """
    values_P = [pass_at_k(n, c, k) for n, c in zip(num_samples_P, num_correct_P, strict=True)]
    return bootstrap_mean(values_P)


def bootstrap_mean(values_P: Sequence[float]) -> Estimate:
    """Return the mean of values in [0, 1] with a percentile bootstrap interval of 95 %.

    Equal values give equal intervals: the resampling has a fixed seed.

    When all values are 0 (or all are 1) every resample is equal and a bootstrap would claim
    certainty. The exact binomial bound is used instead: if the share of problems that are not 0
    were p, seeing none in P draws has probability ``(1 - p)^P``, and the mean is at most p.

    Args:
        values_P: [P] one value per problem, each within [0, 1].

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
    tail = (1.0 - _CONFIDENCE) / 2.0
    mean = float(array_P.mean())
    margin = 1.0 - tail ** (1.0 / array_P.size)
    if mean == 0.0:
        return Estimate(value=0.0, low=0.0, high=margin)
    if mean == 1.0:
        return Estimate(value=1.0, low=1.0 - margin, high=1.0)
    generator = np.random.default_rng(0)
    means = []
    for start in range(0, _NUM_RESAMPLES, _RESAMPLES_PER_CHUNK):
        rows = min(_RESAMPLES_PER_CHUNK, _NUM_RESAMPLES - start)
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
