"""The head over 2 and 4 tensor-parallel ranks: the answer of one rank, the same bits on each."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from prefixrl_kernels import head_logprobs
from prefixrl_kernels.head_plan import Mode
from torch import Tensor

from tests.support.head_cases import (
    GRADIENT_TOLERANCE,
    IS_INTERPRETED,
    TRAINING_MODES,
    HeadCase,
    HeadResult,
    assert_matches,
    build_kernels,
    make_case,
    nan_filled_memory,
    row_tolerance,
    run_head,
    run_oracle,
    to_device,
)
from tests.support.head_oracle import (
    OracleLoss,
    assert_bitwise,
    assert_close,
    assert_relative_norm,
    oracle_logprobs,
)
from tests.support.ranks import run_on_ranks

CPU = torch.device("cpu")

BACKENDS = ("torch", "triton") if IS_INTERPRETED else ("torch",)
"""The ranks live on the CPU, where Triton needs its interpreter."""

PADDED, TRUE = 24, 17
"""Columns as stored and tokens among them. Over 4 ranks: 6, 6, 5 and none; over 2: 12 and 5."""

TARGETS = [0, 5, 6, 11, 12, 16, 3]
"""First and last column of every shard, and one in the middle."""

ROWS = (7, 0, 2, 2, 5, 2, 3)
NUM_HIDDEN_ROWS = 8

PLANNED_ROWS = 300
"""Rows of a call whose blocks the planner makes, several of them."""

PLANNED_BUDGET = 200_000
"""Bytes: 128 rows of a full shard's logits, and all rows of an empty one's."""

LOSS = OracleLoss(
    importance="ppo_clip", kl="k3", kl_coefficient=0.1, entropy_coefficient=0.2, clip_high=0.28
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run the same case."""

    backend: str
    mode: Mode
    is_sequence_parallel: bool
    weight_grad: Any
    promised_upstream: float | None = None


VARIANTS = [
    Variant(
        backend=backend,
        mode=mode,
        is_sequence_parallel=is_sequence_parallel,
        weight_grad="autograd",
    )
    for backend, mode, is_sequence_parallel in product(BACKENDS, TRAINING_MODES, (False, True))
] + [
    Variant(
        backend="torch",
        mode=mode,
        is_sequence_parallel=is_sequence_parallel,
        weight_grad="main_grad",
        promised_upstream=promised,
    )
    for mode, is_sequence_parallel, promised in product(TRAINING_MODES, (False, True), (None, 1.0))
]


def _case(rows_R: tuple[int, ...] = ROWS) -> HeadCase:
    case = to_device(
        make_case(
            rows_R=rows_R, num_hidden_rows=NUM_HIDDEN_ROWS, vocab=PADDED, true_vocab_size=TRUE
        ),
        CPU,
    )
    if rows_R:
        case = replace(case, targets_R=torch.tensor(TARGETS))
    case.weight_VH[TRUE:] = 50.0  # padding that would swallow all probability
    return case


def _share(values: Tensor, rank: int, world_size: int) -> Tensor:
    """Return a rank's contiguous share of the first dimension, a view."""
    size = values.size(0) // world_size
    return values[rank * size : (rank + 1) * size]


def _run(case: HeadCase, variant: Variant, rank: int, world_size: int, **plan: Any) -> HeadResult:
    weight_VH = _share(case.weight_VH, rank, world_size).requires_grad_()
    if variant.weight_grad == "main_grad":
        weight_VH = weight_VH.detach().requires_grad_()
        weight_VH.main_grad = torch.zeros_like(weight_VH)  # pyright: ignore[reportAttributeAccessIssue]
    hidden_TH = case.hidden_TH
    if variant.is_sequence_parallel:
        hidden_TH = _share(hidden_TH, rank, world_size)
    result = run_head(
        replace(case, hidden_TH=hidden_TH, weight_VH=weight_VH),
        build_kernels(variant.backend),
        variant.mode,
        LOSS,
        tp_group=dist.group.WORLD,
        vocab_start=rank * (PADDED // world_size),
        sequence_parallel=variant.is_sequence_parallel,
        weight_grad=variant.weight_grad,
        promised_upstream=variant.promised_upstream,
        **plan,
    )
    if variant.weight_grad == "main_grad":
        result = replace(result, grad_weight_VH=weight_VH.main_grad)  # pyright: ignore[reportAttributeAccessIssue]
    return result


def run_every_variant(rank: int, world_size: int) -> list[HeadResult]:
    with nan_filled_memory():
        return [_run(_case(), v, rank, world_size, plan_rows=(3, 2)) for v in VARIANTS]


def run_without_rows(rank: int, world_size: int) -> list[HeadResult]:
    with nan_filled_memory():
        return [_run(_case(()), v, rank, world_size) for v in VARIANTS]


def run_planned(rank: int, world_size: int) -> list[HeadResult]:
    variants = [
        Variant(
            backend="torch",
            mode=mode,
            is_sequence_parallel=is_sequence_parallel,
            weight_grad="autograd",
        )
        for mode, is_sequence_parallel in product(TRAINING_MODES, (False, True))
    ]
    with nan_filled_memory():
        return [
            _run(_planned_case(), v, rank, world_size, memory_budget_bytes=PLANNED_BUDGET)
            for v in variants
        ]


def _planned_case() -> HeadCase:
    # bfloat16 operands, so that logits have blocks of their own.
    return to_device(
        make_case(num_rows=PLANNED_ROWS, vocab=PADDED, true_vocab_size=TRUE, dtype=torch.bfloat16),
        CPU,
    )


def run_logprobs(rank: int, world_size: int) -> list[Tensor]:
    case = _case()
    weight_VH = _share(case.weight_VH, rank, world_size).detach().requires_grad_()
    hidden_TH = case.hidden_TH.requires_grad_()
    with nan_filled_memory():
        outputs = head_logprobs(
            hidden_TH,
            weight_VH,
            case.targets_R,
            true_vocab_size=TRUE,
            rows_R=ROWS,
            tp_group=dist.group.WORLD,
            vocab_start=rank * (PADDED // world_size),
            backend="torch",
        )
        upstream_R = torch.arange(1.0, 8.0)
        grads = torch.autograd.grad(outputs, (hidden_TH, weight_VH), (upstream_R, -upstream_R))
    return [*(values_R.detach() for values_R in outputs), *grads]


def _assert_ranks_agree(results: list[HeadResult], is_sequence_parallel: bool) -> HeadResult:
    """Return one result from all ranks', after checking what must be the same bits on each."""
    first, *others = results
    for other in others:
        assert_bitwise("loss", other.loss, first.loss)
        for name, values_R in first.statistics.items():
            assert_bitwise(name, other.statistics[name], values_R)
        if not is_sequence_parallel:
            assert_bitwise("hidden", other.grad_hidden_TH, first.grad_hidden_TH)
    grad_hidden_TH = first.grad_hidden_TH
    if is_sequence_parallel:
        grad_hidden_TH = torch.cat([result.grad_hidden_TH for result in results])
    return replace(
        first,
        grad_hidden_TH=grad_hidden_TH,
        grad_weight_VH=torch.cat([result.grad_weight_VH for result in results]),
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_answer_of_one_rank_and_the_same_bits(world_size: int) -> None:
    by_rank = run_on_ranks(run_every_variant, world_size, world_size=world_size)
    case = _case()
    expected = run_oracle(case, LOSS)
    for number, variant in enumerate(VARIANTS):
        results = [results[number] for results in by_rank]
        got = _assert_ranks_agree(results, variant.is_sequence_parallel)
        assert_matches(got, expected, row_tolerance=row_tolerance(case))
        assert not got.grad_weight_VH[TRUE:].any(), variant
        single = run_head(
            case, build_kernels(variant.backend), variant.mode, LOSS, plan_rows=(3, 2)
        )
        assert_matches(got, single, row_tolerance=row_tolerance(case) / 2, gradient_tolerance=3e-6)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_call_without_rows_passes_on_every_rank(world_size: int) -> None:
    by_rank = run_on_ranks(run_without_rows, world_size, world_size=world_size)
    for results in by_rank:
        for variant, result in zip(VARIANTS, results, strict=True):
            num_hidden_rows = NUM_HIDDEN_ROWS // (world_size if variant.is_sequence_parallel else 1)
            assert result.loss.item() == 0.0
            assert result.grad_hidden_TH.shape == (num_hidden_rows, 5)
            assert not result.grad_hidden_TH.any()
            assert result.grad_weight_VH.shape == (PADDED // world_size, 5)
            assert not result.grad_weight_VH.any()


def test_ranks_with_unequal_shards_go_through_the_same_blocks() -> None:
    world_size = 4  # the last rank has no token at all, the one before it fewer than the others
    by_rank = run_on_ranks(run_planned, world_size, world_size=world_size)
    case = _planned_case()
    expected = run_oracle(case, LOSS)
    kinds = product(TRAINING_MODES, (False, True))
    for number, (_, is_sequence_parallel) in enumerate(kinds):
        got = _assert_ranks_agree([results[number] for results in by_rank], is_sequence_parallel)
        assert_matches(got, expected, row_tolerance=row_tolerance(case), gradient_tolerance=6e-3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_logprobs_and_any_gradient_of_them(world_size: int) -> None:
    by_rank = run_on_ranks(run_logprobs, world_size, world_size=world_size)
    case = _case()
    wide = (case.hidden_TH.double().requires_grad_(), case.weight_VH.double().requires_grad_())
    outputs = oracle_logprobs(
        *wide, case.targets_R, rows_R=torch.tensor(ROWS), true_vocab_size=TRUE
    )
    upstream_R = torch.arange(1.0, 8.0, dtype=torch.float64)
    grads = torch.autograd.grad(outputs, wide, (upstream_R, -upstream_R))
    for results in by_rank:
        for mine, first, theirs in zip(results[:2], by_rank[0][:2], outputs, strict=True):
            assert_bitwise("across ranks", mine, first)
            assert_close("rows", mine, theirs, atol=row_tolerance(case))
        assert_relative_norm("hidden", results[2], grads[0], GRADIENT_TOLERANCE)
    weight_VH = torch.cat([results[3] for results in by_rank])
    assert_relative_norm("weight", weight_VH, grads[1], GRADIENT_TOLERANCE)
