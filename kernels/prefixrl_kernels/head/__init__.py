"""Language-model head: logprobs, entropies and the policy-gradient loss of given rows.

The logits of all rows never exist at once, and rows that predict no completion token cost
nothing. Start with ``reinforce_head``. Shape suffixes: ``T`` hidden rows, ``R`` rows that are
trained or scored, ``H`` hidden size, ``V`` this rank's share of the vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prefixrl_kernels.head import autograd, checks
from prefixrl_kernels.head.autograd import WeightGrad
from prefixrl_kernels.head.estimators import Estimator, Importance, Kl
from prefixrl_kernels.head.linear_logprob import linear_logprob_forward
from prefixrl_kernels.head.passes import HeadCall, Loss
from prefixrl_kernels.head.reference import TorchRows
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.row_kernels import LossInputs, RowKernels
from prefixrl_kernels.head.table import HeadStatistics
from prefixrl_kernels.head.triton_rows import TritonRows, is_interpreted
from prefixrl_kernels.head.vocab import VocabShard
from prefixrl_kernels.head_plan import DEFAULT_BUDGET_BYTES, HeadPlan, HeadShape, Mode, plan_head

logger = logging.getLogger(__name__)

Backend = Literal["auto", "torch", "triton"]
Rows = RowIndex | Tensor | np.ndarray | Sequence[int] | None


def reinforce_head(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    rows_R: Rows,
    advantages_R: Tensor,
    *,
    true_vocab_size: int,
    rollout_logprobs_R: Tensor | None = None,
    reference_logprobs_R: Tensor | None = None,
    weights_R: Tensor | None = None,
    num_global_loss_tokens: float | None = None,
    temperature: float = 1.0,
    importance: Importance = "none",
    min_importance: float = 0.5,
    max_importance: float = 2.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: Kl = "none",
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    sequence_parallel: bool = False,
    mode: Mode | Literal["auto"] = "auto",
    memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    weight_grad: WeightGrad = "autograd",
    promised_upstream: float | None = None,
    backend: Backend | RowKernels = "auto",
) -> tuple[Tensor, HeadStatistics]:
    """Return the policy-gradient loss of the rows, with gradient, and their statistics, without.

    With ``logits = hidden[rows] @ weight.T / temperature`` over the columns below
    ``true_vocab_size``, ``logprob`` the log-softmax at the row's target and ``A`` its advantage:

        loss = sum(weights * (-term - entropy_coefficient * entropy + kl_coefficient * kl))
               / num_global_loss_tokens

    ``prefixrl_kernels.head.estimators`` lists the terms of each ``importance`` and ``kl``. The
    gradient comes out of the same pass as the loss, so ``loss`` can be scaled before ``backward``
    and nothing else: its upstream gradient is a scalar.

    All ranks of ``tp_group`` must call this and its backward pass with the same rows, targets and
    other values per row. The gradient of ``hidden_TH`` is summed over the group. Differentiable
    once.

    Args:
        hidden_TH: [T, H] float, output of the final norm; any strides. With ``sequence_parallel``
            this rank's [T / tp, H] share of the sequence.
        weight_VH: [V, H] float of the same dtype, this rank's rows of the output embedding.
        targets_R: [R] int64 token ids in the whole vocabulary. A target that no rank holds gives
            the row a NaN logprob.
        rows_R: [R] positions in the T hidden rows, on the host (see ``RowIndex``, which can be
            built ahead); the same position may occur several times. None is all rows in order.
        advantages_R: [R] float32.
        true_vocab_size: tokens of the vocabulary; columns from there on are padding, with no
            probability and no gradient.
        rollout_logprobs_R: [R] float32, nats, as the engine reported them; needed by every
            ``importance`` but ``none``.
        reference_logprobs_R: [R] float32, nats, of the frozen policy; needed by every ``kl`` but
            ``none``.
        weights_R: [R] float32 aggregation weights; None is 1.
        num_global_loss_tokens: divides the sum: the count of the whole global batch, known before
            the pass. None is 1, for callers that divide elsewhere; one of this and ``weights_R``
            must be given, so that no mean over a local batch can be meant.
        temperature: divides the logits, in float32.
        importance: how the ratio to the rollout logprobs enters.
        min_importance: lower end of the band of ``masked``.
        max_importance: cut of ``truncated`` and upper end of the band of ``masked``.
        clip_low: ``ppo_clip`` and ``cispo`` clip the ratio at ``1 - clip_low``.
        clip_high: ``ppo_clip`` and ``cispo`` clip the ratio at ``1 + clip_high``.
        kl: estimate of KL(policy || reference) in the loss.
        kl_coefficient: its weight.
        entropy_coefficient: weight of the entropy bonus.
        logits_dtype: float32 (None) keeps what the matrix product accumulated; the operands' dtype
            rounds logits as an ordinary output layer does. Must be the rollout engine's choice.
        tp_group: ranks that share the vocabulary; None when ``weight_VH`` is all of it.
        vocab_start: token id of the first row of ``weight_VH``.
        sequence_parallel: hidden states are sharded along the sequence over ``tp_group``: gathered
            in the forward pass, reduce-scattered in the backward pass.
        mode: what is kept between the passes, see ``prefixrl_kernels.head_plan``. Without gradient
            it is ``no_grad``.
        memory_budget_bytes: what ``auto`` may use beyond inputs and returned gradients.
        weight_grad: ``autograd`` returns the gradient of the weight in its dtype; ``main_grad``
            adds it in float32 to ``weight_VH.main_grad``, by Megatron's protocol.
        promised_upstream: with ``main_grad``, lets mode ``grad_in_forward`` add to ``main_grad``
            in the forward pass, for this upstream gradient of the loss. The forward pass must then
            run exactly once per backward pass (never in a recomputed region). If the promise is
            broken the gradient of ``hidden_TH`` is NaN.
        backend: row kernels; ``auto`` is Triton on CUDA and PyTorch elsewhere.

    Returns:
        loss: [] float32.
        statistics: of every row, detached.

    Raises:
        ValueError: if shapes, dtypes, ranges or options do not fit.
    """
    estimator = Estimator(
        importance=importance,
        min_importance=min_importance,
        max_importance=max_importance,
        clip_low=clip_low,
        clip_high=clip_high,
        kl=kl,
        kl_coefficient=kl_coefficient,
        entropy_coefficient=entropy_coefficient,
    )
    options = _Options(
        name="reinforce_head",
        true_vocab_size=true_vocab_size,
        temperature=float(temperature),
        logits_dtype=logits_dtype,
        tp_group=tp_group,
        vocab_start=vocab_start,
        sequence_parallel=sequence_parallel,
        memory_budget_bytes=memory_budget_bytes,
        weight_grad=weight_grad,
        # Without a gradient of the hidden states nothing could tell that the promise was broken.
        promised_upstream=promised_upstream if hidden_TH.requires_grad else None,
        backend=backend,
    )
    checks.check_operands(options.name, hidden_TH, weight_VH)
    checks.check_weight_grad(options.name, weight_VH, weight_grad, promised_upstream)
    needs_grad = _needs_grad(hidden_TH, weight_VH)
    if needs_grad and mode == "no_grad":
        raise ValueError(
            "reinforce_head: mode='no_grad' was asked for with inputs that need a gradient; call "
            "it under torch.no_grad(), or leave mode='auto'"
        )
    call = _build_call(
        hidden_TH, weight_VH, targets_R, rows_R, options, mode if needs_grad else "no_grad"
    )
    inputs = LossInputs.build(
        advantages_R=advantages_R,
        weights_R=weights_R,
        rollout_logprobs_R=rollout_logprobs_R,
        reference_logprobs_R=reference_logprobs_R,
        num_global_loss_tokens=1.0 if num_global_loss_tokens is None else num_global_loss_tokens,
    )
    checks.check_loss(inputs, estimator, call, is_counted=num_global_loss_tokens is not None)
    loss, table_KR = autograd.reinforce(
        hidden_TH,
        weight_VH,
        call,
        Loss(inputs=inputs, estimator=estimator),
        weight_grad,
        options.promised_upstream,
    )
    return loss, HeadStatistics.from_table(table_KR)


def head_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    true_vocab_size: int,
    rows_R: Rows = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    sequence_parallel: bool = False,
    memory_budget_bytes: int = DEFAULT_BUDGET_BYTES,
    weight_grad: WeightGrad = "autograd",
    backend: Backend | RowKernels = "auto",
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the logprob of each row's target and the entropy of each row's distribution.

    With ``logits = hidden[rows] @ weight.T / temperature`` and ``p = softmax(logits)`` over the
    columns below ``true_vocab_size``: ``log p[target]`` and ``-sum(p log p)``. Differentiable
    once, for any gradient of either; the backward pass makes the logits again. Under
    ``torch.no_grad()`` (evaluation, old and reference policies) nothing is kept.

    All ranks of ``tp_group`` must call this, and its backward pass, with the same rows and
    targets. The gradient of ``hidden_TH`` is summed over the group.

    Args:
        hidden_TH: [T, H] float; with ``sequence_parallel`` this rank's [T / tp, H].
        weight_VH: [V, H] float of the same dtype, this rank's rows of the output embedding.
        targets_R: [R] int64 token ids in the whole vocabulary.
        true_vocab_size: tokens of the vocabulary; columns from there on are padding.
        rows_R: [R] positions in the T hidden rows, on the host; None is all rows in order.
        temperature: divides the logits, in float32.
        logits_dtype: float32 (None), or the operands' dtype.
        tp_group: ranks that share the vocabulary; None when ``weight_VH`` is all of it.
        vocab_start: token id of the first row of ``weight_VH``.
        sequence_parallel: hidden states are sharded along the sequence over ``tp_group``.
        memory_budget_bytes: extra memory that the head may use.
        weight_grad: ``autograd``, or ``main_grad`` for Megatron's float32 buffer.
        backend: row kernels; ``auto`` is Triton on CUDA and PyTorch elsewhere.
        fused: without gradient, make the statistics in the epilogue of one Triton product
            (``linear_logprob_forward``) instead of from chunks of logits.

    Returns:
        logprobs_R: [R] float32, nats.
        entropies_R: [R] float32, nats.

    Raises:
        ValueError: if shapes, dtypes, ranges or options do not fit.
    """
    options = _Options(
        name="head_logprobs",
        true_vocab_size=true_vocab_size,
        temperature=float(temperature),
        logits_dtype=logits_dtype,
        tp_group=tp_group,
        vocab_start=vocab_start,
        sequence_parallel=sequence_parallel,
        memory_budget_bytes=memory_budget_bytes,
        weight_grad=weight_grad,
        promised_upstream=None,
        backend=backend,
    )
    checks.check_operands(options.name, hidden_TH, weight_VH)
    checks.check_weight_grad(options.name, weight_VH, weight_grad, None)
    mode = "recompute" if _needs_grad(hidden_TH, weight_VH) else "no_grad"
    if fused and mode != "no_grad":
        raise ValueError(
            "head_logprobs: fused=True has no backward pass; call it under torch.no_grad(), or "
            "leave fused out"
        )
    call = _build_call(hidden_TH, weight_VH, targets_R, rows_R, options, mode)
    if fused:
        return linear_logprob_forward(
            call.gather_rows(hidden_TH),
            weight_VH,
            call.targets_R,
            temperature=call.temperature,
            true_vocab_size=true_vocab_size,
            vocab_start=vocab_start,
            tp_group=call.tp_group,
        )
    return autograd.logprobs(hidden_TH, weight_VH, call, weight_grad)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What both operations take; ``reinforce_head`` says what each field means."""

    name: str
    true_vocab_size: int
    temperature: float
    logits_dtype: torch.dtype | None
    tp_group: dist.ProcessGroup | None
    vocab_start: int
    sequence_parallel: bool
    memory_budget_bytes: int
    weight_grad: WeightGrad
    promised_upstream: float | None
    backend: Backend | RowKernels


def _needs_grad(hidden_TH: Tensor, weight_VH: Tensor) -> bool:
    """Return whether a backward pass can follow."""
    return torch.is_grad_enabled() and (hidden_TH.requires_grad or weight_VH.requires_grad)


def _build_call(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    rows_R: Rows,
    options: _Options,
    mode: Mode | Literal["auto"],
) -> HeadCall:
    """Check the arguments that both operations share, and choose plan and kernels."""
    name, tp_group = options.name, options.tp_group
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    is_gathered = options.sequence_parallel and tp_group is not None
    num_hidden_rows = hidden_TH.size(0) * (tp_group.size() if tp_group and is_gathered else 1)
    if not isinstance(rows_R, RowIndex):
        rows_R = RowIndex.build(rows_R, num_hidden_rows=num_hidden_rows, device=hidden_TH.device)
    checks.check_rows(name, rows_R, num_hidden_rows, targets_R, hidden_TH.device)
    checks.check_vocabulary(name, options.temperature, options.true_vocab_size, options.vocab_start)
    logits_dtype = checks.resolve_logits_dtype(name, options.logits_dtype, hidden_TH.dtype)
    shard = VocabShard.build(
        num_columns=weight_VH.size(0),
        start=options.vocab_start,
        true_vocab_size=options.true_vocab_size,
    )
    shape = HeadShape(
        num_rows=rows_R.num_rows,
        num_columns=_planned_columns(shard, options.true_vocab_size, tp_group),
        hidden_size=hidden_TH.size(1),
        operand_bytes=hidden_TH.element_size(),
        logit_bytes=logits_dtype.itemsize,
        num_ranks=1 if tp_group is None else tp_group.size(),
        is_copied=rows_R.rows_R is not None or not hidden_TH.is_contiguous(),
        has_duplicates=rows_R.has_duplicates,
        num_sequence_rows=num_hidden_rows if is_gathered else 0,
    )
    is_main_grad = options.weight_grad == "main_grad"
    plan = plan_head(
        shape,
        mode=mode,
        memory_budget_bytes=options.memory_budget_bytes,
        has_private_weight_grad=weight_VH.requires_grad and options.promised_upstream is None,
        is_weight_grad_summed=weight_VH.requires_grad and not is_main_grad,
    )
    _state(plan)
    return HeadCall(
        targets_R=targets_R.contiguous(),
        index=rows_R,
        shard=shard,
        temperature=options.temperature,
        logits_dtype=logits_dtype,
        tp_group=tp_group,
        is_sequence_parallel=is_gathered,
        plan=plan,
        kernels=_select_kernels(name, options.backend, hidden_TH),
    )


def _planned_columns(
    shard: VocabShard, true_vocab_size: int, tp_group: dist.ProcessGroup | None
) -> int:
    """Return the columns to plan with, the same on every rank whatever its own shard holds.

    Ranks with different plans would meet in different collectives. With Megatron's padding (to a
    multiple of 128 columns per rank) this is the size of a shard.
    """
    if tp_group is None:
        return shard.row_stride
    return -(-true_vocab_size // (128 * tp_group.size())) * 128


def _select_kernels(name: str, backend: Backend | RowKernels, hidden_TH: Tensor) -> RowKernels:
    """Return the row kernels to use."""
    if not isinstance(backend, str):
        return backend
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"{name}: backend must be auto, torch or triton, got {backend!r}")
    is_float64 = hidden_TH.dtype == torch.float64
    if backend == "triton" and is_float64:
        raise ValueError(f"{name}: the Triton kernels compute in float32; use backend='torch'")
    if backend == "triton" and not (hidden_TH.is_cuda or is_interpreted()):
        raise ValueError(
            f"{name}: backend='triton' needs CUDA tensors, got {hidden_TH.device} ones; use "
            "backend='auto', or for tests set TRITON_INTERPRET=1 before triton is imported"
        )
    if backend == "triton" or (backend == "auto" and hidden_TH.is_cuda and not is_float64):
        return TritonRows()
    return TorchRows()


_stated: set[tuple[str, bool]] = set()


def _state(plan: HeadPlan) -> None:
    """Log the first plan of each mode, and the first that exceeds its budget."""
    is_over = plan.peak_bytes > plan.budget_bytes
    if (plan.mode, is_over) in _stated:
        return
    _stated.add((plan.mode, is_over))
    logger.log(logging.WARNING if is_over else logging.INFO, plan.describe())
