"""The interface that everything in the benchmark has: what it is, and how it is run.

Every implementation computes the same loss, the mean over the active rows of the negative logprob
of the target, and the gradients of hidden states and weight. An implementation is a description;
``prepare`` binds it to inputs and gives a runner, and only ``Runner.forward`` and
``Runner.forward_backward`` are ever timed.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bench.cases import Inputs, Rows
from bench.reference import Errors, Truth, relative_error

Pass = Literal["forward", "forward_backward"]
"""``forward``: no gradients, as for the logprobs of an old or reference policy.
``forward_backward``: a training step."""

Family = Literal["ceiling", "ours", "peer"]

PASSES: tuple[Pass, ...] = ("forward", "forward_backward")


class NotInstalledError(RuntimeError):
    """A package that a peer needs is not there; recorded, never fatal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What one training step left behind."""

    loss: Tensor | None
    """Scalar; None where the implementation's number is not the mean negative logprob."""

    grad_hidden_RH: Tensor
    """[R, H] gradient of the hidden states."""

    grad_weight_VH: Tensor
    """[V, H] gradient of the weight, or the buffer that it was added to."""

    is_added_in_place: bool = False
    """Whether the weight's gradient went into a buffer that existed before the step."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes of gradients that the step itself allocated."""
        gradients = [self.grad_hidden_RH]
        if not self.is_added_in_place:
            gradients.append(self.grad_weight_VH)
        return sum(gradient.numel() * gradient.element_size() for gradient in gradients)


class Runner(ABC):
    """An implementation bound to inputs.

    Around each call, timed or not, come ``acquire`` and ``release``: they make and drop what exists
    before a step in training too, such as a gradient buffer, and keep it out of time and memory.
    """

    def __init__(self, inputs: Inputs) -> None:
        """Keep the inputs; the leaves share their memory."""
        self.inputs = inputs
        self.hidden_RH = inputs.hidden_RH.detach().requires_grad_()
        self.weight_VH = inputs.weight_VH.detach().requires_grad_()

    @abstractmethod
    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the scalar loss; differentiable when the arguments require gradients."""

    def acquire(self) -> None:  # noqa: B027  (most have nothing to make)
        """Make what exists before a step."""

    def release(self) -> None:
        """Drop what ``acquire`` and the step made."""
        self.hidden_RH.grad = None
        self.weight_VH.grad = None

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Return the loss or the logprobs without gradients."""
        return self.loss(self.inputs.hidden_RH, self.inputs.weight_VH)

    def forward_backward(self) -> Outputs:
        """Return loss and gradients."""
        loss = self.loss(self.hidden_RH, self.weight_VH)
        loss.backward()
        return Outputs(
            loss=loss.detach(),
            grad_hidden_RH=_gradient(self.hidden_RH),
            grad_weight_VH=_gradient(self.weight_VH),
        )

    def logprobs(self) -> Tensor | None:
        """Return the [A] logprobs for the comparison with the truth; None where there are none."""
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Implementation:
    """One contestant."""

    name: str
    """Identifies it on the command line, in the JSON and in the tables."""

    family: Family
    """Ceilings are never compared, ours and peers are compared with each other."""

    prepare: Callable[[Inputs], Runner]
    """Binds it to inputs.

    Raises:
        NotInstalledError: if a package is missing.
    """

    package: str | None = None
    """Distribution whose version is recorded; None for what is here anyway."""

    passes: tuple[Pass, ...] = PASSES
    """What it can do."""

    runs_on_cpu: bool = True
    """Whether the machine without a GPU checks it too."""

    entropy_coefficient: float = 0.0
    """Entropy bonus in the loss; part of the truth that it is compared with."""

    bounds: Callable[[float], Errors] = lambda _: Errors()
    """Largest errors that are right, from the largest magnitude of a logit."""


def float32_logit_bounds(max_abs_logit: float) -> Errors:
    """Bounds for bfloat16 inputs and float32 logits: one rounding of the logits' gradient."""
    return Errors(
        logprob_max_abs=5e-5 * (1.0 + max_abs_logit),
        loss_abs=5e-5 * (1.0 + max_abs_logit),
        hidden_relative=6e-3,
        weight_relative=6e-3,
    )


def bfloat16_logit_bounds(max_abs_logit: float) -> Errors:
    """Bounds for logits that were rounded to bfloat16: the spacing of bfloat16 at the largest."""
    spacing = 2.0 ** torch.tensor(max_abs_logit).log2().ceil().item() / 256.0
    return Errors(
        logprob_max_abs=0.55 * spacing,
        loss_abs=spacing / 4.0,
        hidden_relative=3e-2,
        weight_relative=3e-2,
    )


def gradient_errors(outputs: Outputs, rows: Rows, truth: Truth) -> Errors:
    """Return the errors of a training step's loss and gradients."""
    loss = outputs.loss
    return Errors(
        loss_abs=None if loss is None else abs(float(loss) - truth.loss),
        hidden_relative=relative_error(outputs.grad_hidden_RH, truth.grad_hidden(rows)),
        weight_relative=relative_error(outputs.grad_weight_VH, truth.grad_weight_VH),
    )


def logprob_error(runner: Runner, truth: Truth) -> float | None:
    """Return the largest error of a logprob; None for a runner that has none. NaN stays NaN."""
    logprobs_A = runner.logprobs()
    if logprobs_A is None:
        return None
    return float((logprobs_A.double().cpu() - truth.logprobs_A).abs().max())


def errors_of(runner: Runner, outputs: Outputs | None, truth: Truth) -> Errors:
    """Return all errors; ``outputs`` is None when there is no backward pass."""
    errors = Errors() if outputs is None else gradient_errors(outputs, runner.inputs.rows, truth)
    return replace(errors, logprob_max_abs=logprob_error(runner, truth))


def _gradient(leaf: Tensor) -> Tensor:
    """Return a leaf's gradient after a backward pass."""
    if leaf.grad is None:
        raise RuntimeError(f"the backward pass left no gradient for a leaf {tuple(leaf.shape)}")
    return leaf.grad
