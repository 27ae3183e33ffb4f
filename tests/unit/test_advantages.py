"""Group baselines against numbers worked out by hand."""

import math

import pytest

from prefixrl_mcore.advantages import group_advantages


def test_mean_baseline_subtracts_the_group_mean() -> None:
    assert group_advantages((1.0, 0.0, 0.0, 0.0), baseline="mean", normalize_std=False) == (
        0.75,
        -0.25,
        -0.25,
        -0.25,
    )


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    # Others of the first: (0 + 1) / 2 = 0.5; of the second: (1 + 1) / 2 = 1; third like the first.
    advantages = group_advantages((1.0, 0.0, 1.0), baseline="leave_one_out", normalize_std=False)
    assert advantages == pytest.approx((0.5, -1.0, 0.5), abs=1e-12)


def test_without_baseline_the_rewards_come_back() -> None:
    assert group_advantages((1.0, 1.0, 1.0), baseline="none", normalize_std=False) == (1, 1, 1)


def test_normalisation_divides_by_the_sample_standard_deviation() -> None:
    # Mean 0.25; squares 0.5625 + 3 * 0.0625 = 0.75; 0.75 / 3 = 0.25; deviation 0.5.
    advantages = group_advantages((1.0, 0.0, 0.0, 0.0), baseline="mean", normalize_std=True)
    assert advantages == pytest.approx((1.5, -0.5, -0.5, -0.5), abs=1e-12)


def test_normalisation_without_baseline_divides_the_rewards() -> None:
    advantages = group_advantages((1.0, 0.0, 0.0, 0.0), baseline="none", normalize_std=True)
    assert advantages == pytest.approx((2.0, 0.0, 0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("normalize_std", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_equal_rewards_give_exactly_zero(baseline: str, normalize_std: bool, reward: float) -> None:
    rewards = (reward,) * 7  # 7 * 0.1 / 7 is not 0.1 in floating point
    advantages = group_advantages(rewards, baseline=baseline, normalize_std=normalize_std)  # type: ignore[arg-type]
    assert advantages == (0.0,) * 7


def test_mean_baseline_sums_to_zero() -> None:
    advantages = group_advantages((1.0, 0.0, 1.0), baseline="mean", normalize_std=False)
    assert math.fsum(advantages) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("rewards", "baseline", "normalize_std", "message"),
    [
        pytest.param((), "mean", False, "at least 1 rollouts, got 0", id="empty"),
        pytest.param((1.0,), "leave_one_out", False, "at least 2 rollouts, got 1", id="no-others"),
        pytest.param((1.0,), "mean", True, "at least 2 rollouts, got 1", id="no-deviation"),
        pytest.param((1.0, math.nan), "mean", False, "finite", id="nan"),
        pytest.param((1.0, 0.0), "median", False, "median", id="unknown-baseline"),
    ],
)
def test_bad_groups_are_refused(
    rewards: tuple[float, ...], baseline: str, normalize_std: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, baseline=baseline, normalize_std=normalize_std)  # type: ignore[arg-type]
