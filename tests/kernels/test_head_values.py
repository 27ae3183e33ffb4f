"""The head against hand-worked numbers and its definition, at every size around a block."""

import math
from dataclasses import replace

import pytest
import torch
from prefixrl_kernels import head_logprobs, reinforce_head
from prefixrl_kernels.head.reference import TorchRows
from prefixrl_kernels.head.row_kernels import RowKernels
from prefixrl_kernels.head.triton_rows import TritonRows
from prefixrl_kernels.head_plan import Mode

from tests.support.head_cases import (
    BLOCK,
    DEVICE,
    GRADIENT_TOLERANCE,
    TRAINING_MODES,
    assert_matches,
    case_of_logits,
    in_float64,
    make_case,
    row_tolerance,
    run_head,
    run_oracle,
)
from tests.support.head_oracle import (
    OracleLoss,
    assert_close,
    assert_relative_norm,
    oracle_logprobs,
    relative_norm,
)

CHUNK, LOGIT_ROWS = 4, 3
"""Rows of a chunk and of a block of logits, not multiples of each other."""

PLANNED_CHUNK = 2048
"""Rows of the smallest chunk that the planner makes for a budget that nothing fits."""

LOSS = OracleLoss(
    importance="truncated", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.3, max_importance=1.5
)


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_a_row_worked_by_hand(kernels: RowKernels, mode: Mode) -> None:
    # Probabilities 1/8, 2/8, 5/8; the target is the second; advantage 3, divided by 2.
    logits_RV = torch.tensor([[1.0, 2.0, 5.0]]).log()
    case = case_of_logits(logits_RV, [1], [3.0])
    result = run_head(case, kernels, mode, OracleLoss(entropy_coefficient=0.5))
    p = [1 / 8, 2 / 8, 5 / 8]
    entropy = -sum(x * math.log(x) for x in p)
    assert result.statistics["logprobs_R"].item() == pytest.approx(math.log(1 / 4), abs=1e-6)
    assert result.statistics["entropies_R"].item() == pytest.approx(entropy, abs=1e-6)
    assert result.loss.item() == pytest.approx(-3 * math.log(1 / 4) - 0.5 * entropy, abs=1e-5)
    # d(-3 logp)/dz = 3 (p - onehot); d(-0.5 entropy)/dz = 0.5 p (log p + entropy).
    by_hand = [3.0 * (x - (i == 1)) + 0.5 * x * (math.log(x) + entropy) for i, x in enumerate(p)]
    assert result.grad_hidden_TH[0].tolist() == pytest.approx(by_hand, abs=1e-6)
    # dW = dz^T h, with h the logits.
    for row in range(3):
        expected = [by_hand[row] * float(z) for z in logits_RV[0]]
        assert result.grad_weight_VH[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_loss_is_divided_by_the_global_count_and_weighted(kernels: RowKernels) -> None:
    logits_RV = torch.tensor([[0.0, 0.0], [0.0, 0.0]], device=DEVICE)
    weight_VH = torch.eye(2, device=DEVICE)
    with torch.no_grad():
        loss, statistics = reinforce_head(
            logits_RV,
            weight_VH,
            torch.tensor([0, 1], device=DEVICE),
            [0, 1],
            torch.tensor([1.0, 4.0], device=DEVICE),
            weights_R=torch.tensor([1.0, 0.5], device=DEVICE),
            num_global_loss_tokens=10,
            true_vocab_size=2,
            backend=kernels,
        )
    assert loss.item() == pytest.approx((1.0 + 2.0) * math.log(2.0) / 10.0)
    assert loss.dtype == torch.float32
    assert statistics.ratios_R.tolist() == [1.0, 1.0]
    assert statistics.k1_R.tolist() == statistics.reference_k3_R.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("num_rows", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_row_counts_around_a_chunk(kernels: RowKernels, mode: Mode, num_rows: int) -> None:
    case = make_case(num_rows=num_rows, vocab=19, seed=num_rows)
    result = run_head(case, kernels, mode, LOSS, plan_rows=(CHUNK, LOGIT_ROWS))
    assert_matches(result, run_oracle(case, LOSS), row_tolerance=row_tolerance(case))


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize(
    "num_rows", [PLANNED_CHUNK - 1, PLANNED_CHUNK, PLANNED_CHUNK + 1, 2 * PLANNED_CHUNK + 3]
)
def test_row_counts_around_a_planned_chunk(mode: Mode, num_rows: int) -> None:
    case = make_case(num_rows=num_rows, vocab=83, seed=num_rows)
    result = run_head(case, TorchRows(), mode, LOSS, memory_budget_bytes=1)
    assert_matches(result, run_oracle(case, LOSS), row_tolerance=row_tolerance(case))


@pytest.mark.parametrize("vocab", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_vocabularies_around_a_block(kernels: RowKernels, vocab: int, temperature: float) -> None:
    case = make_case(num_rows=5, vocab=vocab, temperature=temperature, seed=vocab)
    result = run_head(case, kernels, "grad_in_forward", LOSS, plan_rows=(3, 2))
    assert_matches(result, run_oracle(case, LOSS), row_tolerance=row_tolerance(case))


@pytest.mark.parametrize("vocab", [63, 64, 65, 129])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_vocabularies_around_a_row_stride(mode: Mode, vocab: int) -> None:
    case = make_case(num_rows=5, vocab=vocab, seed=vocab)
    result = run_head(case, TorchRows(), mode, LOSS, plan_rows=(3, 2))
    assert_matches(result, run_oracle(case, LOSS), row_tolerance=row_tolerance(case))


@pytest.mark.parametrize("backend", [TorchRows(), TritonRows()], ids=["torch", "triton"])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_a_vocabulary_of_152064_in_blocks_of_an_h100(backend: RowKernels, mode: Mode) -> None:
    case = make_case(num_rows=3, vocab=152_064, true_vocab_size=151_936, hidden_size=3)
    result, expected = run_head(case, backend, mode, LOSS, plan_rows=(2, 2)), run_oracle(case, LOSS)
    # A product over 150,000 columns in float32 is what it is: plain float32 PyTorch has it too.
    plain = run_oracle(case, LOSS, dtype=torch.float32)
    inherent = relative_norm(plain.grad_hidden_TH, expected.grad_hidden_TH)
    assert_matches(
        result,
        expected,
        row_tolerance=row_tolerance(case),
        gradient_tolerance=1.1 * inherent + GRADIENT_TOLERANCE,
    )
    assert_relative_norm("grad_weight_VH", result.grad_weight_VH, expected.grad_weight_VH, 1e-5)
    assert result.grad_weight_VH[151_936:].abs().max() == 0.0


@pytest.mark.parametrize("hidden_size", [1, 5, 24, 65])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_hidden_sizes_that_are_no_multiple_of_a_block(
    kernels: RowKernels, mode: Mode, hidden_size: int
) -> None:
    rows_R = (4, 0, 4, 2, 1)
    case = make_case(rows_R=rows_R, num_hidden_rows=6, hidden_size=hidden_size, vocab=19)
    result = run_head(case, kernels, mode, LOSS, plan_rows=(3, 2))
    assert_matches(result, run_oracle(case, LOSS), row_tolerance=row_tolerance(case))


@pytest.mark.parametrize("true_vocab_size", [1, 15, 16, 17, 60, 80])
def test_padding_columns_change_nothing_and_get_no_gradient(
    kernels: RowKernels, true_vocab_size: int
) -> None:
    case = make_case(num_rows=3, vocab=80, true_vocab_size=true_vocab_size)
    case.weight_VH[true_vocab_size:] = 1e4  # would swallow all probability
    result = run_head(case, kernels, "save_dlogits", LOSS)
    assert_matches(result, run_oracle(case, LOSS), row_tolerance=row_tolerance(case))
    assert not result.grad_weight_VH[true_vocab_size:].any()


@pytest.mark.parametrize("plan_rows", [(4, 3), (100, 100)])
@pytest.mark.parametrize("num_columns", [17, 65])
def test_float64_operands_are_computed_in_float64(
    plan_rows: tuple[int, int], num_columns: int
) -> None:
    case = make_case(num_rows=11, vocab=num_columns, dtype=torch.float64)
    case = replace(case, loss_rows=in_float64(case.loss_rows))
    for mode in TRAINING_MODES:
        result = run_head(case, TorchRows(), mode, LOSS, plan_rows=plan_rows)
        expected = run_oracle(case, LOSS)
        assert result.loss.dtype == result.grad_weight_VH.dtype == torch.float64
        assert_matches(result, expected, row_tolerance=1e-13, gradient_tolerance=1e-13)


@pytest.mark.parametrize("rows_R", [None, [3, 0, 3], []])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_head_logprobs_equals_its_definition(
    kernels: RowKernels, rows_R: list[int] | None, temperature: float
) -> None:
    case = make_case(num_rows=5 if rows_R is None else len(rows_R), num_hidden_rows=5, vocab=21)
    hidden_TH, weight_VH = case.hidden_TH.requires_grad_(), case.weight_VH.requires_grad_()
    ours = head_logprobs(
        hidden_TH,
        weight_VH,
        case.targets_R,
        rows_R=rows_R,
        true_vocab_size=21,
        temperature=temperature,
        backend=kernels,
    )
    with torch.no_grad():
        without_grad = head_logprobs(
            hidden_TH,
            weight_VH,
            case.targets_R,
            rows_R=rows_R,
            true_vocab_size=21,
            temperature=temperature,
            backend=kernels,
        )
    wide = (
        hidden_TH.detach().cpu().double().requires_grad_(),
        weight_VH.detach().cpu().double().requires_grad_(),
    )
    expected = oracle_logprobs(
        *wide,
        case.targets_R.cpu(),
        rows_R=None if rows_R is None else torch.tensor(rows_R, dtype=torch.int64),
        true_vocab_size=21,
        temperature=temperature,
    )
    for name, mine, other, theirs in zip(
        ("logprobs", "entropies"), ours, without_grad, expected, strict=True
    ):
        assert_close(name, mine, theirs, atol=row_tolerance(case) / temperature)
        assert torch.equal(mine, other)
        assert not other.requires_grad
    upstream_R = torch.arange(1.0, 1.0 + case.num_rows)
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, -2.0)):
        both = []
        for (logprobs_R, entropies_R), leaves in ((ours, (hidden_TH, weight_VH)), (expected, wide)):
            total = sum(
                weight * (values_R * upstream_R.to(values_R.device)).sum()
                for weight, values_R in zip(weights, (logprobs_R, entropies_R), strict=True)
                if weight
            )
            assert isinstance(total, torch.Tensor)
            both.append(torch.autograd.grad(total, leaves, retain_graph=True))
        for name, mine, theirs in zip(("hidden", "weight"), *both, strict=True):
            assert_relative_norm(name, mine, theirs, 1e-5)
