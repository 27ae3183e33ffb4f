"""Rows that are not named, and rows without weight: nothing of them may reach anything else."""

from dataclasses import replace

import pytest
import torch
from prefixrl_kernels import head_logprobs, reinforce_head
from prefixrl_kernels.head.row_kernels import RowKernels
from prefixrl_kernels.head_plan import Mode

from tests.support.head_cases import (
    DEVICE,
    TRAINING_MODES,
    HeadResult,
    assert_matches,
    make_case,
    row_tolerance,
    run_head,
    run_oracle,
)
from tests.support.head_oracle import OracleLoss, assert_bitwise

NAN, INF = float("nan"), float("inf")

LOSS = OracleLoss(importance="ppo_clip", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.2)

MASKS = [
    pytest.param((), id="none"),
    pytest.param(tuple(range(6)), id="all"),
    pytest.param((3,), id="one"),
    pytest.param((0, 2, 4), id="alternating"),
    pytest.param((1, 1, 5, 1), id="repeated"),
]


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("rows_R", MASKS)
def test_hidden_rows_that_are_not_named_do_not_matter(
    kernels: RowKernels, mode: Mode, rows_R: tuple[int, ...]
) -> None:
    case = make_case(rows_R=rows_R, num_hidden_rows=6, vocab=19)
    result = run_head(case, kernels, mode, LOSS, plan_rows=(3, 2))
    assert_matches(result, run_oracle(case, LOSS), row_tolerance=row_tolerance(case))
    unnamed = [row for row in range(6) if row not in rows_R]
    assert not result.grad_hidden_TH[unnamed].any()
    hidden_TH = case.hidden_TH.clone()
    for row, poison in zip(unnamed, [NAN, INF, -INF] * 2, strict=False):
        hidden_TH[row] = poison
    poisoned = run_head(replace(case, hidden_TH=hidden_TH), kernels, mode, LOSS, plan_rows=(3, 2))
    _assert_same(poisoned, result)


def _assert_same(one: HeadResult, other: HeadResult) -> None:
    assert_bitwise("loss", one.loss, other.loss)
    assert_bitwise("hidden", one.grad_hidden_TH, other.grad_hidden_TH)
    assert_bitwise("weight", one.grad_weight_VH, other.grad_weight_VH)
    for name, values_R in one.statistics.items():
        assert_bitwise(name, values_R, other.statistics[name])


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("num_hidden_rows", [0, 3])
def test_no_rows_give_a_loss_of_zero_and_gradients_of_zero(
    kernels: RowKernels, mode: Mode, num_hidden_rows: int
) -> None:
    case = make_case(rows_R=(), num_hidden_rows=num_hidden_rows, vocab=70, dtype=torch.bfloat16)
    result = run_head(case, kernels, mode, LOSS)
    assert result.loss.item() == 0.0
    assert result.loss.dtype == torch.float32
    assert result.grad_hidden_TH.shape == (num_hidden_rows, 5)
    assert result.grad_weight_VH.shape == (70, 5)
    assert not result.grad_hidden_TH.any()
    assert not result.grad_weight_VH.any()
    assert result.grad_weight_VH.dtype == torch.bfloat16
    assert {tuple(values_R.shape) for values_R in result.statistics.values()} == {(0,)}


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_what_is_not_finite_in_a_named_row_shows_and_stays_in_its_row(
    kernels: RowKernels, mode: Mode, poison: float
) -> None:
    case = make_case(num_rows=6, vocab=19)
    clean = run_head(case, kernels, mode, LOSS)
    hidden_TH = case.hidden_TH.clone()
    hidden_TH[2, 1] = poison
    loss, statistics = reinforce_head(
        hidden_TH.requires_grad_(),
        case.weight_VH,
        case.targets_R,
        None,
        case.loss_rows.advantages,
        num_global_loss_tokens=6,
        true_vocab_size=19,
        mode=mode,
        backend=kernels,
    )
    assert loss.isnan()
    assert statistics.num_nonfinite().item() == 1
    is_other_R = torch.arange(6, device=DEVICE) != 2
    for ours_R, clean_R in (
        (statistics.logprobs_R, clean.statistics["logprobs_R"]),
        (statistics.entropies_R, clean.statistics["entropies_R"]),
    ):
        assert_bitwise("other rows", ours_R[is_other_R], clean_R[is_other_R])
        assert ours_R[2].isnan()
    (grad_TH,) = torch.autograd.grad(loss, hidden_TH)
    assert grad_TH[2].isnan().all()
    assert grad_TH[is_other_R].isfinite().all()


@pytest.mark.parametrize("target", [-100, -1, 19, 24, 10**9, 2**62, -(2**62)])
def test_a_target_that_is_no_token_gives_nan_for_its_row_only(
    kernels: RowKernels, target: int
) -> None:
    case = make_case(num_rows=4, vocab=25, true_vocab_size=19)
    clean = run_head(case, kernels, "recompute").statistics
    targets_R = case.targets_R.clone()
    targets_R[1] = target
    with torch.no_grad():
        logprobs_R, entropies_R = head_logprobs(
            case.hidden_TH, case.weight_VH, targets_R, true_vocab_size=19, backend=kernels
        )
    assert logprobs_R.isnan().tolist() == [False, True, False, False]
    assert_bitwise("others", logprobs_R[[0, 2, 3]], clean["logprobs_R"][[0, 2, 3]])
    assert_bitwise("entropies", entropies_R, clean["entropies_R"])


@pytest.mark.parametrize("options", [OracleLoss(), LOSS], ids=["plain", "all"])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_rows_of_weight_zero_contribute_exactly_nothing(
    kernels: RowKernels, mode: Mode, options: OracleLoss
) -> None:
    case = make_case(num_rows=6, vocab=19)
    weights_R = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5, 0.0], device=DEVICE)
    case = replace(case, loss_rows=replace(case.loss_rows, weights=weights_R))
    result = run_head(case, kernels, mode, options)
    assert_matches(result, run_oracle(case, options), row_tolerance=row_tolerance(case))
    assert not result.grad_hidden_TH[1::2].any()
    louder_R = case.loss_rows.advantages * torch.tensor([1.0, 1e30] * 3, device=DEVICE)
    louder = replace(case, loss_rows=replace(case.loss_rows, advantages=louder_R))
    _assert_same(run_head(louder, kernels, mode, options), result)


def test_rows_of_advantage_zero_have_no_gradient(kernels: RowKernels) -> None:
    case = make_case(num_rows=4, vocab=19, has_all_inputs=False)
    advantages_R = torch.tensor([0.0, 1.0, 0.0, -1.0], device=DEVICE)
    case = replace(case, loss_rows=replace(case.loss_rows, advantages=advantages_R))
    result = run_head(case, kernels, "save_dlogits")
    assert not result.grad_hidden_TH[::2].any()
    assert result.grad_hidden_TH[1::2].abs().min() > 0.0


def test_weight_zero_hides_no_nan(kernels: RowKernels) -> None:
    case = make_case(num_rows=3, vocab=19)
    case = replace(case, loss_rows=replace(case.loss_rows, weights=torch.zeros(3, device=DEVICE)))
    hidden_TH = case.hidden_TH.clone()
    hidden_TH[0, 0] = NAN
    assert run_head(replace(case, hidden_TH=hidden_TH), kernels, "recompute").loss.isnan()
