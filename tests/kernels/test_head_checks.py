"""Every argument that does not fit is refused, with what was expected and what to do."""

import pytest
import torch
from prefixrl_kernels import RowIndex, head_logprobs, reinforce_head
from torch import Tensor

META = torch.device("meta")


def _arguments() -> dict[str, object]:
    return {
        "hidden_TH": torch.randn(4, 5, requires_grad=True),
        "weight_VH": torch.randn(11, 5),
        "targets_R": torch.tensor([0, 3, 5, 10]),
        "true_vocab_size": 11,
    }


def _loss_arguments() -> dict[str, object]:
    return {
        **_arguments(),
        "rows_R": None,
        "advantages_R": torch.ones(4),
        "num_global_loss_tokens": 4,
    }


def _main_grad(values: Tensor, main_grad: Tensor | None) -> Tensor:
    values.requires_grad_()
    if main_grad is not None:
        values.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]  # Megatron's
    return values


SHARED = [
    pytest.param({"temperature": 0.0}, "temperature must be positive, got 0.0", id="temperature"),
    pytest.param({"temperature": float("inf")}, "temperature must be", id="no-temperature"),
    pytest.param({"temperature": float("nan")}, "temperature must be", id="nan-temperature"),
    pytest.param({"true_vocab_size": 0}, "true_vocab_size must be at least 1", id="vocabulary"),
    pytest.param({"vocab_start": -1}, "vocab_start at least 0, got 11 and -1", id="start"),
    pytest.param({"targets_R": torch.zeros(4)}, r"targets \[4\] int64", id="target-dtype"),
    pytest.param(
        {"targets_R": torch.zeros(3, dtype=torch.int64)}, r"got \(3,\)", id="target-count"
    ),
    pytest.param(
        {"targets_R": torch.zeros(4, dtype=torch.int64, device=META)},
        "put them on one device",
        id="target-device",
    ),
    pytest.param({"hidden_TH": torch.zeros(4, 6)}, r"hidden \[T, H\]", id="width"),
    pytest.param({"hidden_TH": torch.zeros(2, 2, 5)}, "flatten batch and sequence", id="3d"),
    pytest.param({"hidden_TH": torch.zeros(4, 5).half()}, "one floating dtype", id="dtypes"),
    pytest.param(
        {
            "hidden_TH": torch.zeros(4, 5, dtype=torch.int32),
            "weight_VH": torch.zeros(11, 5, dtype=torch.int32),
        },
        "one floating dtype, bfloat16, float32 or float64; got torch.int32",
        id="integers",
    ),
    pytest.param(
        {"hidden_TH": torch.zeros(4, 5).half(), "weight_VH": torch.zeros(11, 5).half()},
        "got torch.float16 and torch.float16",
        id="float16",
    ),
    pytest.param({"weight_VH": torch.zeros(11, 5, device=META)}, "on one device", id="devices"),
    pytest.param({"weight_VH": torch.zeros(0, 5)}, r"weight \[V, H\] is empty", id="no-vocabulary"),
    pytest.param(
        {"hidden_TH": torch.zeros(4, 0), "weight_VH": torch.zeros(11, 0)}, "empty", id="no-hidden"
    ),
    pytest.param({"logits_dtype": torch.bfloat16}, "logits_dtype must be torch.float32", id="down"),
    pytest.param({"logits_dtype": torch.float64}, "logits_dtype must be torch.float32", id="up"),
    pytest.param({"rows_R": [0, 1, 2, 4]}, r"rows must be in \[0, 4\)", id="rows"),
    pytest.param(
        {"rows_R": RowIndex.build(None, num_hidden_rows=5, device=torch.device("cpu"))},
        "built for 5 hidden rows, got 4",
        id="foreign-index",
    ),
    pytest.param({"backend": "cuda"}, "backend must be auto, torch or triton", id="backend"),
    pytest.param({"memory_budget_bytes": 0}, "memory_budget_bytes must be positive", id="budget"),
    pytest.param({"weight_grad": "main"}, "weight_grad must be one of", id="weight-grad"),
    pytest.param(
        {"weight_grad": "main_grad", "weight_VH": _main_grad(torch.zeros(11, 5), None)},
        "needs weight.main_grad.*use weight_grad='autograd'",
        id="no-main-grad",
    ),
    pytest.param(
        {
            "weight_grad": "main_grad",
            "weight_VH": _main_grad(torch.zeros(11, 5), torch.zeros(11, 5).bfloat16()),
        },
        "grad_reduce_in_fp32",
        id="main-grad-dtype",
    ),
    pytest.param(
        {
            "weight_grad": "main_grad",
            "weight_VH": _main_grad(torch.zeros(11, 5), torch.zeros(12, 5)),
        },
        r"expected weight.main_grad \(11, 5\) float32, got \(12, 5\)",
        id="main-grad-shape",
    ),
]


@pytest.mark.parametrize(("change", "message"), SHARED)
def test_both_operations_refuse(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_logprobs(**{**_arguments(), **change})  # pyright: ignore[reportArgumentType]  # by name
    with pytest.raises(ValueError, match=message):
        reinforce_head(**{**_loss_arguments(), **change})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"num_global_loss_tokens": None},
            "give num_global_loss_tokens .* never implied",
            id="no-count",
        ),
        pytest.param({"num_global_loss_tokens": 0}, "must be positive, got 0", id="count"),
        pytest.param({"num_global_loss_tokens": float("nan")}, "must be positive", id="nan-count"),
        pytest.param({"importance": "tis"}, "importance must be one of", id="importance"),
        pytest.param({"importance": "cispo"}, "needs rollout_logprobs_R", id="no-rollout"),
        pytest.param({"kl": "k4"}, "kl must be one of", id="kl"),
        pytest.param({"kl": "k3"}, "needs reference_logprobs_R", id="no-reference"),
        pytest.param({"kl_coefficient": 0.1}, "without kl has no effect", id="kl-coefficient"),
        pytest.param(
            {"min_importance": 3.0}, "0 <= min_importance <= max_importance, got 3.0", id="band"
        ),
        pytest.param({"clip_low": 1.5}, "clip_low <= 1", id="clip-low"),
        pytest.param({"clip_high": -0.1}, "clip_high >= 0", id="clip-high"),
        pytest.param({"mode": "fast"}, "mode must be auto or one of", id="mode"),
        pytest.param({"mode": "no_grad"}, r"call it under torch.no_grad\(\)", id="no-grad"),
        pytest.param({"advantages_R": torch.ones(3)}, r"expected advantages_R \[4\]", id="count-A"),
        pytest.param({"advantages_R": torch.ones(4).half()}, "in float32, got", id="dtype-A"),
        pytest.param({"weights_R": torch.ones(4, device=META)}, "on meta", id="device-w"),
        pytest.param(
            {"weights_R": torch.ones(4, requires_grad=True)}, r"weights_R.detach\(\)", id="grad-w"
        ),
        pytest.param({"rollout_logprobs_R": torch.ones(4, 1)}, r"got \(4, 1\)", id="rollout"),
        pytest.param({"reference_logprobs_R": torch.ones(5)}, r"got \(5,\)", id="reference"),
        pytest.param({"promised_upstream": 1.0}, "only with weight_grad='main_grad'", id="promise"),
    ],
)
def test_the_loss_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reinforce_head(**{**_loss_arguments(), **change})  # pyright: ignore[reportArgumentType]


def test_weights_alone_are_a_normalisation() -> None:
    arguments = {**_loss_arguments(), "num_global_loss_tokens": None}
    loss, _ = reinforce_head(**arguments, weights_R=torch.full((4,), 0.25))  # pyright: ignore[reportArgumentType]
    counted, _ = reinforce_head(**{**arguments, "num_global_loss_tokens": 4})  # pyright: ignore[reportArgumentType]
    assert loss.item() == pytest.approx(counted.item(), abs=1e-6)
