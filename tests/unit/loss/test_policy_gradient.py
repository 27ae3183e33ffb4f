"""Every estimator option against numbers worked out by hand, values and gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixrl_mcore.loss.policy_gradient import (
    MAX_LOG_RATIO,
    LossTerms,
    metric_names,
    policy_gradient_terms,
)

FLOAT32 = 1e-6
"""Relative tolerance: a handful of float32 operations."""

LOG2 = math.log(2.0)


def _terms(
    policy: Tensor,
    advantages: list[float],
    *,
    rollout: list[float] | None,
    entropies: Tensor | None = None,
    weights: list[float] | None = None,
    **options: Any,
) -> LossTerms:
    arguments: dict[str, Any] = {
        "importance": "none",
        "max_importance": 2.0,
        "clip_low": 0.2,
        "clip_high": 0.3,
        "entropy_coefficient": 0.0,
    }
    return policy_gradient_terms(
        policy_logprobs_R=policy,
        entropies_R=torch.zeros_like(policy) if entropies is None else entropies,
        advantages_R=torch.tensor(advantages),
        weights_R=torch.tensor(weights or [1.0] * len(advantages)),
        rollout_logprobs_R=None if rollout is None else torch.tensor(rollout),
        **(arguments | options),
    )


def _policy(values: list[float]) -> Tensor:
    return torch.tensor(values, requires_grad=True)


def test_reinforce_is_minus_weight_times_advantage_times_logprob() -> None:
    policy = _policy([-1.0, -2.0, -0.5])
    terms = _terms(policy, [0.75, -0.25, 0.0], weights=[1.0, 2.0, 1.0], rollout=[-9.0, -9.0, -9.0])
    # -(0.75 * -1 + 2 * -0.25 * -2 + 0) = -(-0.75 + 1.0) = -0.25
    assert terms.summed_loss.item() == pytest.approx(-0.25, rel=FLOAT32)
    terms.summed_loss.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [-0.75, 0.5, 0.0]


def test_reinforce_needs_no_rollout_logprobs_and_ignores_them() -> None:
    without = _terms(_policy([-1.0, -2.0]), [1.0, 1.0], rollout=None)
    garbage = _terms(_policy([-1.0, -2.0]), [1.0, 1.0], rollout=[-7.0, -0.1])
    assert without.summed_loss.item() == garbage.summed_loss.item() == 3.0
    assert (tuple(without.metric_sums), tuple(without.metric_maxima)) == metric_names(
        has_rollout_logprobs=False
    )
    assert (tuple(garbage.metric_sums), tuple(garbage.metric_maxima)) == metric_names(
        has_rollout_logprobs=True
    )


def test_truncated_importance_weights_the_gradient_and_carries_none_itself() -> None:
    # Ratios exp(policy - rollout): 4 (cut at 2), 0.5, 2 (at the bound: not clipped).
    policy = _policy([-1.0, -2.0, -3.0])
    rollout = [-1.0 - 2 * LOG2, -2.0 + LOG2, -3.0 - LOG2]
    terms = _terms(
        policy, [1.0, -1.0, 0.5], rollout=rollout, importance="truncated", max_importance=2.00001
    )
    # -(2 * 1 * -1 + 0.5 * -1 * -2 + 2 * 0.5 * -3) = -(-2 + 1 - 3) = 4
    assert terms.summed_loss.item() == pytest.approx(4.0, rel=1e-5)
    assert terms.metric_sums["loss/clipped_fraction"].item() == 1.0
    assert terms.metric_sums["loss/importance_mean"].item() == pytest.approx(6.5, rel=1e-5)
    terms.summed_loss.backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-2.0, 0.5, -1.0], rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "gradient", "clipped"),
    [
        # clip range 0.8 .. 1.3; d(ratio * A)/d(logprob) = ratio * A.
        pytest.param(2.0, 1.0, 1.3, 0.0, 1.0, id="too-likely-and-good-is-clipped"),
        pytest.param(0.5, 1.0, 0.5, 0.5, 0.0, id="too-unlikely-and-good-is-pushed-back"),
        pytest.param(2.0, -1.0, -2.0, -2.0, 0.0, id="too-likely-and-bad-is-pushed-back"),
        pytest.param(0.5, -1.0, -0.8, 0.0, 1.0, id="too-unlikely-and-bad-is-clipped"),
        pytest.param(1.1, 2.0, 2.2, 2.2, 0.0, id="inside-the-range"),
        pytest.param(2.0, 0.0, 0.0, 0.0, 0.0, id="no-advantage"),
    ],
)
def test_ppo_clip(
    ratio: float, advantage: float, objective: float, gradient: float, clipped: float
) -> None:
    policy = _policy([-1.0])
    rollout = [-1.0 - math.log(ratio)]
    terms = _terms(policy, [advantage], rollout=rollout, importance="ppo_clip")
    assert terms.summed_loss.item() == pytest.approx(-objective, rel=FLOAT32, abs=1e-7)
    assert terms.metric_sums["loss/clipped_fraction"].item() == clipped
    terms.summed_loss.backward()
    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(-gradient, rel=FLOAT32, abs=1e-7)


def test_at_equal_logprobs_all_estimators_have_the_same_gradient() -> None:
    gradients = []
    for importance in ("none", "truncated", "ppo_clip"):
        policy = _policy([-1.0, -2.0])
        terms = _terms(policy, [0.5, -0.5], rollout=[-1.0, -2.0], importance=importance)
        terms.summed_loss.backward()
        assert policy.grad is not None
        gradients.append(policy.grad.tolist())
    assert gradients == [[-0.5, 0.5]] * 3


def test_entropy_bonus_is_added_and_carries_a_gradient() -> None:
    policy, entropies = _policy([-1.0, -2.0]), _policy([0.5, 1.5])
    terms = _terms(
        policy,
        [0.0, 0.0],
        weights=[1.0, 2.0],
        rollout=None,
        entropies=entropies,
        entropy_coefficient=0.1,
    )
    # -(1 * 0.1 * 0.5 + 2 * 0.1 * 1.5) = -0.35
    assert terms.summed_loss.item() == pytest.approx(-0.35, rel=FLOAT32)
    assert terms.metric_sums["loss/entropy_nats"].item() == 2.0  # not weighted
    terms.summed_loss.backward()
    assert entropies.grad is not None
    assert entropies.grad.tolist() == pytest.approx([-0.1, -0.2], rel=FLOAT32)


def test_without_a_coefficient_the_entropy_carries_no_gradient() -> None:
    policy, entropies = _policy([-1.0]), _policy([0.5])
    terms = _terms(policy, [1.0], rollout=None, entropies=entropies)
    terms.summed_loss.backward()
    assert entropies.grad is None
    assert not terms.metric_sums["loss/entropy_nats"].requires_grad


def test_divergence_metrics() -> None:
    # log ratios: +log 2 and -log 2; ratios 2 and 0.5.
    terms = _terms(
        _policy([-1.0, -2.0]), [1.0, 1.0], rollout=[-1.0 - LOG2, -2.0 + LOG2], importance="none"
    )
    sums = {name: value.item() for name, value in terms.metric_sums.items()}
    assert sums["loss/logprob_gap_mean_nats"] == pytest.approx(2 * LOG2, rel=FLOAT32)
    assert sums["loss/k1_nats"] == pytest.approx(0.0, abs=1e-6)
    assert sums["loss/k3_nats"] == pytest.approx((1 - LOG2) + (-0.5 + LOG2), rel=1e-5)
    assert sums["loss/importance_mean"] == pytest.approx(2.5, rel=FLOAT32)
    assert sums["loss/clipped_fraction"] == sums["loss/extreme_fraction"] == 0.0
    assert terms.metric_maxima["loss/logprob_gap_max_nats"].item() == pytest.approx(LOG2, rel=1e-6)


def test_k1_is_rollout_minus_policy() -> None:
    terms = _terms(_policy([-3.0]), [1.0], rollout=[-1.0])
    assert terms.metric_sums["loss/k1_nats"].item() == 2.0


def test_extreme_ratios_stay_finite_and_are_counted() -> None:
    policy = _policy([-0.1, -200.0])
    terms = _terms(policy, [-1.0, -1.0], rollout=[-200.0, -0.1], importance="ppo_clip")
    assert terms.summed_loss.item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-5)
    assert terms.metric_sums["loss/extreme_fraction"].item() == 2.0
    terms.summed_loss.backward()
    assert policy.grad is not None
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("importance", ["none", "truncated", "ppo_clip"])
def test_no_rows_give_zero_with_a_gradient_path(importance: str) -> None:
    policy = _policy([])
    terms = _terms(policy, [], rollout=[], importance=importance)
    assert terms.summed_loss.item() == 0.0
    terms.summed_loss.backward()
    assert all(value.item() == 0.0 for value in terms.metric_sums.values())
    assert terms.metric_maxima["loss/logprob_gap_max_nats"].item() == 0.0


def test_sums_of_parts_equal_the_sum_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(10, generator=generator)
    rollout = -torch.rand(10, generator=generator)
    advantages = torch.randn(10, generator=generator).tolist()
    whole = _terms(policy, advantages, rollout=rollout.tolist(), importance="ppo_clip")
    parts = [
        _terms(policy[s], advantages[s], rollout=rollout[s].tolist(), importance="ppo_clip")
        for s in (slice(0, 3), slice(3, 10))
    ]
    assert sum(part.summed_loss.item() for part in parts) == pytest.approx(
        whole.summed_loss.item(), rel=1e-5
    )
    for name, value in whole.metric_sums.items():
        assert sum(part.metric_sums[name].item() for part in parts) == pytest.approx(
            value.item(), rel=1e-5
        )


def test_importance_without_rollout_logprobs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss\.importance = 'truncated' needs rollout logprobs"):
        _terms(_policy([-1.0]), [1.0], rollout=None, importance="truncated")


def test_an_unknown_importance_is_refused() -> None:
    with pytest.raises(ValueError, match="'gspo'"):
        _terms(_policy([-1.0]), [1.0], rollout=[-1.0], importance="gspo")


def test_rows_that_do_not_line_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one length, got \(2,\) beside \(1,\)"):
        _terms(_policy([-1.0]), [1.0, 2.0], rollout=[-1.0])


def test_low_precision_is_refused() -> None:
    policy = torch.tensor([-1.0], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected float32, got torch\.bfloat16"):
        _terms(policy, [1.0], rollout=None)
