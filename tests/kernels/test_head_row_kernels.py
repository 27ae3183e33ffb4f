"""The row kernels alone, on logits made by hand: Triton and PyTorch against the definition."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from prefixrl_kernels.head import table
from prefixrl_kernels.head.estimators import IMPORTANCES, KLS, Estimator
from prefixrl_kernels.head.reference import TorchRows
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.row_kernels import LossInputs, RowKernels
from prefixrl_kernels.head.vocab import VocabShard
from torch import Tensor

from tests.support.head_cases import BLOCK, DEVICE, loss_inputs, tiny_triton
from tests.support.head_oracle import (
    OracleLoss,
    OracleRows,
    assert_bitwise,
    assert_close,
    logprobs_of_logits,
    oracle_loss,
)

NAN, INF = float("nan"), float("inf")
VOCAB = 2 * BLOCK + 5
STRIDE = 64

ATOL = 4e-6
"""float32 in two orders of summation, values below 30."""


def _shard(num_true: int = VOCAB, *, start: int = 0, num_columns: int | None = None) -> VocabShard:
    num_columns = num_true if num_columns is None else num_columns
    return VocabShard(start=start, num_true_columns=num_true, num_columns=num_columns)


def _logits(num_rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return logits as the head holds them: a slice of wider rows whose rest is NaN."""
    generator = torch.Generator().manual_seed(seed)
    buffer_RV = torch.full((num_rows, STRIDE), NAN)
    buffer_RV[:, :VOCAB] = torch.randn(num_rows, VOCAB, generator=generator) * 4.0
    return buffer_RV.to(DEVICE, dtype)[:, :VOCAB]


def _filled(kernels: RowKernels, partials_W4R: Tensor) -> Tensor:
    """Return a wider table's middle, so that fields are further apart than rows."""
    num_rows = partials_W4R.size(2)
    table_KR = torch.full((table.NUM_FIELDS, num_rows + 3), NAN, device=DEVICE)[:, 1 : num_rows + 1]
    kernels.merge(partials_W4R, table_KR)
    return table_KR


BANNED = [
    pytest.param([], id="none"),
    pytest.param([0], id="first"),
    pytest.param([VOCAB - 1], id="last"),
    pytest.param(list(range(BLOCK)), id="a-whole-block"),
    pytest.param(list(range(BLOCK, 2 * BLOCK)), id="a-block-in-the-middle"),
    pytest.param([i for i in range(VOCAB) if i != 3], id="all-but-one"),
]


@pytest.mark.parametrize("banned", BANNED)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_banned_columns_have_no_probability_and_no_gradient(
    kernels: RowKernels, banned: list[int], temperature: float
) -> None:
    logits_RV = _logits(2)
    logits_RV[:, banned] = -INF
    allowed = [column for column in range(VOCAB) if column not in banned]
    targets_R = torch.tensor([allowed[0], allowed[-1]], device=DEVICE)
    shard = _shard()
    partials_4R = kernels.statistics(logits_RV, targets_R, shard=shard, temperature=temperature)
    table_KR = _filled(kernels, partials_4R[None])
    wide_RV = (logits_RV.double().cpu() / temperature).requires_grad_()
    logprobs_R, entropies_R = logprobs_of_logits(wide_RV, targets_R.cpu())
    assert_close("logprobs", table_KR[table.LOGPROB], logprobs_R, atol=ATOL)
    assert_close("entropies", table_KR[table.ENTROPY], entropies_R, atol=ATOL)

    coefficients = torch.tensor([[1.5, -0.5], [0.7, 2.0]], dtype=torch.float64)
    table_KR[table.LOGPROB_GRAD], table_KR[table.ENTROPY_GRAD] = coefficients.float().to(DEVICE)
    (expected_RV,) = torch.autograd.grad(
        (coefficients[0] * logprobs_R + coefficients[1] * entropies_R).sum(), wide_RV
    )
    out_RV = torch.full((2, STRIDE), NAN, device=DEVICE)[:, :VOCAB]
    kernels.grad_logits(
        logits_RV,
        table_KR,
        targets_R,
        out_RV,
        shard=shard,
        temperature=temperature,
        has_entropy_grad=True,
    )
    # Autograd's own -inf columns are 0 * inf; the definition's are 0.
    expected_RV = expected_RV.masked_fill(wide_RV == -INF, 0.0) / temperature
    assert_close("grads", out_RV, expected_RV, atol=ATOL)
    assert not out_RV[:, banned].any()


def test_a_banned_target_is_minus_infinity_and_costs_nothing_without_weight(
    kernels: RowKernels,
) -> None:
    logits_RV = _logits(4)
    logits_RV[:, 5] = -INF
    targets_R = torch.full((4,), 5, device=DEVICE)
    for kl in KLS:  # a coefficient of 0 must not multiply an infinite divergence
        partials_4R = kernels.statistics(logits_RV, targets_R, shard=_shard(), temperature=1.0)
        table_KR = _filled(kernels, partials_4R[None])
        assert table_KR[table.LOGPROB].tolist() == [-INF] * 4
        inputs = LossInputs(
            advantages_R=torch.tensor([1.0, 0.0, -2.0, 3.0], device=DEVICE),
            weights_R=torch.tensor([0.0, 1.0, 0.0, 1.0], device=DEVICE),
            rollout_logprobs_R=None,
            reference_logprobs_R=torch.full((4,), -3.0, device=DEVICE),
            num_global_loss_tokens=2.0,
        )
        kernels.weigh(table_KR, inputs, Estimator(kl=kl))
        assert table_KR[table.LOSS].tolist() == [0.0, 0.0, 0.0, INF], kl
        assert table_KR[table.LOGPROB_GRAD].tolist() == [0.0, 0.0, 0.0, -1.5], kl
        out_RV = torch.full((4, VOCAB), NAN, device=DEVICE)
        kernels.grad_logits(
            logits_RV,
            table_KR,
            targets_R,
            out_RV,
            shard=_shard(),
            temperature=1.0,
            has_entropy_grad=False,
        )
        assert not out_RV[:3].any()
        assert out_RV[3].isfinite().all()
        assert table.HeadStatistics.from_table(table_KR).num_nonfinite().item() == 4


@pytest.mark.parametrize("column", [0, BLOCK - 1, BLOCK, VOCAB - 1])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_infinity_show_wherever_they_stand(
    kernels: RowKernels, column: int, value: float
) -> None:
    logits_RV = _logits(3)
    targets_R = torch.tensor([2, 2, 2], device=DEVICE)
    clean_4R = kernels.statistics(logits_RV, targets_R, shard=_shard(), temperature=1.0)
    clean_KR = _filled(kernels, clean_4R[None])
    logits_RV[1, column] = value
    spoilt_4R = kernels.statistics(logits_RV, targets_R, shard=_shard(), temperature=1.0)
    spoilt_KR = _filled(kernels, spoilt_4R[None])
    for field in (table.LOGPROB, table.ENTROPY):
        assert spoilt_KR[field].isnan().tolist() == [False, True, False]
        assert_bitwise("others", spoilt_KR[field, ::2], clean_KR[field, ::2])


def test_a_row_without_any_allowed_column_is_nan(kernels: RowKernels) -> None:
    logits_RV = torch.full((1, VOCAB), -INF, device=DEVICE)
    targets_R = torch.tensor([0], device=DEVICE)
    partials_4R = kernels.statistics(logits_RV, targets_R, shard=_shard(), temperature=1.0)
    assert partials_4R[:3, 0].tolist() == [-INF, 0.0, 0.0]
    table_KR = _filled(kernels, partials_4R[None])
    assert table_KR[[table.LOGPROB, table.ENTROPY], 0].isnan().all()


def test_partial_statistics_are_what_their_format_says(kernels: RowKernels) -> None:
    logits_RV = _logits(3)
    targets_R = torch.tensor([100, 100 + VOCAB - 1, 100 + VOCAB], device=DEVICE)
    shard = _shard(start=100)
    partials_4R = kernels.statistics(logits_RV, targets_R, shard=shard, temperature=2.0).cpu()
    z_RV = logits_RV.double().cpu() / 2.0
    centred_RV = z_RV - z_RV.amax(1, keepdim=True)
    expected_4R = torch.stack(
        (
            z_RV.amax(1),
            centred_RV.exp().sum(1),
            (centred_RV.exp() * centred_RV).sum(1),
            torch.tensor([z_RV[0, 0], z_RV[1, VOCAB - 1], NAN], dtype=torch.float64),
        )
    )
    assert_close("partials", partials_4R, expected_4R, atol=ATOL)


def test_a_shard_of_nothing_but_padding_has_empty_statistics(kernels: RowKernels) -> None:
    logits_RV = torch.empty((3, 0), device=DEVICE)
    targets_R = torch.tensor([0, 99, 100], device=DEVICE)
    shard = _shard(0, start=100)
    partials_4R = kernels.statistics(logits_RV, targets_R, shard=shard, temperature=1.0)
    assert partials_4R[0].tolist() == [-INF] * 3
    assert not partials_4R[1:3].any()
    assert partials_4R[3].isnan().all()
    table_KR = torch.zeros((table.NUM_FIELDS, 3), device=DEVICE)
    kernels.grad_logits(
        logits_RV,
        table_KR,
        targets_R,
        logits_RV,
        shard=shard,
        temperature=1.0,
        has_entropy_grad=True,
    )


@pytest.mark.parametrize("cuts", [(VOCAB,), (1, VOCAB), (16, 20, VOCAB), (5, 5, 5, VOCAB)])
def test_shards_merge_to_the_whole(kernels: RowKernels, cuts: tuple[int, ...]) -> None:
    logits_RV = _logits(6)
    logits_RV[2, :16] = -INF  # a shard without probability
    logits_RV[3] -= 3e4
    logits_RV[4, 30] = 1e4
    targets_R = torch.tensor([0, 4, 17, VOCAB - 1, 30, VOCAB], device=DEVICE)
    starts = (0, *cuts[:-1])
    partials_W4R = torch.stack(
        [
            kernels.statistics(
                logits_RV[:, start:end],
                targets_R,
                shard=_shard(end - start, start=start),
                temperature=1.0,
            )
            for start, end in zip(starts, cuts, strict=True)
        ]
    )
    table_KR = _filled(kernels, partials_W4R)
    wide_RV = logits_RV.double().cpu()
    logprobs_R, entropies_R = logprobs_of_logits(wide_RV, targets_R.cpu().clamp(max=VOCAB - 1))
    logprobs_R[5] = NAN
    assert_close("logprobs", table_KR[table.LOGPROB], logprobs_R, atol=ATOL, rtol=2e-7)
    assert_close("entropies", table_KR[table.ENTROPY], entropies_R, atol=ATOL, rtol=2e-7)
    assert_bitwise("maximum", table_KR[table.MAXIMUM], logits_RV.amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_entropy_grad", [False, True])
def test_gradients_may_overwrite_their_logits(
    kernels: RowKernels, dtype: torch.dtype, has_entropy_grad: bool
) -> None:
    targets_R = torch.tensor([0, VOCAB - 2, 50], device=DEVICE)
    shard = _shard(VOCAB - 2, num_columns=VOCAB)  # two padding columns
    outs = []
    for is_in_place in (False, True):
        logits_RV = _logits(3, dtype=dtype)
        partials_4R = kernels.statistics(logits_RV, targets_R, shard=shard, temperature=0.7)
        table_KR = _filled(kernels, partials_4R[None])
        table_KR[table.LOGPROB_GRAD], table_KR[table.ENTROPY_GRAD] = 1.5, -0.5
        out_RV = logits_RV if is_in_place else torch.full_like(logits_RV, NAN)
        kernels.grad_logits(
            logits_RV,
            table_KR,
            targets_R,
            out_RV,
            shard=shard,
            temperature=0.7,
            has_entropy_grad=has_entropy_grad,
        )
        outs.append(out_RV)
        assert not out_RV[:, VOCAB - 2 :].any()
    assert_bitwise("in place", *outs)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_loss_of_made_logprobs(kernels: RowKernels, importance: Any, kl: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs_R = -torch.rand(11, generator=generator) * 5.0
    spread_R = torch.tensor([-30.0, -20.0, -1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0, 20.0, 30.0])
    rows = OracleRows(
        advantages=torch.randn(11, generator=generator),
        weights=torch.rand(11, generator=generator),
        rollout_logprobs=logprobs_R - spread_R,
        reference_logprobs=logprobs_R - spread_R.flip(0) / 3.0,
        num_global_loss_tokens=7.0,
    )
    options = OracleLoss(
        importance=importance,
        kl=kl,
        kl_coefficient=0.0 if kl == "none" else 0.3,
        entropy_coefficient=0.2,
        clip_high=0.28,
    )
    entropies_R = torch.rand(11, generator=generator)
    leaves = [values_R.double().requires_grad_() for values_R in (logprobs_R, entropies_R)]
    loss, statistics = oracle_loss(leaves[0], leaves[1], rows, options)
    grads = torch.autograd.grad(loss, leaves)
    table_KR = torch.full((table.NUM_FIELDS, 11), NAN, device=DEVICE)
    table_KR[table.LOGPROB], table_KR[table.ENTROPY] = logprobs_R.to(DEVICE), entropies_R.to(DEVICE)
    inputs = loss_inputs(rows)
    moved: dict[str, Any] = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in asdict(inputs).items()
    }
    kernels.weigh(table_KR, LossInputs(**moved), Estimator(**asdict(options)))
    ours = table.HeadStatistics.from_table(table_KR)
    # A ratio of exp(20) carries the spacing of 20 in its exponent.
    for name, values_R in statistics.items():
        got_R = getattr(ours, name)
        assert_close(name, got_R.double(), values_R.double(), atol=4e-6, rtol=8e-6)
    assert_close("loss", table_KR[table.LOSS].double().sum(), loss, atol=4e-6, rtol=8e-6)
    assert_close("logprob grad", table_KR[table.LOGPROB_GRAD], grads[0], atol=4e-6, rtol=8e-6)
    assert_close("entropy grad", table_KR[table.ENTROPY_GRAD], grads[1], atol=1e-7)


@pytest.mark.parametrize("hidden_size", [1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scatter_adds_the_uses_of_a_row_and_scales_once(
    kernels: RowKernels, hidden_size: int, dtype: torch.dtype
) -> None:
    rows = [5, 2, 5, 0, 5, 2]
    index = RowIndex.build(rows, num_hidden_rows=7, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    grad_RH = torch.randn(6, hidden_size, generator=generator).to(DEVICE)
    out_TH = torch.full((7, 2 * hidden_size), NAN, device=DEVICE, dtype=dtype)[:, :hidden_size]
    kernels.scatter(grad_RH, index, out_TH, torch.tensor(0.5, device=DEVICE))
    expected_TH = torch.zeros(7, hidden_size)
    for position, row in enumerate(rows):  # in float32, in order, as promised
        expected_TH[row] += grad_RH[position].cpu()
    expected_TH *= 0.5
    if dtype == torch.float32:
        assert_bitwise("hidden", out_TH.cpu(), expected_TH)
    else:  # the interpreter truncates: up to one spacing of bfloat16
        assert_close("hidden", out_TH, expected_TH, atol=0.0, rtol=2.0**-7)


def test_scatter_of_all_rows_in_order_is_a_scaled_copy(kernels: RowKernels) -> None:
    index = RowIndex.build(None, num_hidden_rows=3, device=DEVICE)
    grad_RH = torch.arange(6.0, device=DEVICE).reshape(3, 2)
    out_TH = torch.full((3, 2), NAN, device=DEVICE)
    kernels.scatter(grad_RH, index, out_TH, torch.tensor(2.0, device=DEVICE))
    assert out_TH.tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]


def test_triton_and_pytorch_agree_on_the_same_rows() -> None:
    logits_RV, targets_R = _logits(5), torch.tensor([1, 2, 3, 4, 5], device=DEVICE)
    both = [
        kernels.statistics(logits_RV, targets_R, shard=_shard(), temperature=1.3)
        for kernels in (TorchRows(), tiny_triton())
    ]
    assert_close("partials", both[0], both[1], atol=ATOL)
    assert_bitwise("maximum", both[0][0], both[1][0])
    assert_bitwise("target", both[0][3], both[1][3])
