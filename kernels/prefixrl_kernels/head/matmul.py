"""The three matrix products of the head, with float32 results from low-precision operands.

A bfloat16 product is exact in float32, so a GEMM with float32 output differs from a float32 GEMM
in the order of summation only, and runs on bfloat16 tensor cores. PyTorch has that form on CUDA
(``out_dtype``) and not on the CPU, where the operands are widened.
"""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums over values of ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiply_into(out_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, add: bool = False) -> None:
    """Set ``out = a @ b``, or ``out += a @ b``; ``out`` may be wider than the operands.

    Args:
        out_MN: [M, N] in the operands' dtype or in float32; rows may be strided.
        a_MK: [M, K] float.
        b_KN: [K, N] of the same dtype.
        add: accumulate instead of overwriting.
    """
    if not a_MK.size(1):  # an empty sum
        if not add:
            out_MN.zero_()
        return
    if out_MN.dtype == a_MK.dtype:
        if add:
            torch.addmm(out_MN, a_MK, b_KN, out=out_MN)
        else:
            torch.mm(a_MK, b_KN, out=out_MN)
    elif a_MK.is_cuda and a_MK.dtype == torch.bfloat16:
        if add:
            torch.ops.aten.addmm.dtype_out(out_MN, a_MK, b_KN, out_MN.dtype, out=out_MN)
        else:
            torch.ops.aten.mm.dtype_out(a_MK, b_KN, out_MN.dtype, out=out_MN)
    elif add:
        torch.addmm(out_MN, a_MK.to(out_MN.dtype), b_KN.to(out_MN.dtype), out=out_MN)
    else:
        torch.mm(a_MK.to(out_MN.dtype), b_KN.to(out_MN.dtype), out=out_MN)
