"""Quantiles of the logprob gap over all rows of a step, from counts that add up over ranks.

A float32 that is not negative has the order of its bits, so that its leading bits are a bin:
``2^5`` bins for each power of two, over the whole range, with no limit at either end.
"""

import math

import torch
from torch import Tensor

_MANTISSA_BITS = 5
_SHIFT = 23 - _MANTISSA_BITS

NUM_BINS = 1 << (31 - _SHIFT)
"""Bins of a histogram; the last ones are of infinity."""

RELATIVE_ERROR = 2.0 ** -(_MANTISSA_BITS + 1)
"""A quantile is the middle of the bin of the exact one: at most so far from it, 1.6 %."""


def count_gaps(gaps_R: Tensor) -> Tensor:
    """Return [NUM_BINS] int64: how many of the gaps lie in each bin.

    Args:
        gaps_R: [R] float32, not negative; a NaN counts as infinite.
    """
    finite_R = torch.nan_to_num(gaps_R.detach().float(), nan=torch.inf, posinf=torch.inf)
    bins_R = finite_R.contiguous().view(torch.int32).long() >> _SHIFT
    counts = torch.zeros(NUM_BINS, dtype=torch.int64, device=gaps_R.device)
    return counts.index_add_(0, bins_R, torch.ones_like(bins_R))


def quantile(counts: Tensor, fraction: float) -> float:
    """Return the gap that ``fraction`` of all counted ones do not exceed, nats.

    It is the ``ceil(fraction * number)``-th smallest one, known up to ``RELATIVE_ERROR`` (0 is
    exact); 0 for no gaps.

    Args:
        counts: [NUM_BINS] sums of ``count_gaps`` over streams and ranks.
        fraction: above 0, at most 1.
    """
    cumulative = counts.cpu().double().cumsum(0)
    total = float(cumulative[-1])
    if not total:
        return 0.0
    # The smallest bin that reaches the share; a rounding error of the product must not pass it.
    wanted = torch.tensor(fraction * total * (1 - 1e-12), dtype=torch.float64)
    index = int(torch.searchsorted(cumulative, wanted))
    if index == 0:
        return 0.0
    edges = torch.tensor([index, index + 1], dtype=torch.int32) << _SHIFT
    low, high = edges.view(torch.float32).tolist()
    return (low + high) / 2 if math.isfinite(high) else low
