"""Counts of gaps and their quantiles, against sorted values."""

import pytest
import torch

from prefixrl_mcore.loss.gap_histogram import NUM_BINS, RELATIVE_ERROR, count_gaps, quantile


def test_a_quantile_is_the_sorted_value_up_to_the_stated_error() -> None:
    generator = torch.Generator().manual_seed(0)
    gaps_R = torch.randn(5000, generator=generator).abs() * 10 ** torch.linspace(-9, 2, 5000)
    in_order = gaps_R.sort().values
    for fraction, rank in ((0.01, 50), (0.5, 2500), (0.99, 4950), (1.0, 5000)):
        expected = float(in_order[rank - 1])
        assert quantile(count_gaps(gaps_R), fraction) == pytest.approx(expected, rel=RELATIVE_ERROR)


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    gaps_R = torch.tensor([0.0, 1e-8, 0.5, 0.5, 3.0])
    parts = count_gaps(gaps_R[:2]) + count_gaps(gaps_R[2:])
    assert torch.equal(parts, count_gaps(gaps_R))
    assert int(parts.sum()) == 5


def test_one_percent_of_the_rows_is_beyond_the_percentile() -> None:
    gaps_R = torch.cat([torch.full((99,), 0.25), torch.full((1,), 4.0)])
    assert quantile(count_gaps(gaps_R), 0.99) == pytest.approx(0.25, rel=RELATIVE_ERROR)
    assert quantile(count_gaps(gaps_R), 0.991) == pytest.approx(4.0, rel=RELATIVE_ERROR)


def test_zero_is_exact_nothing_is_zero_and_a_nan_is_infinite() -> None:
    assert quantile(count_gaps(torch.zeros(7)), 0.99) == 0.0
    assert quantile(torch.zeros(NUM_BINS, dtype=torch.int64), 0.99) == 0.0
    assert quantile(count_gaps(torch.tensor([torch.nan, -torch.nan])), 0.5) == torch.inf
    assert quantile(count_gaps(torch.tensor([torch.inf, 1.0])), 1.0) == torch.inf
