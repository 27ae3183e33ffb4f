"""The head on one CUDA device at real sizes: what the interpreter cannot show.

Values and gradients of every option are in ``tests/kernels``, which runs on the device too where
there is one.
"""

from collections.abc import Iterator

import pytest
import torch
from prefixrl_kernels import HeadStatistics, reinforce_head
from prefixrl_kernels.head import table
from prefixrl_kernels.head.matmul import multiply_into
from prefixrl_kernels.head.reference import TorchRows
from prefixrl_kernels.head.triton_rows import TritonRows
from prefixrl_kernels.head.vocab import VocabShard
from prefixrl_kernels.head_plan import Mode
from torch import Tensor

from tests.support.head_cases import TRAINING_MODES
from tests.support.head_oracle import (
    OracleLoss,
    OracleRows,
    assert_bitwise,
    assert_close,
    assert_relative_norm,
    logprobs_of_logits,
    oracle_loss,
    plain_low_precision,
    relative_norm,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1800),
]

CUDA = torch.device("cuda")
VOCAB, HIDDEN_SIZE = 151_936, 2560
BUDGET = 1_500_000_000

REFERENCE_ROWS = 256
"""Rows of float64 logits that the reference holds at once: 0.3 GB."""

ROW_TOLERANCE = 5e-5
"""Nats per unit of the largest logit: float32 sums over 2560 products and 151,936 columns."""

GRADIENT_TOLERANCE = 6e-3
"""Frobenius norm: one rounding of the gradient of the logits to bfloat16, and one of the result."""


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def _inputs(
    num_rows: int, *, vocab: int = VOCAB, hidden_size: int = HIDDEN_SIZE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, targets and advantages: logits of 3, most targets likely."""
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden_TH = torch.randn(num_rows, hidden_size, generator=generator, device=CUDA)
    weight_VH = torch.randn(vocab, hidden_size, generator=generator, device=CUDA)
    weight_VH *= 3.0 / hidden_size**0.5
    targets_R = torch.randint(0, vocab, (num_rows,), generator=generator, device=CUDA)
    # 70 % of the rows point at their target: its logit rises by about 12.
    pointing_TH = weight_VH[targets_R] * (12.0 / 9.0)
    is_likely_T1 = torch.rand(num_rows, 1, generator=generator, device=CUDA) < 0.7
    hidden_TH += pointing_TH * is_likely_T1
    advantages_R = torch.randn(num_rows, generator=generator, device=CUDA)
    return hidden_TH.bfloat16(), weight_VH.bfloat16(), targets_R, advantages_R


def _reference(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    advantages_R: Tensor,
    *,
    entropy_coefficient: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return logprobs, entropies, both gradients and the largest logit, in chunks of rows.

    Products in float32 of the widened operands, everything between them in float64 by autograd.
    """
    wide_VH = weight_VH.float()
    grad_weight_VH = torch.zeros_like(wide_VH)
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []
    largest = 0.0
    for first in range(0, hidden_RH.size(0), REFERENCE_ROWS):
        rows = slice(first, first + REFERENCE_ROWS)
        logits_RV = (hidden_RH[rows].float() @ wide_VH.T).double().requires_grad_()
        logprobs_R, entropies_R = logprobs_of_logits(logits_RV, targets_R[rows])
        loss, _ = oracle_loss(
            logprobs_R,
            entropies_R,
            OracleRows(advantages=advantages_R[rows], num_global_loss_tokens=hidden_RH.size(0)),
            OracleLoss(entropy_coefficient=entropy_coefficient),
        )
        (grad_RV,) = torch.autograd.grad(loss, logits_RV)
        grad_RV = grad_RV.float()
        outputs.append((logprobs_R.detach(), entropies_R.detach(), grad_RV @ wide_VH))
        grad_weight_VH += grad_RV.T @ hidden_RH[rows].float()
        largest = max(largest, float(logits_RV.detach().abs().max()))
    logprobs_R, entropies_R, grad_hidden_TH = (
        torch.cat(parts) for parts in zip(*outputs, strict=True)
    )
    return logprobs_R, entropies_R, grad_hidden_TH, grad_weight_VH, largest


def _run(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    mode: Mode,
    **options: object,
) -> tuple[Tensor, HeadStatistics, Tensor, Tensor]:
    """Return loss, statistics and both gradients."""
    hidden_TH, weight_VH = (values.detach().requires_grad_() for values in inputs[:2])
    loss, statistics = reinforce_head(
        hidden_TH,
        weight_VH,
        inputs[2],
        None,
        inputs[3],
        num_global_loss_tokens=inputs[2].size(0),
        true_vocab_size=weight_VH.size(0),
        mode=mode,
        **options,  # pyright: ignore[reportArgumentType]  # by name
    )
    grad_hidden_TH, grad_weight_VH = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    return loss.detach(), statistics, grad_hidden_TH, grad_weight_VH


def test_values_and_gradients_at_real_size_and_every_mode_repeats_its_bits() -> None:
    inputs = _inputs(4096)
    entropy = 0.01
    expected = _reference(*inputs, entropy_coefficient=entropy)
    plain = plain_low_precision(*inputs, num_global_loss_tokens=4096)
    plain_expected = _reference(*inputs)
    atol = ROW_TOLERANCE * (1.0 + expected[4])
    for mode in TRAINING_MODES:
        runs = [
            _run(inputs, mode, entropy_coefficient=entropy, memory_budget_bytes=BUDGET)
            for _ in range(2)
        ]
        for name, one, other in zip(
            ("loss", "hidden", "weight"), _tensors(runs[0]), _tensors(runs[1]), strict=True
        ):
            assert_bitwise(f"{mode} again: {name}", one, other)
        loss, statistics, grad_hidden_TH, grad_weight_VH = runs[0]
        assert loss.isfinite()
        assert_close("logprobs", statistics.logprobs_R, expected[0], atol=atol)
        assert_close("entropies", statistics.entropies_R, expected[1], atol=atol)
        assert_relative_norm("hidden", grad_hidden_TH, expected[2], GRADIENT_TOLERANCE)
        assert_relative_norm("weight", grad_weight_VH, expected[3], GRADIENT_TOLERANCE)
        del runs, loss, statistics, grad_hidden_TH, grad_weight_VH

        _, _, *grads = _run(inputs, mode, memory_budget_bytes=BUDGET)
        for name, got, theirs, truth in zip(
            ("hidden", "weight"), grads, plain[1:], plain_expected[2:4], strict=True
        ):
            assert_relative_norm(f"{mode} {name}", got, truth, 1.1 * relative_norm(theirs, truth))


def _tensors(run: tuple[Tensor, HeadStatistics, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return run[0], run[2], run[3]


def test_modes_agree_at_real_size() -> None:
    inputs = _inputs(3000)
    first = _run(inputs, "save_dlogits")
    for mode in TRAINING_MODES[1:]:
        other = _run(inputs, mode, memory_budget_bytes=BUDGET)
        assert_close("loss", other[0], first[0], atol=1e-4)
        assert_close("logprobs", other[1].logprobs_R, first[1].logprobs_R, atol=1e-4)
        # Each is one bfloat16 rounding (2^-9) away from the same value.
        assert_relative_norm("hidden", other[2], first[2], 4e-3)
        assert_relative_norm("weight", other[3], first[3], 4e-3)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_31_bits(logits_dtype: torch.dtype) -> None:
    num_rows = 16_384
    assert num_rows * VOCAB > 2**31
    inputs = _inputs(num_rows, hidden_size=256)
    _, statistics, grad_hidden_TH, _ = _run(inputs, "save_dlogits", logits_dtype=logits_dtype)
    # 16,384 x 151,936 gradients of logits in one buffer; the last rows lie beyond 2^31 elements.
    tail = slice(num_rows - REFERENCE_ROWS, num_rows)
    hidden_RH, weight_VH, targets_R, advantages_R = inputs
    logprobs_R, _, expected_RH, _, largest = _reference(
        hidden_RH[tail], weight_VH, targets_R[tail], advantages_R[tail]
    )
    expected_RH *= REFERENCE_ROWS / num_rows
    is_rounded = logits_dtype == torch.bfloat16
    atol = largest * 2.0**-7 if is_rounded else ROW_TOLERANCE * (1.0 + largest)
    assert_close("logprobs", statistics.logprobs_R[tail], logprobs_R, atol=atol)
    bound = 0.1 if is_rounded else GRADIENT_TOLERANCE
    assert_relative_norm("hidden", grad_hidden_TH[tail], expected_RH, bound)


def _integers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator, device=CUDA).bfloat16()


@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(128, 4096, 2560), (37, 72, 40), (1, 64, 8)]
)
def test_products_of_bfloat16_keep_every_bit_that_float32_holds(
    rows: int, columns: int, inner: int
) -> None:
    # Integers up to 8: every partial sum is below 2^24, so float32 is exact in any order.
    a_MK, b_NK = _integers(rows, inner, seed=1), _integers(columns, inner, seed=2)
    exact_MN = (a_MK.double() @ b_NK.double().T).float()
    assert exact_MN.bfloat16().float().ne(exact_MN).any() or inner < 40  # bfloat16 would not do
    wide_MN = torch.full((rows, columns + 64), float("nan"), device=CUDA)
    out_MN = wide_MN[:, :columns]  # strided, as a block of logits is
    multiply_into(out_MN, a_MK, b_NK.T)
    assert_bitwise("product", out_MN, exact_MN)
    assert wide_MN[:, columns:].isnan().all()
    multiply_into(out_MN, a_MK, b_NK.T, add=True)
    assert_bitwise("sum", out_MN, 2.0 * exact_MN)
    # The weight's gradient: a transposed left operand.
    grad_VH = torch.zeros(columns, inner, device=CUDA)
    grads_RV = _integers(rows, columns + 64, seed=3)[:, :columns]
    multiply_into(grad_VH, grads_RV.T, a_MK, add=True)
    assert_bitwise("weight", grad_VH, (grads_RV.double().T @ a_MK.double()).float())


def test_a_shard_of_nothing_but_padding_computes_nothing() -> None:
    hidden_TH, weight_VH, targets_R, advantages_R = _inputs(64, vocab=128, hidden_size=64)
    for mode in TRAINING_MODES:
        leaves = hidden_TH.detach().requires_grad_(), weight_VH.detach().requires_grad_()
        loss, statistics = reinforce_head(
            *leaves,
            targets_R,
            None,
            advantages_R,
            num_global_loss_tokens=64,
            true_vocab_size=128,
            vocab_start=128,
            mode=mode,
        )
        grads = torch.autograd.grad(loss, leaves)
        assert statistics.logprobs_R.isnan().all()
        assert not grads[0].any()
        assert not grads[1].any()


def test_the_gradient_of_the_logits_is_rounded_once_to_the_nearest() -> None:
    num_rows = 64
    generator = torch.Generator(CUDA).manual_seed(4)
    logits_RV = torch.randn(num_rows, VOCAB, generator=generator, device=CUDA) * 3.0
    targets_R = torch.randint(0, VOCAB, (num_rows,), generator=generator, device=CUDA)
    shard = VocabShard(start=0, num_true_columns=VOCAB, num_columns=VOCAB)
    outs = {}
    for name, kernels in (("triton", TritonRows()), ("torch", TorchRows())):
        partials_4R = kernels.statistics(logits_RV, targets_R, shard=shard, temperature=1.0)
        table_KR = torch.empty((table.NUM_FIELDS, num_rows), device=CUDA)
        kernels.merge(partials_4R[None], table_KR)
        table_KR[table.LOGPROB_GRAD], table_KR[table.ENTROPY_GRAD] = 1.5, -0.5
        for dtype in (torch.float32, torch.bfloat16):
            out_RV = torch.full_like(logits_RV, float("nan"), dtype=dtype)
            kernels.grad_logits(
                logits_RV,
                table_KR,
                targets_R,
                out_RV,
                shard=shard,
                temperature=1.0,
                has_entropy_grad=True,
            )
            outs[name, dtype] = out_RV
    single_RV, half_RV = outs["triton", torch.float32], outs["triton", torch.bfloat16]
    assert_bitwise("rounded", half_RV, single_RV.bfloat16())
    # Two orders of summation and two exponential functions.
    assert_relative_norm("triton", single_RV, outs["torch", torch.float32], 1e-5)
