"""Inputs for the head, and one way to run it and its oracle on them.

Shape suffixes as in ``head_oracle``.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.distributed as dist
from prefixrl_kernels import HeadPlan, RowIndex, reinforce_head
from prefixrl_kernels.head import autograd
from prefixrl_kernels.head.autograd import WeightGrad
from prefixrl_kernels.head.estimators import Estimator
from prefixrl_kernels.head.passes import HeadCall, Loss
from prefixrl_kernels.head.reference import TorchRows
from prefixrl_kernels.head.row_kernels import LossInputs, RowKernels
from prefixrl_kernels.head.table import HeadStatistics
from prefixrl_kernels.head.triton_rows import TritonRows
from prefixrl_kernels.head.vocab import VocabShard
from prefixrl_kernels.head_plan import Mode
from torch import Tensor
from torch.utils import deterministic

from tests.support.head_oracle import (
    OracleLoss,
    OracleRows,
    assert_close,
    assert_relative_norm,
    oracle_logprobs,
    oracle_loss,
)

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu")
"""Where the tests run: Triton's interpreter takes tensors of the CPU."""

TRAINING_MODES: tuple[Mode, ...] = ("save_dlogits", "grad_in_forward", "recompute")

ROW_TOLERANCE = 2e-6
"""Nats per unit of the largest logit, float32: the products add up in another order."""

GRADIENT_TOLERANCE = 1e-5
"""Frobenius norm of a gradient's error over that of the gradient, float32."""

BLOCK = 16
"""Columns and hidden columns that a program of ``tiny_triton`` reads at once."""


def tiny_triton() -> TritonRows:
    """Return Triton kernels whose blocks are small enough that little tensors have several."""
    return TritonRows(columns_at_once=BLOCK, rows_at_once=4, hidden_at_once=BLOCK, num_warps=1)


def build_kernels(name: str) -> RowKernels:
    """Return the row kernels ``torch`` or ``triton``."""
    return TorchRows() if name == "torch" else tiny_triton()


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadCase:
    """The tensors of one call."""

    hidden_TH: Tensor
    weight_VH: Tensor
    targets_R: Tensor
    rows_R: tuple[int, ...] | None
    loss_rows: OracleRows
    true_vocab_size: int
    temperature: float = 1.0

    @property
    def num_rows(self) -> int:
        return self.targets_R.size(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadResult:
    """What one call gave; ``statistics`` by the names of ``HeadStatistics``."""

    loss: Tensor
    statistics: dict[str, Tensor]
    grad_hidden_TH: Tensor
    grad_weight_VH: Tensor


def make_case(
    *,
    num_rows: int = 7,
    num_hidden_rows: int | None = None,
    rows_R: tuple[int, ...] | None = None,
    vocab: int = 37,
    true_vocab_size: int | None = None,
    hidden_size: int = 5,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    logit_std: float = 3.0,
    has_all_inputs: bool = True,
    seed: int = 0,
) -> HeadCase:
    """Return a random case: logits of the given size, ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true_vocab_size = vocab if true_vocab_size is None else true_vocab_size
    if rows_R is not None:
        num_rows = len(rows_R)
    num_hidden_rows = num_rows if num_hidden_rows is None else num_hidden_rows
    hidden_TH = normal(num_hidden_rows, hidden_size).to(dtype)
    weight_VH = (normal(vocab, hidden_size) * logit_std / hidden_size**0.5).to(dtype)
    targets_R = torch.randint(0, true_vocab_size, (num_rows,), generator=generator)
    advantages_R = normal(num_rows).float()
    loss_rows = OracleRows(advantages=advantages_R, num_global_loss_tokens=3.0 * max(num_rows, 1))
    case = HeadCase(
        hidden_TH=hidden_TH,
        weight_VH=weight_VH,
        targets_R=targets_R,
        rows_R=rows_R,
        loss_rows=loss_rows,
        true_vocab_size=true_vocab_size,
        temperature=temperature,
    )
    if has_all_inputs:
        logprobs_R, _ = _oracle_rows(case, hidden_TH.double(), weight_VH.double())
        loss_rows = replace(
            loss_rows,
            weights=normal(num_rows).abs().float(),
            rollout_logprobs=(logprobs_R + 0.5 * normal(num_rows)).float(),
            reference_logprobs=(logprobs_R + 0.5 * normal(num_rows)).float(),
        )
    return to_device(replace(case, loss_rows=loss_rows))


def case_of_logits(logits_RV: Tensor, targets: list[int], advantages: list[float]) -> HeadCase:
    """Return a case whose logits are exactly these, and whose hidden gradient is theirs.

    The hidden states are the logits and the weight is the unit matrix: only finite logits.
    """
    case = HeadCase(
        hidden_TH=logits_RV,
        weight_VH=torch.eye(logits_RV.size(1), dtype=logits_RV.dtype),
        targets_R=torch.tensor(targets),
        rows_R=None,
        loss_rows=OracleRows(advantages=torch.tensor(advantages)),
        true_vocab_size=logits_RV.size(1),
    )
    return to_device(case)


def to_device(case: HeadCase, device: torch.device = DEVICE) -> HeadCase:
    """Return the case with its tensors on ``device``."""
    return replace(
        case,
        hidden_TH=case.hidden_TH.to(device),
        weight_VH=case.weight_VH.to(device),
        targets_R=case.targets_R.to(device),
        loss_rows=_converted(case.loss_rows, device),
    )


def in_float64(rows: OracleRows) -> OracleRows:
    """Return the loss's inputs in float64."""
    return _converted(rows, torch.float64)


def _converted(rows: OracleRows, to: torch.device | torch.dtype) -> OracleRows:
    values = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return replace(rows, **{k: v.to(to) for k, v in values.items() if isinstance(v, Tensor)})


def run_head(
    case: HeadCase,
    kernels: RowKernels,
    mode: Mode,
    options: OracleLoss | None = None,
    *,
    plan_rows: tuple[int, int] | None = None,
    memory_budget_bytes: int = 10**9,
    upstream: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    weight_grad: WeightGrad = "autograd",
    promised_upstream: float | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    sequence_parallel: bool = False,
) -> HeadResult:
    """Run forward and backward pass.

    Args:
        case: the tensors; a leaf that already requires a gradient is used itself, so that
            attributes such as ``main_grad`` are seen.
        kernels: backend.
        mode: of the plan.
        options: of the loss.
        plan_rows: rows of a chunk and of a block of logits, smaller than the planner would ever
            make them; None plans by the budget.
        memory_budget_bytes: for the planner.
        upstream: gradient of the loss.
        logits_dtype: as the operation's.
        weight_grad: as the operation's.
        promised_upstream: as the operation's.
        tp_group: as the operation's.
        vocab_start: as the operation's.
        sequence_parallel: as the operation's.
    """
    options = OracleLoss() if options is None else options
    hidden_TH, weight_VH = _leaf(case.hidden_TH), _leaf(case.weight_VH)
    if plan_rows is None:
        loss, statistics = reinforce_head(
            hidden_TH,
            weight_VH,
            case.targets_R,
            case.rows_R,
            case.loss_rows.advantages,
            true_vocab_size=case.true_vocab_size,
            rollout_logprobs_R=case.loss_rows.rollout_logprobs,
            reference_logprobs_R=case.loss_rows.reference_logprobs,
            weights_R=case.loss_rows.weights,
            num_global_loss_tokens=case.loss_rows.num_global_loss_tokens,
            temperature=case.temperature,
            logits_dtype=logits_dtype,
            tp_group=tp_group,
            vocab_start=vocab_start,
            sequence_parallel=sequence_parallel,
            mode=mode,
            memory_budget_bytes=memory_budget_bytes,
            weight_grad=weight_grad,
            promised_upstream=promised_upstream,
            backend=kernels,
            **asdict(options),
        )
    else:
        num_hidden_rows = case.hidden_TH.size(0)
        if sequence_parallel and tp_group is not None:
            num_hidden_rows *= tp_group.size()
        full = torch.float64 if case.hidden_TH.dtype == torch.float64 else torch.float32
        call = HeadCall(
            targets_R=case.targets_R,
            index=RowIndex.build(
                case.rows_R, num_hidden_rows=num_hidden_rows, device=case.hidden_TH.device
            ),
            shard=VocabShard.build(
                num_columns=case.weight_VH.size(0),
                start=vocab_start,
                true_vocab_size=case.true_vocab_size,
            ),
            temperature=case.temperature,
            logits_dtype=logits_dtype or full,
            tp_group=tp_group,
            is_sequence_parallel=sequence_parallel,
            plan=HeadPlan(
                mode=mode,
                chunk_rows=max(case.num_rows, 1) if mode == "save_dlogits" else plan_rows[0],
                logit_rows=plan_rows[1],
                peak_bytes=0,
                budget_bytes=1,
            ),
            kernels=kernels,
        )
        loss, table_KR = autograd.reinforce(
            hidden_TH,
            weight_VH,
            call,
            Loss(inputs=loss_inputs(case.loss_rows), estimator=Estimator(**asdict(options))),
            weight_grad,
            promised_upstream,
        )
        statistics = HeadStatistics.from_table(table_KR)
    grads = torch.autograd.grad(
        loss, (hidden_TH, weight_VH), torch.full_like(loss, upstream), allow_unused=True
    )
    nothing = torch.zeros(())
    return HeadResult(
        loss=loss.detach(),
        statistics={field.name: getattr(statistics, field.name) for field in fields(statistics)},
        grad_hidden_TH=nothing if grads[0] is None else grads[0],
        grad_weight_VH=nothing if grads[1] is None else grads[1],
    )


def loss_inputs(rows: OracleRows) -> LossInputs:
    """Return the oracle's inputs in the operation's record."""
    return LossInputs(
        advantages_R=rows.advantages,
        weights_R=rows.weights,
        rollout_logprobs_R=rows.rollout_logprobs,
        reference_logprobs_R=rows.reference_logprobs,
        num_global_loss_tokens=rows.num_global_loss_tokens,
    )


def run_oracle(
    case: HeadCase, options: OracleLoss | None = None, *, dtype: torch.dtype = torch.float64
) -> HeadResult:
    """Return the result by definition on the CPU; in float32 it is plain PyTorch's result."""
    case = to_device(case, torch.device("cpu"))
    hidden_TH = case.hidden_TH.detach().to(dtype, copy=True).requires_grad_()
    weight_VH = case.weight_VH.detach().to(dtype, copy=True).requires_grad_()
    logprobs_R, entropies_R = _oracle_rows(case, hidden_TH, weight_VH)
    loss, statistics = oracle_loss(
        logprobs_R, entropies_R, case.loss_rows, OracleLoss() if options is None else options
    )
    grad_hidden_TH, grad_weight_VH = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    return HeadResult(
        loss=loss.detach(),
        statistics=statistics,
        grad_hidden_TH=grad_hidden_TH,
        grad_weight_VH=grad_weight_VH,
    )


def assert_matches(
    got: HeadResult,
    expected: HeadResult,
    *,
    row_tolerance: float,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
) -> None:
    """Fail unless loss, every statistic and both gradients agree.

    ``row_tolerance`` (nats) bounds logprobs and entropies; the other statistics are smooth
    functions of the logprob, whose derivative is at most 1 plus their own size.
    """
    for name, values_R in expected.statistics.items():
        rtol = 0.0 if name in ("logprobs_R", "entropies_R") else 2 * row_tolerance
        ours_R = got.statistics[name]
        assert_close(name, ours_R.double(), values_R.double(), atol=2 * row_tolerance, rtol=rtol)
    assert_close("loss", got.loss, expected.loss, atol=10 * row_tolerance, rtol=1e-5)
    assert_relative_norm(
        "grad_hidden_TH", got.grad_hidden_TH, expected.grad_hidden_TH, gradient_tolerance
    )
    assert_relative_norm(
        "grad_weight_VH", got.grad_weight_VH, expected.grad_weight_VH, gradient_tolerance
    )


def row_tolerance(case: HeadCase) -> float:
    """Return the float32 bound on a row's logprob and entropy, from the largest logit."""
    hidden_TH, weight_VH = case.hidden_TH.detach().double(), case.weight_VH.detach().double()
    logits_TV = hidden_TH @ weight_VH[: case.true_vocab_size].T / case.temperature
    largest = float(logits_TV.abs().nan_to_num(0.0, 0.0).max()) if logits_TV.numel() else 0.0
    return ROW_TOLERANCE * (1.0 + largest)


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, so that reading it unwritten shows."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_filling = deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]  # a property of the module
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        deterministic.fill_uninitialized_memory = was_filling  # pyright: ignore[reportAttributeAccessIssue]


def _oracle_rows(case: HeadCase, hidden_TH: Tensor, weight_VH: Tensor) -> tuple[Tensor, Tensor]:
    return oracle_logprobs(
        hidden_TH,
        weight_VH,
        case.targets_R,
        rows_R=None if case.rows_R is None else torch.tensor(case.rows_R, dtype=torch.int64),
        true_vocab_size=case.true_vocab_size,
        temperature=case.temperature,
    )


def _leaf(values: Tensor) -> Tensor:
    return values if values.requires_grad else values.detach().requires_grad_()
