"""The head's two differentiable operations.

``reinforce`` owns its loss: the coefficients of the gradient are known as soon as a row's
logprob is, so the gradient of the logits comes out of the forward pass (6 R H V FLOPs).
``logprobs`` takes any gradient of logprobs and entropies, and makes the logits again (8 R H V).

Shape suffixes: ``R`` rows, ``T`` hidden rows of this rank, ``H`` hidden size, ``V`` this rank's
share of the vocabulary, ``K`` table fields.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from prefixrl_kernels.head import table
from prefixrl_kernels.head.main_grad import main_grad_of, report_added
from prefixrl_kernels.head.matmul import wide_dtype
from prefixrl_kernels.head.passes import (
    Buffers,
    GradientSums,
    HeadCall,
    Loss,
    chunks_of,
    fill_table,
    finish_hidden,
    recompute_grads,
)

WeightGrad = Literal["autograd", "main_grad"]

WEIGHT_GRADS: tuple[WeightGrad, ...] = ("autograd", "main_grad")


def reinforce(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    call: HeadCall,
    loss: Loss,
    weight_grad: WeightGrad,
    promised_upstream: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the scalar loss, with gradient, and the [K, R] result table, without."""
    with torch.cuda.device_of(hidden_TH):  # Triton launches on the current device
        result = _Reinforce.apply(hidden_TH, weight_VH, call, loss, weight_grad, promised_upstream)
    assert result is not None, "apply returns what forward does"
    return result


def logprobs(
    hidden_TH: Tensor, weight_VH: Tensor, call: HeadCall, weight_grad: WeightGrad
) -> tuple[Tensor, Tensor]:
    """Return [R] logprobs and entropies, differentiable for any gradient of either."""
    with torch.cuda.device_of(hidden_TH):  # Triton launches on the current device
        result = _Logprobs.apply(hidden_TH, weight_VH, call, weight_grad)
    assert result is not None, "apply returns what forward does"
    return result


class _Reinforce(torch.autograd.Function):
    """Loss and statistics; the plan's mode says where the gradients are made."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares *args
        ctx: Any,  # noqa: ANN401  (torch's context)
        hidden_TH: Tensor,
        weight_VH: Tensor,
        call: HeadCall,
        loss: Loss,
        weight_grad: WeightGrad,
        promised_upstream: float | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss, and what the mode keeps for the backward pass."""
        ctx.call, ctx.loss, ctx.weight, ctx.weight_grad = call, loss, weight_VH, weight_grad
        ctx.promised_upstream = promised_upstream
        ctx.num_hidden_rows, ctx.hidden_dtype = hidden_TH.size(0), hidden_TH.dtype
        rows_RH = call.gather_rows(hidden_TH)
        table_KR = call.new_table(rows_RH)
        mode = call.plan.mode
        buffers = Buffers(call, weight_VH, has_grads=mode in ("save_dlogits", "grad_in_forward"))
        sums = _forward_sums(ctx, rows_RH) if mode == "grad_in_forward" else None
        for chunk, is_last in chunks_of(call):
            fill_table(call, rows_RH, table_KR, buffers, chunk, loss=loss)
            if sums is not None:
                grads_RV = buffers.chunk_grads(0, chunk.stop - chunk.start)
                sums.add(chunk, grads_RV, is_last=is_last)
        if sums is not None:
            ctx.save_for_backward(sums.hidden, sums.private_target_VH)
        elif mode == "save_dlogits":
            ctx.save_for_backward(rows_RH, weight_VH, buffers.grads_RV)
        else:
            ctx.save_for_backward(rows_RH, weight_VH, table_KR)
        ctx.mark_non_differentiable(table_KR)
        ctx.set_materialize_grads(False)  # the table's would be zeros of its size
        return table_KR[table.LOSS].sum(), table_KR

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # once_differentiable
        ctx: Any,  # noqa: ANN401  (torch's context)
        upstream: Tensor | None,
        _table: None,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states and weight."""
        if upstream is None:
            return (None,) * 6
        assert upstream.dim() == 0, "the loss is a scalar, so its gradient is one"
        call: HeadCall = ctx.call
        if call.plan.mode == "grad_in_forward":
            hidden, weight = _finish_forward_sums(ctx, upstream)
        elif call.plan.mode == "save_dlogits":
            rows_RH, weight_VH, grads_RV = ctx.saved_tensors
            sums, target_VH = _backward_sums(ctx, rows_RH, weight_VH, factor=upstream)
            for chunk, is_last in chunks_of(call):  # a single one, of all rows
                sums.add(chunk, grads_RV[:, : call.shard.num_columns], is_last=is_last)
            hidden = _finish_hidden(ctx, sums.hidden, upstream)
            weight = _deliver(ctx, target_VH)
        else:
            rows_RH, weight_VH, table_KR = ctx.saved_tensors
            table_KR = table_KR.clone()
            table_KR[table.LOGPROB_GRAD : table.ENTROPY_GRAD + 1] *= upstream
            hidden, weight = _recompute(
                ctx, rows_RH, weight_VH, table_KR, has_entropy_grad=ctx.loss.has_entropy_grad
            )
        return hidden, weight, None, None, None, None


class _Logprobs(torch.autograd.Function):
    """Logprobs and entropies; the backward pass makes the logits again."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares *args
        ctx: Any,  # noqa: ANN401  (torch's context)
        hidden_TH: Tensor,
        weight_VH: Tensor,
        call: HeadCall,
        weight_grad: WeightGrad,
    ) -> tuple[Tensor, Tensor]:
        """Compute logprobs and entropies."""
        ctx.call, ctx.weight, ctx.weight_grad = call, weight_VH, weight_grad
        ctx.num_hidden_rows, ctx.hidden_dtype = hidden_TH.size(0), hidden_TH.dtype
        ctx.set_materialize_grads(False)
        rows_RH = call.gather_rows(hidden_TH)
        table_KR = call.new_table(rows_RH)
        buffers = Buffers(call, weight_VH, has_grads=False)
        for chunk, _ in chunks_of(call):
            fill_table(call, rows_RH, table_KR, buffers, chunk)
        ctx.save_for_backward(rows_RH, weight_VH, table_KR)
        return table_KR[table.LOGPROB].clone(), table_KR[table.ENTROPY].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # once_differentiable
        ctx: Any,  # noqa: ANN401  (torch's context)
        logprob_grads_R: Tensor | None,
        entropy_grads_R: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden states and weight."""
        rows_RH, weight_VH, table_KR = ctx.saved_tensors
        table_KR = table_KR.clone()
        for field, grads_R in (
            (table.LOGPROB_GRAD, logprob_grads_R),
            (table.ENTROPY_GRAD, entropy_grads_R),
        ):
            table_KR[field] = 0.0 if grads_R is None else grads_R
        hidden, weight = _recompute(
            ctx, rows_RH, weight_VH, table_KR, has_entropy_grad=entropy_grads_R is not None
        )
        return hidden, weight, None, None


def _forward_sums(ctx: Any, rows_RH: Tensor) -> GradientSums:  # noqa: ANN401  (torch's context)
    """Return the sums that a forward pass adds to, straight into ``main_grad`` if it may."""
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    promised = ctx.promised_upstream
    is_direct = needs_weight and promised is not None
    ctx.is_direct, ctx.is_delivered = is_direct, False
    if is_direct:
        target_VH = main_grad_of(ctx.weight)
    elif needs_weight:
        target_VH = torch.empty_like(ctx.weight, dtype=wide_dtype(ctx.weight.dtype))
    else:
        target_VH = None
    return GradientSums(
        ctx.call,
        rows_RH,
        ctx.weight,
        needs_hidden=needs_hidden,
        weight_target_VH=target_VH,
        is_target_added_to=is_direct,
        factor=promised if is_direct and promised != 1.0 else None,
    )


def _finish_forward_sums(
    ctx: Any,  # noqa: ANN401  (torch's context)
    upstream: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Scale what the forward pass has summed, and deliver it."""
    if ctx.is_delivered:
        raise RuntimeError(
            "reinforce_head: a second backward pass through mode grad_in_forward, whose gradients "
            "were made once and given away; use mode='recompute' with retain_graph=True"
        )
    ctx.is_delivered = True
    hidden, private_VH = ctx.saved_tensors
    scale = upstream
    if ctx.is_direct:
        # main_grad already holds the gradient for the promised value. A broken promise cannot be
        # raised without waiting for the device; NaN stops the step instead.
        scale = torch.where(upstream == ctx.promised_upstream, upstream, float("nan"))
    grad_hidden = _finish_hidden(ctx, hidden, scale)
    if not ctx.needs_input_grad[1]:
        return grad_hidden, None
    if ctx.weight_grad == "main_grad":
        if private_VH is not None:
            main_grad_of(ctx.weight).addcmul_(private_VH, upstream)
        return grad_hidden, report_added(ctx.weight)
    grad_weight_VH = torch.empty_like(ctx.weight)
    return grad_hidden, torch.mul(private_VH, upstream, out=grad_weight_VH)


def _backward_sums(
    ctx: Any,  # noqa: ANN401  (torch's context)
    rows_RH: Tensor,
    weight_VH: Tensor,
    *,
    factor: Tensor | None = None,
) -> tuple[GradientSums, Tensor | None]:
    """Return the sums that a backward pass adds to, and where the weight's gradient goes."""
    call: HeadCall = ctx.call
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    is_direct = needs_weight and ctx.weight_grad == "main_grad"
    target_VH = None
    if is_direct:
        target_VH = main_grad_of(ctx.weight)
    elif needs_weight:
        is_single = call.index.num_rows <= call.plan.chunk_rows
        dtype = weight_VH.dtype if is_single else wide_dtype(weight_VH.dtype)
        target_VH = torch.empty_like(weight_VH, dtype=dtype)
    sums = GradientSums(
        call,
        rows_RH,
        weight_VH,
        needs_hidden=needs_hidden,
        weight_target_VH=target_VH,
        is_target_added_to=is_direct,
        factor=factor,
    )
    return sums, target_VH


def _recompute(
    ctx: Any,  # noqa: ANN401  (torch's context)
    rows_RH: Tensor,
    weight_VH: Tensor,
    table_KR: Tensor,
    *,
    has_entropy_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden states and weight from logits that are made again."""
    call: HeadCall = ctx.call
    buffers = Buffers(call, weight_VH, has_grads=True)
    sums, target_VH = _backward_sums(ctx, rows_RH, weight_VH)
    for chunk, is_last in chunks_of(call):
        recompute_grads(call, rows_RH, table_KR, buffers, chunk, has_entropy_grad=has_entropy_grad)
        grads_RV = buffers.chunk_grads(0, chunk.stop - chunk.start)
        sums.add(chunk, grads_RV, is_last=is_last)
    return _finish_hidden(ctx, sums.hidden, None), _deliver(ctx, target_VH)


def _finish_hidden(
    ctx: Any,  # noqa: ANN401  (torch's context)
    summed: Tensor | None,
    scale: Tensor | None,
) -> Tensor | None:
    """Return the gradient of the hidden states, if it is wanted."""
    if summed is None:
        return None
    return finish_hidden(
        ctx.call, summed, scale, num_hidden_rows=ctx.num_hidden_rows, dtype=ctx.hidden_dtype
    )


def _deliver(ctx: Any, target_VH: Tensor | None) -> Tensor | None:  # noqa: ANN401
    """Return what autograd is to be given for the weight."""
    if target_VH is None:
        return None
    if ctx.weight_grad == "main_grad":
        return report_added(ctx.weight)
    return target_VH.to(ctx.weight.dtype)
