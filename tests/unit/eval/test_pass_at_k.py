"""Pass@k, intervals and bins against numbers worked out by hand."""

import math
from itertools import combinations

import pytest

from prefixrl_mcore.eval.pass_at_k import (
    accuracy_with_stderr,
    bootstrap_mean,
    mean_pass_at_k,
    pass_at_k,
    prefix_bins,
)

EXACT = 1e-12  # a handful of float64 operations


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        pytest.param(4, 0, 4, 0.0, id="none correct"),
        pytest.param(4, 4, 1, 1.0, id="all correct"),
        pytest.param(4, 1, 1, 1 / 4, id="k=1 is the accuracy"),
        pytest.param(4, 1, 2, 1 / 2, id="1 - C(3,2)/C(4,2) = 1 - 3/6"),
        pytest.param(5, 2, 3, 9 / 10, id="1 - C(3,3)/C(5,3) = 1 - 1/10"),
        pytest.param(5, 2, 4, 1.0, id="fewer wrong ones than k"),
    ],
)
def test_pass_at_k_has_the_hand_worked_value(
    num_samples: int, num_correct: int, k: int, expected: float
) -> None:
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=EXACT)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample() -> None:
    samples = [True, False, False, True, False, False, False]
    subsets = list(combinations(samples, 3))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(7, 2, 3) == pytest.approx(expected, abs=EXACT)


def test_pass_at_k_does_not_overflow_on_many_samples() -> None:
    value = pass_at_k(100_000, 1, 50_000)
    assert value == pytest.approx(0.5, abs=1e-9)  # 50,000 factors, each rounded to 1e-16


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)]
)
def test_impossible_counts_are_refused(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be within"):
        pass_at_k(num_samples, num_correct, k)


def test_mean_pass_at_k_averages_over_problems_with_an_interval_around_it() -> None:
    estimate = mean_pass_at_k([4, 4, 4, 4], [0, 1, 4, 1], 2)
    assert estimate.value == pytest.approx((0 + 0.5 + 1 + 0.5) / 4, abs=EXACT)
    # The bootstrap mean of {0, .5, 1, .5} has standard deviation sqrt(.125 / 4) = 0.177.
    assert 0.1 < estimate.low < 0.3
    assert 0.7 < estimate.high < 0.9


def test_problems_without_a_partner_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        mean_pass_at_k([4, 4], [1], 1)


def test_bootstrap_interval_has_about_the_normal_width_for_many_problems() -> None:
    values = [i % 4 == 0 for i in range(400)]  # mean 1/4, standard error sqrt(3/16/400) = .02165
    estimate = bootstrap_mean(values)
    assert estimate.value == 0.25
    assert estimate.low == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.004)  # Monte Carlo error
    assert estimate.high == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.004)


def test_bootstrap_is_reproducible() -> None:
    values = [i / 37 for i in range(38)]
    assert bootstrap_mean(values) == bootstrap_mean(values)


def test_no_success_at_all_leaves_room_above_zero() -> None:
    estimate = bootstrap_mean([0.0] * 20)
    assert (estimate.value, estimate.low) == (0.0, 0.0)
    assert (1 - estimate.high) ** 20 == pytest.approx(0.025, abs=EXACT)
    mirrored = bootstrap_mean([1.0] * 20)
    assert (mirrored.value, mirrored.high) == (1.0, 1.0)
    assert mirrored.low == pytest.approx(1 - estimate.high, abs=EXACT)


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [math.nan]])
def test_bootstrap_refuses_what_is_no_share(values: list[float]) -> None:
    with pytest.raises(ValueError, match="bootstrap over problems"):
        bootstrap_mean(values)


def test_stderr_is_taken_over_problems() -> None:
    # Shares 0, .5, 1: mean .5, sample variance .25, standard error sqrt(.25 / 3).
    mean, stderr = accuracy_with_stderr([2, 2, 2], [0, 1, 2])
    assert mean == pytest.approx(0.5, abs=EXACT)
    assert stderr == pytest.approx(math.sqrt(0.25 / 3), abs=EXACT)


def test_one_problem_has_no_stderr() -> None:
    mean, stderr = accuracy_with_stderr([4], [1])
    assert mean == 0.25
    assert math.isnan(stderr)


def test_no_prefix_is_a_bin_of_its_own() -> None:
    bins = prefix_bins((0.0, 0.2, 0.4, 1.0))
    names = [b.name for b in bins]
    assert names == ["0.00-0.00", "0.00-0.20", "0.20-0.40", "0.40-1.00"]
    assert [b.is_no_prefix for b in bins] == [True, False, False, False]


@pytest.mark.parametrize("edges", [(0.5,), (0.4, 0.2), (-0.1, 0.5), (0.5, 1.1), (0.2, 0.2)])
def test_edges_that_make_no_bins_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rising edges"):
        prefix_bins(edges)
