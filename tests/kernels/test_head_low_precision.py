"""bfloat16: one rounding per result, and never worse than plain PyTorch in bfloat16."""

from dataclasses import replace

import pytest
import torch
from prefixrl_kernels.head.row_kernels import RowKernels
from prefixrl_kernels.head.triton_rows import TritonRows
from prefixrl_kernels.head_plan import Mode

from tests.support.head_cases import (
    IS_INTERPRETED,
    TRAINING_MODES,
    assert_matches,
    make_case,
    row_tolerance,
    run_head,
    run_oracle,
)
from tests.support.head_oracle import (
    OracleLoss,
    assert_close,
    assert_relative_norm,
    plain_low_precision,
    relative_norm,
)

LOSS = OracleLoss(importance="truncated", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.3)

GRADIENT_TOLERANCE = 6e-3
"""Frobenius norm: what rounding the gradient of the logits, and then the result, once to bfloat16
costs at most. Rounded logits would be beyond it."""


def _is_truncating(kernels: RowKernels) -> bool:
    """Return whether float32 becomes bfloat16 by truncation, as in Triton's interpreter.

    The GPU rounds to nearest. Truncation has twice the largest error, and one sign: in a product
    over the vocabulary it adds up where rounding cancels.
    """
    return IS_INTERPRETED and isinstance(kernels, TritonRows)


def _allowance(kernels: RowKernels) -> float:
    """Return how many times plain PyTorch's error a gradient's error may be."""
    return 3.0 if _is_truncating(kernels) else 1.1


def _gradient_tolerance(kernels: RowKernels) -> float:
    return 1.5 * GRADIENT_TOLERANCE if _is_truncating(kernels) else GRADIENT_TOLERANCE


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("logit_std", [1.0, 4.0])
def test_errors_are_no_larger_than_those_of_plain_bfloat16(
    kernels: RowKernels, mode: Mode, logit_std: float
) -> None:
    case = make_case(
        num_rows=12,
        vocab=130,
        hidden_size=64,
        logit_std=logit_std,
        dtype=torch.bfloat16,
        has_all_inputs=False,
    )
    expected = run_oracle(case)
    plain_logprobs_R, plain_hidden_TH, plain_weight_VH = plain_low_precision(
        case.hidden_TH,
        case.weight_VH,
        case.targets_R,
        case.loss_rows.advantages,
        num_global_loss_tokens=case.loss_rows.num_global_loss_tokens,
    )
    result = run_head(case, kernels, mode, plan_rows=(7, 3))
    assert_matches(
        result,
        expected,
        row_tolerance=row_tolerance(case),
        gradient_tolerance=_gradient_tolerance(kernels),
    )
    ours = (
        result.statistics["logprobs_R"].double().cpu() - expected.statistics["logprobs_R"]
    ).abs()
    plain = (plain_logprobs_R.double().cpu() - expected.statistics["logprobs_R"]).abs()
    assert ours.max() < 0.01 * plain.max()  # the logits are not rounded
    for name, got, theirs, truth in (
        ("hidden", result.grad_hidden_TH, plain_hidden_TH, expected.grad_hidden_TH),
        ("weight", result.grad_weight_VH, plain_weight_VH, expected.grad_weight_VH),
    ):
        assert got.dtype == torch.bfloat16
        assert_relative_norm(name, got, truth, _allowance(kernels) * relative_norm(theirs, truth))


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_bfloat16_logits_are_those_of_an_ordinary_output_layer(
    kernels: RowKernels, mode: Mode
) -> None:
    case = make_case(num_rows=6, vocab=37, hidden_size=32, dtype=torch.bfloat16)
    case = replace(
        case, loss_rows=replace(case.loss_rows, rollout_logprobs=None, reference_logprobs=None)
    )
    result = run_head(case, kernels, mode, plan_rows=(4, 2), logits_dtype=torch.bfloat16)
    expected = run_oracle(case)
    # |z| < 16: steps of 2^-4 from 8 on, so half a step at the target and less in the log sum.
    for name in ("logprobs_R", "entropies_R"):
        assert_close(name, result.statistics[name], expected.statistics[name], atol=0.07)
    mean = (result.statistics["logprobs_R"].cpu() - expected.statistics["logprobs_R"]).abs().mean()
    assert mean < 0.02
    plain_logprobs_R, plain_hidden_TH, plain_weight_VH = plain_low_precision(
        case.hidden_TH,
        case.weight_VH,
        case.targets_R,
        case.loss_rows.advantages * case.loss_rows.weights,  # pyright: ignore[reportOperatorIssue]  # given
        num_global_loss_tokens=case.loss_rows.num_global_loss_tokens,
    )
    assert_close("plain", result.statistics["logprobs_R"], plain_logprobs_R, atol=2e-6)
    for name, got, theirs, truth in (
        ("hidden", result.grad_hidden_TH, plain_hidden_TH, expected.grad_hidden_TH),
        ("weight", result.grad_weight_VH, plain_weight_VH, expected.grad_weight_VH),
    ):
        assert_relative_norm(name, got, truth, _allowance(kernels) * relative_norm(theirs, truth))


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_many_options_in_bfloat16(kernels: RowKernels, mode: Mode) -> None:
    case = make_case(
        rows_R=(0, 2, 2, 1, 4, 2),
        num_hidden_rows=5,
        vocab=37,
        dtype=torch.bfloat16,
        temperature=0.8,
    )
    result = run_head(case, kernels, mode, LOSS, plan_rows=(4, 3))
    assert result.loss.dtype == result.statistics["k3_R"].dtype == torch.float32
    assert_matches(
        result,
        run_oracle(case, LOSS),
        row_tolerance=row_tolerance(case),
        gradient_tolerance=_gradient_tolerance(kernels),
    )


def test_an_upstream_that_is_no_power_of_two_costs_at_most_another_rounding(
    kernels: RowKernels,
) -> None:
    case = make_case(num_rows=8, vocab=37, hidden_size=32, dtype=torch.bfloat16)
    expected, bound = run_oracle(case), _gradient_tolerance(kernels)
    for mode in TRAINING_MODES:
        result = run_head(case, kernels, mode, upstream=0.37, plan_rows=(5, 5))
        assert_relative_norm("hidden", result.grad_hidden_TH, expected.grad_hidden_TH * 0.37, bound)
        assert_relative_norm("weight", result.grad_weight_VH, expected.grad_weight_VH * 0.37, bound)


def test_a_token_that_occurs_once_keeps_its_gradient(kernels: RowKernels) -> None:
    # Its row of the weight's gradient is one row's share: no sum over rows may drown it.
    case = make_case(
        num_rows=12, vocab=37, hidden_size=16, dtype=torch.bfloat16, has_all_inputs=False
    )
    targets_R = case.targets_R.clone()
    targets_R[:] = 3
    targets_R[7] = 30
    case = replace(case, targets_R=targets_R)
    result = run_head(case, kernels, "grad_in_forward", plan_rows=(5, 5))
    expected = run_oracle(case)
    assert_relative_norm(
        "rare token",
        result.grad_weight_VH[30],
        expected.grad_weight_VH[30],
        1e-2 if _is_truncating(kernels) else 6e-3,
    )
