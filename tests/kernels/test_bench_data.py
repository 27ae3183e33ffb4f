"""The benchmark's data, and the truth that everything is compared with."""

from typing import get_args

import pytest
import torch
from bench.cases import (
    IGNORE_INDEX,
    Mask,
    active_positions,
    build_inputs,
    select_rows,
    sweep,
)
from bench.implementation import Outputs, gradient_errors
from bench.reference import Errors, compute_truth, relative_error

from tests.support.bench_fakes import small_case

CPU = torch.device("cpu")


def test_truth_equals_autograd_in_float64() -> None:
    inputs = build_inputs(small_case(), CPU, seed=0)
    truth = compute_truth(inputs, entropy_coefficient=0.3)
    hidden_TH = inputs.hidden_RH.double().requires_grad_()
    weight_VH = inputs.weight_VH.double().requires_grad_()
    logprobs_AV = torch.log_softmax(hidden_TH[inputs.active_rows] @ weight_VH.T, dim=1)
    logprobs_A = logprobs_AV.gather(1, inputs.active_targets[:, None])[:, 0]
    entropies_A = -(logprobs_AV.exp() * logprobs_AV).sum(1)
    loss = (-logprobs_A - 0.3 * entropies_A).mean()
    loss.backward()
    torch.testing.assert_close(truth.logprobs_A, logprobs_A.detach(), atol=1e-12, rtol=0)
    assert truth.loss == pytest.approx(loss.item(), abs=1e-12)
    assert hidden_TH.grad is not None
    assert weight_VH.grad is not None
    assert relative_error(truth.grad_hidden_TH, hidden_TH.grad) < 1e-7  # stored in float32
    assert relative_error(truth.grad_weight_VH, weight_VH.grad) < 1e-7
    assert truth.max_abs_logit == pytest.approx(
        (hidden_TH[inputs.active_rows] @ weight_VH.T).abs().max().item()
    )


def test_errors_are_relative_norms_and_nan_is_never_within_bounds() -> None:
    assert relative_error(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])) == 1.25
    assert relative_error(torch.zeros(2, 1), torch.zeros(2, 1)) == 0.0
    assert relative_error(torch.ones(2, 1), torch.zeros(2, 1)) == float("inf")
    bounds = Errors(logprob_max_abs=1.0, hidden_relative=1.0)
    errors = Errors(logprob_max_abs=float("nan"), hidden_relative=1.0, weight_relative=9.0)
    assert errors.exceeded(bounds) == ["logprob_max_abs"]


def test_gradients_of_inactive_rows_count_as_errors() -> None:
    inputs = build_inputs(small_case(), CPU, seed=0)
    truth = compute_truth(inputs)
    outputs = Outputs(
        loss=None,
        grad_hidden_RH=truth.grad_hidden_TH.clone(),
        grad_weight_VH=truth.grad_weight_VH,
    )
    assert gradient_errors(outputs, "all", truth).hidden_relative == 0.0
    outputs.grad_hidden_RH[0] = truth.grad_hidden_TH.norm()  # the first token is of a prompt
    assert gradient_errors(outputs, "all", truth).hidden_relative == pytest.approx(4.0)


@pytest.mark.parametrize("mask", get_args(Mask))
def test_masks_have_the_right_number_of_active_tokens(mask: str) -> None:
    case = small_case(0.3, mask=mask, num_tokens=5000)
    positions = active_positions(case, seed=1).tolist()
    assert len(positions) == case.num_active == 1500
    assert positions == sorted(set(positions))
    assert 0 <= positions[0] < positions[-1] < 5000
    ends = [position for position in positions if position + 1 not in set(positions)]
    assert (ends == [2047, 4095, 4999]) == (mask == "contiguous")


def test_data_has_the_logits_of_a_trained_model_and_no_zeros() -> None:
    case = small_case(0.5, hidden_size=256, vocab_size=500, num_tokens=400)
    inputs = build_inputs(case, CPU, seed=0)
    logits_TV = inputs.hidden_RH.float() @ inputs.weight_VH.float().T
    assert 2.5 < logits_TV.std().item() < 3.5
    is_active_T = inputs.targets_R != IGNORE_INDEX
    assert is_active_T.nonzero()[:, 0].tolist() == inputs.active_rows.tolist()
    logits_A = logits_TV[is_active_T].gather(1, inputs.active_targets[:, None])
    assert 0.55 < (logits_A > 6.0).float().mean().item() < 0.85
    assert (inputs.hidden_RH == 0).sum() + (inputs.weight_VH == 0).sum() == 0
    packed = select_rows(inputs, "active")
    torch.testing.assert_close(packed.hidden_RH, inputs.hidden_RH[inputs.active_rows])
    assert packed.targets_R.equal(inputs.active_targets)


def test_the_default_sweep_has_every_shape_token_count_fraction_and_mask() -> None:
    cases = sweep()
    assert len(cases) == len(set(cases)) == 4 * 3 * (2 + 2 + 1)
    with pytest.raises(ValueError, match="hidden/vocabulary"):
        sweep(["4096"])
