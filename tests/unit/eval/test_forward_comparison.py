"""What is said of two models' logprobs, NaN included."""

import math

import pytest
import torch

from prefixrl_mcore.eval import forward_comparison
from prefixrl_mcore.eval.forward_comparison import ForwardComparison

NAN = float("nan")


def compare(ours: list[float], theirs: list[float]) -> ForwardComparison:
    one, other = (
        forward_comparison._Predictions(
            logprobs=torch.tensor(logprobs), top1=torch.zeros(len(logprobs), dtype=torch.int64)
        )
        for logprobs in (ours, theirs)
    )
    return forward_comparison._compare(one, other)


def test_the_largest_difference_is_told() -> None:
    found = compare([-1.0, -2.0, -3.0], [-1.0, -2.5, -3.25])
    assert found.max_logprob_difference == 0.5
    assert (found.num_tokens, found.num_nonfinite) == (3, (0, 0))


@pytest.mark.parametrize(
    ("ours", "theirs", "counts"),
    [
        ([-1.0, NAN], [-1.0, -2.0], (1, 0)),
        ([-1.0, NAN], [-1.0, NAN], (1, 1)),
        ([-1.0, -math.inf], [-1.0, -math.inf], (1, 1)),
    ],
)
def test_numbers_that_are_not_finite_are_never_equal(
    ours: list[float], theirs: list[float], counts: tuple[int, int]
) -> None:
    found = compare(ours, theirs)
    assert math.isnan(found.max_logprob_difference)
    assert found.num_nonfinite == counts
