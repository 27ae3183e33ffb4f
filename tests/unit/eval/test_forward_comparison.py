"""What is said of two models' logprobs, NaN included."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixrl_mcore.checkpoint.convert.comparison import open_model
from prefixrl_mcore.eval import forward_comparison
from prefixrl_mcore.eval.forward_comparison import ForwardComparison, compare_forward
from tests.support.tiny_models import write_tiny_qwen3

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


def test_a_model_of_float16_and_bfloat16_is_run_in_a_type_that_holds_both(tmp_path: Path) -> None:
    half, wide = (write_tiny_qwen3(tmp_path / name) for name in ("half", "wide"))
    tensors = load_file(half / "model.safetensors")
    halved = {
        name: tensor.to(torch.float16 if "mlp" in name else torch.bfloat16)
        for name, tensor in tensors.items()
    }
    widened = {name: tensor.float() for name, tensor in halved.items()}
    for folder, weights in ((half, halved), (wide, widened)):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with open_model(half) as one, open_model(wide) as other:
        found = compare_forward(one, other, ["1 + 2 = 3", "a b c d"])
    assert (found.max_logprob_difference, found.top1_agreement) == (0.0, 1.0)
