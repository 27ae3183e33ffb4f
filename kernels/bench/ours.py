"""Our head in every mode."""

from functools import partial
from typing import Any

import torch
from prefixrl_kernels import RowIndex, head_logprobs, linear_logprob_forward, reinforce_head
from torch import Tensor

from bench.cases import Inputs
from bench.implementation import (
    Implementation,
    Outputs,
    Runner,
    bfloat16_logit_bounds,
    float32_logit_bounds,
)

_ENTROPY_COEFFICIENT = 0.01
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BOUNDS = {"fp32": float32_logit_bounds, "bf16": bfloat16_logit_bounds}

_TRAINING: dict[str, dict[str, Any]] = {
    "auto": {"mode": "auto"},
    "auto-main-grad": {"mode": "auto", "weight_grad": "main_grad", "promised_upstream": 1.0},
    "save-dlogits": {"mode": "save_dlogits"},
    "grad-in-forward": {"mode": "grad_in_forward"},
    "grad-in-forward-main-grad": {
        "mode": "grad_in_forward",
        "weight_grad": "main_grad",
        "promised_upstream": 1.0,
    },
    "recompute": {"mode": "recompute"},
}
"""Name -> arguments of ``reinforce_head``. With ``main_grad`` the weight's gradient is added to a
float32 buffer that exists before the step, as Megatron's does: the buffer counts as the gradient,
not as extra memory."""


class ReinforceHead(Runner):
    """A training step of ``reinforce_head`` with advantages of one.

    The active rows of a whole batch are gathered, and their gradients put back, inside the timed
    call; the index of the rows is there before, as it is in training.
    """

    def __init__(self, inputs: Inputs, *, logits_dtype: torch.dtype, **arguments: Any) -> None:  # noqa: ANN401  (of reinforce_head)
        """Make the per-row inputs."""
        super().__init__(inputs)
        self._arguments = {
            "targets_R": inputs.active_targets,
            "rows_R": _row_index(inputs),
            "advantages_R": torch.ones(inputs.num_active, device=inputs.hidden_RH.device),
            "num_global_loss_tokens": inputs.num_active,
            "true_vocab_size": inputs.weight_VH.size(0),
            "logits_dtype": logits_dtype,
            "backend": "triton",
            **arguments,
        }
        self._has_main_grad = arguments.get("weight_grad") == "main_grad"
        self._logprobs_A: Tensor | None = None

    def acquire(self) -> None:
        """Make Megatron's gradient buffer, zero as at the start of a step."""
        if self._has_main_grad:
            buffer_VH = torch.zeros_like(self.weight_VH, dtype=torch.float32)
            self.weight_VH.main_grad = buffer_VH  # pyright: ignore[reportAttributeAccessIssue]  # Megatron's attribute

    def release(self) -> None:
        """Drop the gradients and the buffer."""
        super().release()
        self._logprobs_A = None
        if self._has_main_grad:
            self.weight_VH.main_grad = None  # pyright: ignore[reportAttributeAccessIssue]  # Megatron's attribute

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the loss and keep the logprobs, which the same call computes."""
        loss, statistics = reinforce_head(hidden_RH, weight_VH, **self._arguments)
        self._logprobs_A = statistics.logprobs_R
        return loss

    def forward_backward(self) -> Outputs:
        """Return loss and gradients; the weight's may be the buffer."""
        if not self._has_main_grad:
            return super().forward_backward()
        loss = self.loss(self.hidden_RH, self.weight_VH)
        loss.backward()
        assert self.hidden_RH.grad is not None, "the hidden states require a gradient"
        return Outputs(
            loss=loss.detach(),
            grad_hidden_RH=self.hidden_RH.grad,
            grad_weight_VH=self.weight_VH.main_grad,  # pyright: ignore[reportAttributeAccessIssue]  # Megatron's attribute
            is_added_in_place=True,
        )

    def logprobs(self) -> Tensor | None:
        """Return the logprobs of the last step."""
        return self._logprobs_A


class HeadLogprobs(Runner):
    """``head_logprobs`` without gradients: chunks of logits, one read each."""

    def __init__(self, inputs: Inputs, *, logits_dtype: torch.dtype) -> None:
        """Remember the precision of the logits."""
        super().__init__(inputs)
        self._logits_dtype = logits_dtype
        self._row_index = _row_index(inputs)
        self._targets_A = inputs.active_targets

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the mean negative logprob."""
        return -self._logprobs(hidden_RH, weight_VH).mean()

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Return the [A] logprobs."""
        return self._logprobs(self.inputs.hidden_RH, self.inputs.weight_VH)

    def logprobs(self) -> Tensor | None:
        """Return the [A] logprobs."""
        return self.forward()

    def _logprobs(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        logprobs_A, _ = head_logprobs(
            hidden_RH,
            weight_VH,
            self._targets_A,
            rows_R=self._row_index,
            true_vocab_size=weight_VH.size(0),
            logits_dtype=self._logits_dtype,
            backend="triton",
        )
        return logprobs_A


class LinearLogprobForward(HeadLogprobs):
    """``linear_logprob_forward``: the logits never reach memory.

    It takes packed rows, so that a batch with inactive rows is packed inside the timed call.
    """

    def _logprobs(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        if self.inputs.rows == "all":
            assert self._row_index is not None, "built for a whole batch"
            hidden_RH = self._row_index.gather(hidden_RH)
        logprobs_A, _ = linear_logprob_forward(
            hidden_RH, weight_VH, self._targets_A, true_vocab_size=weight_VH.size(0)
        )
        return logprobs_A


def _row_index(inputs: Inputs) -> RowIndex | None:
    """Return the index of the active rows, which training builds with the batch's layout."""
    if inputs.rows == "active":
        return None
    return RowIndex.build(
        inputs.active_rows,
        num_hidden_rows=inputs.hidden_RH.size(0),
        device=inputs.hidden_RH.device,
    )


def ours() -> list[Implementation]:
    """Return our head in every mode, with float32 and with bfloat16 logits."""
    found = []
    for dtype in _DTYPES:
        found += [_training(f"ours-{name}", dtype, **_TRAINING[name]) for name in _TRAINING]
        found.append(_evaluation("ours-head-logprobs", dtype, HeadLogprobs))
    found.append(_evaluation("ours-linear-logprob", "fp32", LinearLogprobForward))
    entropy = {"mode": "auto", "entropy_coefficient": _ENTROPY_COEFFICIENT}
    found.append(_training("ours-auto-entropy", "fp32", **entropy))
    return found


def _training(name: str, dtype: str, **arguments: Any) -> Implementation:  # noqa: ANN401  (of reinforce_head)
    """Describe one mode of ``reinforce_head``."""
    return Implementation(
        name=f"{name}-{dtype}",
        family="ours",
        prepare=partial(ReinforceHead, logits_dtype=_DTYPES[dtype], **arguments),
        passes=("forward_backward",),
        entropy_coefficient=arguments.get("entropy_coefficient", 0.0),
        bounds=_BOUNDS[dtype],
    )


def _evaluation(name: str, dtype: str, runner: type[HeadLogprobs]) -> Implementation:
    """Describe a forward pass without gradients."""
    return Implementation(
        name=f"{name}-{dtype}",
        family="ours",
        prepare=partial(runner, logits_dtype=_DTYPES[dtype]),
        passes=("forward",),
        bounds=_BOUNDS[dtype],
    )
