"""Megatron's protocol for weight gradients that are added to ``weight.main_grad`` directly.

Megatron's data-parallel wrapper gives each parameter a float32 ``main_grad`` and looks, when
autograd has delivered ``weight.grad``, at two attributes: ``grad_added_to_main_grad`` (the
gradient is in place, what autograd delivered is a dummy that only triggers communication) and
``zero_out_wgrad`` (the parameter is also the embedding of this stage, so what autograd delivers is
the embedding's share and is added: the dummy must be zero).
"""

import torch
from torch import Tensor


def main_grad_of(weight_VH: Tensor) -> Tensor:
    """Return the float32 gradient buffer of the weight.

    Raises:
        ValueError: if there is none, or it does not fit.
    """
    main_grad_VH = getattr(weight_VH, "main_grad", None)
    if not isinstance(main_grad_VH, Tensor):
        raise ValueError(
            "head: weight_grad='main_grad' needs weight.main_grad, which Megatron's data-parallel "
            "wrapper makes; use weight_grad='autograd' without it"
        )
    if main_grad_VH.shape != weight_VH.shape or main_grad_VH.dtype != torch.float32:
        raise ValueError(
            f"head: expected weight.main_grad {tuple(weight_VH.shape)} float32, got "
            f"{tuple(main_grad_VH.shape)} {main_grad_VH.dtype}; set grad_reduce_in_fp32"
        )
    return main_grad_VH


def report_added(weight_VH: Tensor) -> Tensor | None:
    """Mark the gradient as added and return what autograd is to be given for the weight."""
    if not hasattr(weight_VH, "grad_added_to_main_grad"):
        return None
    weight_VH.grad_added_to_main_grad = True  # pyright: ignore[reportAttributeAccessIssue]
    if getattr(weight_VH, "zero_out_wgrad", False):
        return torch.zeros_like(weight_VH)
    return torch.empty_like(weight_VH)
