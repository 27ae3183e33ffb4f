"""Every estimator option against numbers worked out by hand: loss, derivatives, statistics."""

import math
from typing import Any

import pytest
import torch
from prefixrl_kernels.head import table
from prefixrl_kernels.head.estimators import MAX_LOG_RATIO, Estimator
from prefixrl_kernels.head.reference import TorchRows
from prefixrl_kernels.head.row_kernels import LossInputs

FLOAT32 = 1e-6
"""Relative tolerance: a handful of float32 operations."""

LOG2 = math.log(2.0)


def _weigh(
    logprobs: list[float],
    advantages: list[float],
    *,
    rollout: list[float] | None = None,
    reference: list[float] | None = None,
    entropies: list[float] | None = None,
    weights: list[float] | None = None,
    num_global_loss_tokens: float = 1.0,
    **options: Any,
) -> torch.Tensor:
    """Return the filled table of rows with these logprobs."""
    table_KR = torch.full((table.NUM_FIELDS, len(logprobs)), float("nan"))
    table_KR[table.LOGPROB] = torch.tensor(logprobs)
    table_KR[table.ENTROPY] = torch.tensor(entropies or [0.0] * len(logprobs))
    inputs = LossInputs(
        advantages_R=torch.tensor(advantages),
        weights_R=None if weights is None else torch.tensor(weights),
        rollout_logprobs_R=None if rollout is None else torch.tensor(rollout),
        reference_logprobs_R=None if reference is None else torch.tensor(reference),
        num_global_loss_tokens=num_global_loss_tokens,
    )
    options = {"clip_low": 0.2, "clip_high": 0.3} | options
    TorchRows().weigh(table_KR, inputs, Estimator(**options))
    return table_KR


def test_reinforce_is_minus_weight_times_advantage_times_logprob() -> None:
    table_KR = _weigh(
        [-1.0, -2.0, -0.5], [0.75, -0.25, 0.0], weights=[1.0, 2.0, 1.0], rollout=[-9.0, -9.0, -9.0]
    )
    # -(0.75 * -1), -(2 * -0.25 * -2), 0
    assert table_KR[table.LOSS].tolist() == [0.75, -1.0, 0.0]
    assert table_KR[table.LOGPROB_GRAD].tolist() == [-0.75, 0.5, 0.0]
    assert table_KR[table.ENTROPY_GRAD].tolist() == [0.0, 0.0, 0.0]


def test_the_global_count_divides_loss_and_derivatives() -> None:
    table_KR = _weigh(
        [-1.0], [2.0], entropies=[0.5], entropy_coefficient=0.1, num_global_loss_tokens=4.0
    )
    assert table_KR[table.LOSS].item() == pytest.approx((2.0 - 0.05) / 4, rel=FLOAT32)
    assert table_KR[table.LOGPROB_GRAD].item() == -0.5
    assert table_KR[table.ENTROPY_GRAD].item() == pytest.approx(-0.025, rel=FLOAT32)


def test_truncated_importance_cuts_the_weight() -> None:
    # Ratios exp(policy - rollout): 4 (cut at 2), 0.5, 2 (at the bound: not clipped).
    table_KR = _weigh(
        [-1.0, -2.0, -3.0],
        [1.0, -1.0, 0.5],
        rollout=[-1.0 - 2 * LOG2, -2.0 + LOG2, -3.0 - LOG2],
        importance="truncated",
        max_importance=2.00001,
    )
    # -(2 * 1 * -1), -(0.5 * -1 * -2), -(2 * 0.5 * -3)
    assert table_KR[table.LOSS].tolist() == pytest.approx([2.0, -1.0, 3.0], rel=1e-5)
    assert table_KR[table.LOGPROB_GRAD].tolist() == pytest.approx([-2.0, 0.5, -1.0], rel=1e-5)
    assert table_KR[table.IS_CLIPPED].tolist() == [1.0, 0.0, 0.0]
    assert table_KR[table.RATIO].tolist() == pytest.approx([4.0, 0.5, 2.0], rel=1e-5)


def test_masked_importance_drops_rows_outside_the_band() -> None:
    # Ratios 4, 0.25, 2 and a band of 0.5 to 3.
    table_KR = _weigh(
        [-1.0, -2.0, -3.0],
        [1.0, 1.0, 0.5],
        rollout=[-1.0 - 2 * LOG2, -2.0 + 2 * LOG2, -3.0 - LOG2],
        importance="masked",
        min_importance=0.5,
        max_importance=3.0,
    )
    assert table_KR[table.LOSS].tolist() == pytest.approx([0.0, 0.0, 3.0], rel=1e-5)
    assert table_KR[table.LOGPROB_GRAD].tolist() == pytest.approx([0.0, 0.0, -1.0], rel=1e-5)
    assert table_KR[table.IS_CLIPPED].tolist() == [1.0, 1.0, 0.0]


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
    table_KR = _weigh([-1.0], [advantage], rollout=[-1.0 - math.log(ratio)], importance="ppo_clip")
    assert table_KR[table.LOSS].item() == pytest.approx(-objective, rel=FLOAT32, abs=1e-7)
    assert table_KR[table.LOGPROB_GRAD].item() == pytest.approx(-gradient, rel=FLOAT32, abs=1e-7)
    assert table_KR[table.IS_CLIPPED].item() == clipped


@pytest.mark.parametrize(
    ("ratio", "weight", "clipped"),
    [
        pytest.param(2.0, 1.3, 1.0, id="above"),
        pytest.param(0.5, 0.8, 1.0, id="below"),
        pytest.param(1.1, 1.1, 0.0, id="inside"),
    ],
)
def test_cispo_clips_the_weight_and_keeps_the_gradient(
    ratio: float, weight: float, clipped: float
) -> None:
    table_KR = _weigh([-1.0], [-2.0], rollout=[-1.0 - math.log(ratio)], importance="cispo")
    assert table_KR[table.LOSS].item() == pytest.approx(-2.0 * weight, rel=FLOAT32)
    assert table_KR[table.LOGPROB_GRAD].item() == pytest.approx(2.0 * weight, rel=FLOAT32)
    assert table_KR[table.IS_CLIPPED].item() == clipped


@pytest.mark.parametrize(
    ("kl", "value", "derivative"),
    [
        # d = logprob - reference = log 2.
        pytest.param("k1", LOG2, 1.0, id="k1"),
        pytest.param("k2", LOG2**2 / 2, LOG2, id="k2"),
        pytest.param("k3", 0.5 - 1.0 + LOG2, 1.0 - 0.5, id="k3"),
    ],
)
def test_divergence_from_the_reference(kl: str, value: float, derivative: float) -> None:
    table_KR = _weigh([-1.0], [0.0], reference=[-1.0 - LOG2], kl=kl, kl_coefficient=0.5)
    assert table_KR[table.LOSS].item() == pytest.approx(0.5 * value, rel=1e-5)
    assert table_KR[table.LOGPROB_GRAD].item() == pytest.approx(0.5 * derivative, rel=1e-5)
    assert table_KR[table.REFERENCE_K1].item() == pytest.approx(LOG2, rel=1e-5)
    assert table_KR[table.REFERENCE_K3].item() == pytest.approx(LOG2 - 0.5, rel=1e-5)


def test_at_equal_logprobs_all_estimators_have_the_same_gradient() -> None:
    gradients = [
        _weigh([-1.0, -2.0], [0.5, -0.5], rollout=[-1.0, -2.0], importance=importance)[
            table.LOGPROB_GRAD
        ].tolist()
        for importance in ("none", "truncated", "masked", "ppo_clip", "cispo")
    ]
    assert gradients == [[-0.5, 0.5]] * 5


def test_entropy_bonus_is_weighted_and_carries_a_gradient() -> None:
    table_KR = _weigh(
        [-1.0, -2.0],
        [0.0, 0.0],
        weights=[1.0, 2.0],
        entropies=[0.5, 1.5],
        entropy_coefficient=0.1,
    )
    assert table_KR[table.LOSS].tolist() == pytest.approx([-0.05, -0.3], rel=FLOAT32)
    assert table_KR[table.ENTROPY_GRAD].tolist() == pytest.approx([-0.1, -0.2], rel=FLOAT32)
    assert table_KR[table.LOGPROB_GRAD].tolist() == [0.0, 0.0]


def test_divergence_statistics() -> None:
    # log ratios: +log 2 and -log 2; ratios 2 and 0.5.
    table_KR = _weigh([-1.0, -2.0], [1.0, 1.0], rollout=[-1.0 - LOG2, -2.0 + LOG2])
    assert table_KR[table.K1].tolist() == pytest.approx([-LOG2, LOG2], rel=FLOAT32)
    assert table_KR[table.K3].tolist() == pytest.approx([1 - LOG2, LOG2 - 0.5], rel=1e-5)
    assert table_KR[table.RATIO].tolist() == pytest.approx([2.0, 0.5], rel=FLOAT32)
    assert table_KR[table.IS_EXTREME].tolist() == [0.0, 0.0]


def test_extreme_ratios_stay_finite_and_are_flagged() -> None:
    table_KR = _weigh([-0.1, -200.0], [-1.0, -1.0], rollout=[-200.0, -0.1], importance="ppo_clip")
    losses = table_KR[table.LOSS].tolist()
    assert losses == pytest.approx([math.exp(MAX_LOG_RATIO), 0.8], rel=1e-5)
    assert table_KR[table.IS_EXTREME].tolist() == [1.0, 1.0]
    # The bound is constant in the logprob: no gradient from beyond it.
    assert table_KR[table.LOGPROB_GRAD].tolist() == [0.0, 0.0]


def test_a_row_of_weight_zero_is_out_even_with_an_impossible_token() -> None:
    impossible = float("-inf")
    table_KR = _weigh([impossible, -1.0], [1.0, 1.0], weights=[0.0, 1.0])
    assert table_KR[table.LOSS].tolist() == [0.0, 1.0]
    assert table_KR[table.LOGPROB_GRAD].tolist() == [0.0, -1.0]
    assert _weigh([impossible], [0.0])[table.LOSS].item() == 0.0


def test_nan_is_never_hidden_by_a_zero() -> None:
    table_KR = _weigh([float("nan")], [0.0], weights=[0.0])
    assert table_KR[table.LOSS].isnan().item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"importance": "gspo"}, "importance must be one of .* got 'gspo'", id="name"),
        pytest.param({"kl": "k4"}, "kl must be one of .* got 'k4'", id="kl"),
        pytest.param({"min_importance": 3.0}, "got 3.0 and 2.0", id="band"),
        pytest.param({"clip_low": 1.5}, "got 1.5 and 0.2", id="clip"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Estimator(**options)
