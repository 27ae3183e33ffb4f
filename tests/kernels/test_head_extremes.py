"""Logits at the ends of float32, through the whole head: given exactly, by a unit weight."""

import math
from dataclasses import replace

import pytest
import torch
from prefixrl_kernels.head.row_kernels import RowKernels
from prefixrl_kernels.head_plan import Mode
from torch import Tensor

from tests.support.head_cases import (
    TRAINING_MODES,
    HeadResult,
    case_of_logits,
    run_head,
    run_oracle,
)
from tests.support.head_oracle import OracleLoss, assert_close

VOCAB = 19

FLOAT32_SPACING = 2.0**-23
"""Relative distance of neighbouring float32 values."""

LOSS = OracleLoss(entropy_coefficient=0.3)


def _logits(*, offset: float = 0.0, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(2, VOCAB, generator=generator) * 2.0 - 1.0) * spread + offset


EXTREMES = [
    pytest.param(_logits(offset=-3e4), id="all-very-negative"),
    pytest.param(_logits(offset=3e4), id="all-very-positive"),
    pytest.param(_logits(spread=1e4), id="spread-of-ten-thousand"),
    pytest.param(_logits(offset=-1e30), id="beyond-exponents"),
    pytest.param(torch.full((2, VOCAB), -7.5), id="uniform"),
    pytest.param(_logits().round() * 3.0, id="several-maxima"),
    pytest.param(torch.eye(2, VOCAB) * 200.0, id="one-hot"),
    pytest.param(torch.eye(2, VOCAB) * (math.log(VOCAB - 1) + math.log(999.0)), id="p-0.999"),
]


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("logits_RV", EXTREMES)
def test_extreme_logits_equal_the_definition(
    kernels: RowKernels, mode: Mode, logits_RV: Tensor
) -> None:
    case = case_of_logits(logits_RV, [0, 1], [1.0, -2.0])
    result, expected = run_head(case, kernels, mode, LOSS), run_oracle(case, LOSS)
    # The logits are exact here, so what is left is the spacing of float32 at the row's range.
    spread = float(logits_RV.amax(1).sub(logits_RV.amin(1)).max())
    atol = 8 * FLOAT32_SPACING * (1.0 + spread)
    for name in ("logprobs_R", "entropies_R"):
        assert_close(name, result.statistics[name], expected.statistics[name], atol=atol)
    assert (result.statistics["entropies_R"] >= 0.0).all()
    assert (result.statistics["logprobs_R"] <= 0.0).all()
    assert_close("loss", result.loss, expected.loss, atol=4 * atol)
    assert_close("hidden", result.grad_hidden_TH, expected.grad_hidden_TH, atol=4e-6)


def test_a_certain_token_has_no_entropy_and_no_gradient(kernels: RowKernels) -> None:
    case = case_of_logits(torch.eye(1, VOCAB) * 200.0, [0], [1.0])
    result = run_head(case, kernels, "grad_in_forward", LOSS)
    assert result.statistics["logprobs_R"].item() == 0.0
    assert result.statistics["entropies_R"].item() == 0.0
    assert result.grad_hidden_TH.abs().max() < 1e-30


def test_a_uniform_row_has_the_entropy_of_its_vocabulary(kernels: RowKernels) -> None:
    case = case_of_logits(torch.full((1, VOCAB), -7.5), [3], [1.0])
    result = run_head(case, kernels, "recompute")
    assert result.statistics["entropies_R"].item() == pytest.approx(math.log(VOCAB), abs=1e-6)
    assert result.statistics["logprobs_R"].item() == pytest.approx(-math.log(VOCAB), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_a_likely_target_keeps_its_gradient(
    kernels: RowKernels, mode: Mode, dtype: torch.dtype
) -> None:
    # The gradient at the target is p - 1 = -0.001: from a p rounded to bfloat16 it would be 0, and
    # from one in float32 it keeps 1e-7 / 1e-3 of relative error.
    peak = math.log(VOCAB - 1) + math.log(999.0)
    case = case_of_logits((torch.eye(1, VOCAB) * peak).to(dtype), [0], [1.0])
    for logits_dtype in (torch.float32, dtype):
        result = run_head(case, kernels, mode, logits_dtype=logits_dtype)
        expected = run_oracle(case)  # of the rounded logits, which the head is given
        rtol = 4e-4 if dtype == torch.float32 else 2.0**-7  # truncated by the interpreter
        for name in ("grad_hidden_TH", "grad_weight_VH"):
            assert_close(name, getattr(result, name), getattr(expected, name), atol=1e-9, rtol=rtol)
        assert result.grad_hidden_TH[0, 0].item() == pytest.approx(-1e-3, rel=0.05)


def test_the_order_of_equal_logits_is_immaterial(kernels: RowKernels) -> None:
    logits_RV = torch.full((1, VOCAB), -2.0)
    results: list[HeadResult] = []
    for places in ([0, 5], [7, VOCAB - 1]):
        peaked_RV = logits_RV.clone()
        peaked_RV[0, places] = 4.0
        results.append(run_head(case_of_logits(peaked_RV, places[:1], [1.0]), kernels, "recompute"))
    one, other = results
    for name in ("logprobs_R", "entropies_R"):
        assert_close(name, one.statistics[name], other.statistics[name], atol=1e-6)
    assert one.statistics["logprobs_R"].item() == pytest.approx(
        -math.log(2.0 + (VOCAB - 2) * math.exp(-6.0)), abs=1e-6
    )


def test_a_shift_of_all_logits_changes_nothing(kernels: RowKernels) -> None:
    logits_RV = _logits().mul(64.0).round() / 64.0  # so that the shifted logits are exact
    one = run_head(case_of_logits(logits_RV, [0, 1], [1.0, -2.0]), kernels, "save_dlogits", LOSS)
    shifted = case_of_logits(logits_RV - 2.0**15, [0, 1], [1.0, -2.0])
    other = run_head(shifted, kernels, "save_dlogits", LOSS)
    for name, values_R in one.statistics.items():
        assert torch.equal(values_R, other.statistics[name])
    assert torch.equal(one.grad_hidden_TH, other.grad_hidden_TH)


def test_a_huge_temperature_flattens_and_a_tiny_one_sharpens(kernels: RowKernels) -> None:
    case = case_of_logits(_logits(spread=5.0), [0, 1], [1.0, -2.0])
    for temperature in (1e-3, 1e6):
        tempered = replace(case, temperature=temperature)
        result, expected = (
            run_head(tempered, kernels, "recompute", LOSS),
            run_oracle(tempered, LOSS),
        )
        for name in ("logprobs_R", "entropies_R"):
            ours_R = result.statistics[name]
            assert_close(name, ours_R, expected.statistics[name], atol=2e-6, rtol=2e-6)
        scale = max(1.0, 1.0 / temperature)
        assert_close("hidden", result.grad_hidden_TH, expected.grad_hidden_TH, atol=4e-6 * scale)
