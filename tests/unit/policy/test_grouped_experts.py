"""Grouped experts in one process: the numbers of sequential ones, and where they are chosen."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefixrl_mcore.config.model_shape import ModelShape, read_model_shape
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.policy.experts import GroupedLinear, choose_experts
from tests.support.policies import build_policy, gradients_of, make_batch, max_difference
from tests.support.tiny_models import build_tiny_qwen3_moe, write_model_folder

TOLERANCE = 1e-6
"""float32: other orders of summation."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_tiny_qwen3_moe(num_experts=6)
    with torch.no_grad():
        for layer in model.model.layers:  # the last expert gets no token, the one before few
            layer.mlp.gate.weight[-1].zero_()
            layer.mlp.gate.weight[-1, 0] = -100.0
    return write_model_folder(model, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_sequential_experts(folder: Path, dtype: str) -> None:
    by_experts: list[dict[str, Tensor]] = []
    for experts in ("sequential", "grouped"):
        policy = build_policy(folder, experts=experts, dtype=dtype)
        policy.update(make_batch())
        by_experts.append(gradients_of(policy))
    sequential, grouped = by_experts
    assert max_difference(grouped, sequential) < (TOLERANCE if dtype == "float32" else 2e-2)
    assert max(float(g.abs().max()) for name, g in sequential.items() if "experts" in name) > 0.01


def grouped_linear(folder: Path) -> GroupedLinear:
    modules = build_policy(folder, experts="grouped").model_chunks[0].modules()
    return next(module for module in modules if isinstance(module, GroupedLinear))


def test_an_expert_without_rows_gets_no_gradient_and_no_rows_at_all_are_fine(folder: Path) -> None:
    linear = grouped_linear(folder)
    rows_NI = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    output_NO, bias = linear(rows_NI, [2, 0, 3, 0, 0, 0])
    assert bias is None
    assert torch.allclose(output_NO[:2], rows_NI[:2] @ linear.weight[0].t(), atol=TOLERANCE)
    assert torch.allclose(output_NO[2:], rows_NI[2:] @ linear.weight[2].t(), atol=TOLERANCE)
    (gradient,) = torch.autograd.grad((output_NO**2).sum(), linear.weight)
    assert [bool(expert.any()) for expert in gradient] == [True, False, True, False, False, False]
    nothing_NO, _ = linear(rows_NI[:0], [0] * 6)
    (gradient,) = torch.autograd.grad((nothing_NO**2).sum(), linear.weight)
    assert nothing_NO.shape == (0, 96)
    assert not gradient.any()


def shape_of(width: int) -> ModelShape:
    config = build_tiny_qwen3_moe().config
    config.moe_intermediate_size = width
    return read_model_shape(config.to_dict() | {"architectures": ["Qwen3MoeForCausalLM"]})


@pytest.mark.parametrize(
    ("dtype", "device", "width", "asked", "expected"),
    [
        ("bfloat16", "cuda", 48, None, "grouped"),
        ("bfloat16", "cuda", 44, None, "sequential"),  # rows of 88 bytes
        ("float32", "cuda", 48, None, "sequential"),
        ("bfloat16", "cpu", 48, None, "sequential"),
        ("float32", "cpu", 48, "grouped", "grouped"),
        ("bfloat16", "cuda", 48, "sequential", "sequential"),
    ],
)
def test_experts_are_grouped_where_that_is_fast_and_the_choice_is_said(
    caplog: pytest.LogCaptureFixture,
    dtype: str,
    device: str,
    width: int,
    asked: str | None,
    expected: str,
) -> None:
    config = PolicyConfig.model_validate({"dtype": dtype, "experts": {"implementation": asked}})
    with caplog.at_level(logging.INFO):
        assert choose_experts(shape_of(width), config, torch.device(device)) == expected
    assert f"experts: {expected}" in caplog.text
