"""The ceiling: the matrix products that no implementation of the head can do without.

One product makes the logits; two more make the gradients of hidden states and weight. They are
called alone, with their results written into buffers that exist already, on data of the same
distribution.
"""

from functools import partial

import torch
from torch import Tensor

from bench.cases import Inputs
from bench.implementation import Implementation, Outputs, Runner


class BareGemms(Runner):
    """Bare products; the logits stand in for their gradient, so that no data is zero."""

    def __init__(self, inputs: Inputs, *, logits_dtype: torch.dtype) -> None:
        """Remember the precision in which the first product writes its result."""
        super().__init__(inputs)
        self._logits_dtype = logits_dtype
        self._buffers: list[Tensor] = []

    def acquire(self) -> None:
        """Allocate the results."""
        hidden_RH, weight_VH = self.inputs.hidden_RH, self.inputs.weight_VH
        size = (hidden_RH.size(0), weight_VH.size(0))
        logits_RV = hidden_RH.new_empty(size, dtype=self._logits_dtype)
        grad_logits_RV = logits_RV
        if self._logits_dtype != hidden_RH.dtype:
            grad_logits_RV = hidden_RH.new_empty(size).normal_()
        self._buffers = [
            logits_RV,
            grad_logits_RV,
            torch.empty_like(hidden_RH),
            torch.empty_like(weight_VH),
        ]

    def release(self) -> None:
        """Free the results."""
        self._buffers = []

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Refuse: products alone make no loss."""
        raise NotImplementedError("the bare products have no loss; call forward")

    @torch.no_grad()
    def forward(self) -> Tensor:
        """Return the logits."""
        hidden_RH, weight_VH = self.inputs.hidden_RH, self.inputs.weight_VH
        logits_RV = self._buffers[0]
        if logits_RV.dtype == hidden_RH.dtype:
            return torch.mm(hidden_RH, weight_VH.T, out=logits_RV)
        return torch.mm(hidden_RH, weight_VH.T, out_dtype=logits_RV.dtype, out=logits_RV)

    @torch.no_grad()
    def forward_backward(self) -> Outputs:
        """Return the three products."""
        self.forward()
        _, grad_logits_RV, grad_hidden_RH, grad_weight_VH = self._buffers
        torch.mm(grad_logits_RV, self.inputs.weight_VH, out=grad_hidden_RH)
        torch.mm(grad_logits_RV.T, self.inputs.hidden_RH, out=grad_weight_VH)
        return Outputs(loss=None, grad_hidden_RH=grad_hidden_RH, grad_weight_VH=grad_weight_VH)


CEILING = Implementation(
    name="gemms",
    family="ceiling",
    prepare=partial(BareGemms, logits_dtype=torch.bfloat16),
    runs_on_cpu=False,
)
"""What every time is compared with."""

FLOAT32_LOGITS = Implementation(
    name="gemms-fp32-logits",
    family="ceiling",
    prepare=partial(BareGemms, logits_dtype=torch.float32),
    runs_on_cpu=False,
)
"""The same with logits written in float32: what keeping them exact costs by itself."""
