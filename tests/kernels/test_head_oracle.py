"""The oracle against numbers worked by hand, and the comparisons against known differences."""

import math
from typing import Any

import pytest
import torch

from tests.support.head_cases import nan_filled_memory
from tests.support.head_oracle import (
    OracleLoss,
    OracleRows,
    assert_bitwise,
    assert_close,
    assert_relative_norm,
    logprobs_of_logits,
    oracle_loss,
    relative_norm,
)

NAN, INF = float("nan"), float("inf")


def test_a_failure_names_the_worst_element_its_error_and_its_bound() -> None:
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    got = torch.tensor([[1.0, 2.5], [3.0, 5.0]])
    message = r"x: 2 of 4 .* worst at \[1, 1\]: got 5, expected 4, error 1, bound 0.14"
    with pytest.raises(AssertionError, match=message):
        assert_close("x", got, expected, atol=0.1, rtol=0.01)
    assert_close("x", got, expected, atol=1.0)


@pytest.mark.parametrize(
    ("got", "expected"),
    [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, -INF), (NAN, INF)],
)
def test_what_is_not_finite_must_stand_at_the_same_place(got: float, expected: float) -> None:
    with pytest.raises(AssertionError, match=r"worst at \[1\]"):
        assert_close("x", torch.tensor([0.0, got]), torch.tensor([0.0, expected]), atol=1, rtol=1)
    assert_close("x", torch.tensor([got]), torch.tensor([got]), atol=0.0)


def test_shapes_and_dtypes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close("x", torch.zeros(2), torch.zeros(1), atol=1.0)
    with pytest.raises(AssertionError, match="float64"):
        assert_bitwise("x", torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(AssertionError, match=r"worst at \[0\]"):
        assert_bitwise("x", torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor([2.0])))


def test_the_relative_norm_is_that_of_the_difference() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_norm(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_norm(torch.zeros(2), torch.zeros(2)) == 0.0
    assert_relative_norm("g", expected, expected, 0.0)
    with pytest.raises(AssertionError, match=r"relative error 0.1 .* worst at \[1\]: got 4.5"):
        assert_relative_norm("g", expected + torch.tensor([0.0, 0.5]), expected, 0.09)
    with pytest.raises(AssertionError, match="nan"):
        assert_relative_norm("g", torch.tensor([NAN, 4.0]), expected, 0.5)


def test_logprobs_and_entropy_by_hand() -> None:
    logits_RV = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 0.0]], dtype=torch.float64).log()
    logprobs_R, entropies_R = logprobs_of_logits(logits_RV, torch.tensor([1, 0]))
    assert logprobs_R.tolist() == pytest.approx([math.log(2 / 8), math.log(1 / 2)])
    by_hand = -(1 / 8 * math.log(1 / 8) + 2 / 8 * math.log(2 / 8) + 5 / 8 * math.log(5 / 8))
    assert entropies_R.tolist() == pytest.approx([by_hand, math.log(2)])


# One row: logprob log 0.6, rollout log 0.2 (ratio 3), reference log 0.3, entropy 0.5, weight 2,
# advantage as given, 4 tokens.
@pytest.mark.parametrize(
    ("importance", "advantage", "term", "factor"),
    [
        ("none", 1.5, 1.5 * math.log(0.6), 1.5),
        ("truncated", 1.5, 1.5 * 2.0 * math.log(0.6), 3.0),
        ("masked", 1.5, 0.0, 0.0),
        ("ppo_clip", 1.5, 1.5 * 1.3, 0.0),
        ("ppo_clip", -1.5, -1.5 * 3.0, -4.5),
        ("cispo", 1.5, 1.5 * 1.3 * math.log(0.6), 1.5 * 1.3),
    ],
)
def test_each_estimator_by_hand(
    importance: Any, advantage: float, term: float, factor: float
) -> None:
    logprobs_R = torch.tensor([math.log(0.6)], dtype=torch.float64, requires_grad=True)
    rows = OracleRows(
        advantages=torch.tensor([advantage], dtype=torch.float64),
        weights=torch.tensor([2.0], dtype=torch.float64),
        rollout_logprobs=torch.tensor([math.log(0.2)], dtype=torch.float64),
        reference_logprobs=torch.tensor([math.log(0.3)], dtype=torch.float64),
        num_global_loss_tokens=4.0,
    )
    options = OracleLoss(
        importance=importance,
        clip_high=0.3,
        kl="k3",
        kl_coefficient=0.1,
        entropy_coefficient=0.2,
    )
    entropies_R = torch.tensor([0.5], dtype=torch.float64)
    loss, statistics = oracle_loss(logprobs_R, entropies_R, rows, options)
    k3 = 0.5 - 1.0 + math.log(2.0)
    assert loss.item() == pytest.approx(2.0 / 4.0 * (-term + 0.1 * k3 - 0.2 * 0.5))
    (grad_R,) = torch.autograd.grad(loss, logprobs_R)
    assert grad_R.item() == pytest.approx(0.5 * (-factor + 0.1 * (1.0 - 0.5)))
    assert statistics["k1_R"].item() == pytest.approx(-math.log(3.0))
    assert statistics["k3_R"].item() == pytest.approx(3.0 - 1.0 - math.log(3.0))
    assert statistics["reference_k1_R"].item() == pytest.approx(math.log(2.0))


def test_unwritten_memory_is_nan_in_these_tests() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    torch.use_deterministic_algorithms(False)
    with nan_filled_memory():
        assert torch.zeros(1).new_empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
