"""Every importance, KL and entropy option against autograd of its definition."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from prefixrl_kernels import head_logprobs, reinforce_head
from prefixrl_kernels.head.estimators import IMPORTANCES, KLS
from prefixrl_kernels.head.reference import TorchRows
from prefixrl_kernels.head.row_kernels import RowKernels
from prefixrl_kernels.head_plan import Mode
from torch import Tensor

from tests.support.head_cases import (
    DEVICE,
    TRAINING_MODES,
    HeadCase,
    assert_matches,
    case_of_logits,
    make_case,
    row_tolerance,
    run_head,
    run_oracle,
)
from tests.support.head_oracle import OracleLoss, assert_bitwise, assert_close

OPTIONS = [
    pytest.param(
        OracleLoss(
            importance=importance,
            clip_high=0.28,
            kl=kl,
            kl_coefficient=0.0 if kl == "none" else 0.2,
            entropy_coefficient=entropy,
        ),
        id=f"{importance}-{kl}-{'entropy' if entropy else 'plain'}",
    )
    for importance, kl, entropy in product(IMPORTANCES, KLS, (0.0, 0.3))
]


@pytest.fixture(scope="module")
def case() -> HeadCase:
    """Eight rows whose ratios are 0.3 to 3 and whose advantages have both signs."""
    case = make_case(num_rows=8, vocab=11)
    logprobs_R = run_oracle(case).statistics["logprobs_R"].to(DEVICE)
    ratios_R = torch.tensor([0.3, 0.3, 0.9, 0.9, 1.15, 1.15, 3.0, 3.0], device=DEVICE)
    signs_R = torch.tensor([1.0, -1.0] * 4, device=DEVICE)
    loss_rows = replace(
        case.loss_rows,
        advantages=case.loss_rows.advantages.abs() * signs_R,
        rollout_logprobs=(logprobs_R - ratios_R.log()).float(),
    )
    return replace(case, loss_rows=loss_rows)


@pytest.mark.parametrize("options", OPTIONS)
def test_values_gradients_and_statistics_of_each_option(
    case: HeadCase, kernels: RowKernels, options: OracleLoss
) -> None:
    modes = TRAINING_MODES if isinstance(kernels, TorchRows) else TRAINING_MODES[:1]
    expected = run_oracle(case, options)
    for mode in modes:
        result = run_head(case, kernels, mode, options, plan_rows=(5, 3))
        assert_matches(result, expected, row_tolerance=row_tolerance(case))


def test_the_case_has_rows_on_both_sides_of_every_bound(case: HeadCase) -> None:
    for importance, clipped in (
        ("none", [0, 0, 0, 0, 0, 0, 0, 0]),
        ("truncated", [0, 0, 0, 0, 0, 0, 1, 1]),
        ("masked", [1, 1, 0, 0, 0, 0, 1, 1]),
        ("cispo", [1, 1, 0, 0, 0, 0, 1, 1]),
        ("ppo_clip", [0, 1, 0, 0, 0, 0, 1, 0]),
    ):
        statistics = run_oracle(case, OracleLoss(importance=importance)).statistics  # pyright: ignore[reportArgumentType]  # literals
        assert statistics["is_clipped_R"].int().tolist() == clipped, importance


def _loss_of(
    case: HeadCase, options: OracleLoss, mode: Mode, hidden: Tensor, weight: Tensor
) -> Tensor:
    return reinforce_head(
        hidden,
        weight,
        case.targets_R,
        [2, 0, 2],
        case.loss_rows.advantages,
        rollout_logprobs_R=case.loss_rows.rollout_logprobs,
        reference_logprobs_R=case.loss_rows.reference_logprobs,
        weights_R=case.loss_rows.weights,
        true_vocab_size=case.true_vocab_size,
        temperature=0.8,
        importance=options.importance,
        kl=options.kl,
        kl_coefficient=options.kl_coefficient,
        entropy_coefficient=options.entropy_coefficient,
        mode=mode,
        backend="torch",
    )[0]


@pytest.mark.parametrize("mode", ["save_dlogits", "recompute"])
@pytest.mark.parametrize(
    "options",
    [
        # The estimators without a constant ratio: a difference quotient sees them whole.
        OracleLoss(),
        OracleLoss(kl="k1", kl_coefficient=0.3),
        OracleLoss(kl="k2", kl_coefficient=0.3, entropy_coefficient=0.2),
        OracleLoss(importance="ppo_clip", kl="k3", kl_coefficient=0.3, entropy_coefficient=0.2),
    ],
)
def test_the_loss_passes_gradcheck(mode: Mode, options: OracleLoss) -> None:
    case = make_case(num_rows=3, vocab=6, true_vocab_size=5, hidden_size=3, dtype=torch.float64)
    hidden, weight = case.hidden_TH.requires_grad_(), case.weight_VH.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: _loss_of(case, options, mode, h, w), (hidden, weight), atol=1e-8, rtol=1e-6
    )


def test_logprobs_and_entropies_pass_gradcheck() -> None:
    case = make_case(num_rows=4, vocab=6, true_vocab_size=5, hidden_size=3, dtype=torch.float64)

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return head_logprobs(
            hidden,
            weight,
            case.targets_R[:3],
            rows_R=[3, 1, 3],
            true_vocab_size=5,
            temperature=0.7,
            backend="torch",
        )

    leaves = (case.hidden_TH.requires_grad_(), case.weight_VH.requires_grad_())
    assert torch.autograd.gradcheck(outputs, leaves, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("importance", ["truncated", "masked", "cispo"])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_importance_weights_are_constants(kernels: RowKernels, mode: Mode, importance: Any) -> None:
    # Logprob log 1/4, ratio 1.1, inside every band: d loss/dz = -A 1.1 (onehot - p). A ratio that
    # is differentiated would give 1 + log(1/4) = -0.39 times that.
    case = case_of_logits(torch.tensor([[1.0, 2.0, 5.0]]).log(), [1], [2.0])
    rollout_R = torch.tensor([math.log(1 / 4) - math.log(1.1)], device=DEVICE)
    case = replace(case, loss_rows=replace(case.loss_rows, rollout_logprobs=rollout_R))
    result = run_head(case, kernels, mode, OracleLoss(importance=importance))
    by_hand = [2.0 * 1.1 * (1 / 8), -2.0 * 1.1 * (3 / 4), 2.0 * 1.1 * (5 / 8)]
    assert result.grad_hidden_TH[0].tolist() == pytest.approx(by_hand, abs=2e-6)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_ratios_that_overflow_are_flagged_and_finite(kernels: RowKernels, importance: Any) -> None:
    case = make_case(num_rows=6, vocab=11)
    logprobs_R = run_oracle(case).statistics["logprobs_R"].to(DEVICE)
    gaps_R = torch.tensor([150.0, -150.0, 20.5, -20.5, 19.5, -19.5], device=DEVICE)
    far_R = (logprobs_R - gaps_R).float()
    near_R = (logprobs_R - 0.1).float()
    options = OracleLoss(importance=importance, kl="k3", kl_coefficient=1e-3)
    for rollout_R, reference_R in ((far_R, near_R), (near_R, far_R)):
        rows = replace(case.loss_rows, rollout_logprobs=rollout_R, reference_logprobs=reference_R)
        changed = replace(case, loss_rows=rows)
        result, expected = (
            run_head(changed, kernels, "recompute", options),
            run_oracle(changed, options),
        )
        assert result.statistics["is_extreme_R"].tolist() == [True] * 4 + [False] * 2
        assert result.loss.isfinite()
        assert result.grad_hidden_TH.isfinite().all()
        # exp(20) carries the float32 spacing of 20, 2e-6, into its own relative error.
        for name, values_R in expected.statistics.items():
            ours_R = result.statistics[name].double()
            assert_close(name, ours_R, values_R.double(), atol=1e-4, rtol=2e-5)
        assert_close("loss", result.loss, expected.loss, atol=1e-4, rtol=2e-5)
        for name in ("grad_hidden_TH", "grad_weight_VH"):
            scale = float(getattr(expected, name).abs().max())
            assert_close(name, getattr(result, name), getattr(expected, name), atol=2e-5 * scale)


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_advantages_of_the_other_sign_negate_loss_and_gradients(
    kernels: RowKernels, mode: Mode
) -> None:
    case = make_case(num_rows=5, vocab=19, has_all_inputs=False)
    rows = replace(case.loss_rows, advantages=-case.loss_rows.advantages)
    one, other = (run_head(c, kernels, mode) for c in (case, replace(case, loss_rows=rows)))
    assert_bitwise("loss", -one.loss, other.loss)
    assert_bitwise("hidden", -one.grad_hidden_TH, other.grad_hidden_TH)
    assert_bitwise("weight", -one.grad_weight_VH, other.grad_weight_VH)


def test_large_advantages_scale_the_gradient(kernels: RowKernels) -> None:
    case = make_case(num_rows=5, vocab=19, has_all_inputs=False)
    rows = replace(case.loss_rows, advantages=case.loss_rows.advantages * 2.0**14)
    small = run_head(case, kernels, "grad_in_forward")
    large = run_head(replace(case, loss_rows=rows), kernels, "grad_in_forward")
    assert_bitwise("loss", small.loss * 2.0**14, large.loss)
    assert_bitwise("hidden", small.grad_hidden_TH * 2.0**14, large.grad_hidden_TH)
    assert_bitwise("weight", small.grad_weight_VH * 2.0**14, large.grad_weight_VH)


def test_an_entropy_upstream_of_zero_changes_no_bit(kernels: RowKernels) -> None:
    case = make_case(num_rows=5, vocab=19)
    grads = []
    for weight in (None, 0.0):
        leaves = (
            case.hidden_TH.detach().requires_grad_(),
            case.weight_VH.detach().requires_grad_(),
        )
        logprobs_R, entropies_R = head_logprobs(
            *leaves, case.targets_R, true_vocab_size=19, backend=kernels
        )
        total = logprobs_R.sum()
        if weight is not None:
            total = total + weight * entropies_R.sum()
        grads.append(torch.autograd.grad(total, leaves))
    for name, one, other in zip(("hidden", "weight"), *grads, strict=True):
        assert_bitwise(name, one, other)


def test_temperature_is_that_of_the_divided_logits(kernels: RowKernels) -> None:
    case = make_case(num_rows=5, vocab=19, temperature=0.5)
    # Powers of two divide without rounding, so the two ways to the same logits agree exactly.
    divided = replace(case, hidden_TH=case.hidden_TH * 2.0, temperature=1.0)
    options = OracleLoss(importance="ppo_clip", entropy_coefficient=0.1)
    one, other = (run_head(c, kernels, "recompute", options) for c in (case, divided))
    for name, values_R in one.statistics.items():
        assert_bitwise(name, values_R, other.statistics[name])
    assert_bitwise("hidden", one.grad_hidden_TH, other.grad_hidden_TH * 2.0)
    assert_bitwise("weight", one.grad_weight_VH, other.grad_weight_VH)
