"""The compiler check finds what the interpreter hides."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (a launch passes Python values for constexpr parameters, and options the kernel does not name)

import pytest
import torch
import triton
import triton.language as tl

from tests.support.triton_compile import compile_launches

pytestmark = pytest.mark.slow  # processes that run the compiler

NOT_A_NUMBER = tl.constexpr(float("nan"))


@triton.jit
def _copy(source_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    values = tl.load(source_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), values)


@triton.jit
def _wrong_shapes(out_ptr):  # noqa: ANN001, ANN202
    tl.store(out_ptr + tl.arange(0, 16), tl.zeros([32], tl.float32))


@triton.jit
def _fill(out_ptr):  # noqa: ANN001, ANN202
    tl.store(out_ptr, NOT_A_NUMBER)


@triton.jit
def _product(out_ptr, WIDTH: tl.constexpr):  # noqa: ANN001, ANN202
    narrow, wide = tl.arange(0, 64), tl.arange(0, WIDTH)
    left = tl.load(out_ptr + narrow[:, None] * WIDTH + wide[None, :])
    right = tl.load(out_ptr + narrow[None, :] * WIDTH + wide[:, None])
    tl.store(out_ptr + narrow[:, None] * 64 + narrow[None, :], tl.dot(left, right))


def launch(name: str) -> None:
    out = torch.zeros(64 * 1024, dtype=torch.bfloat16)
    if name == "two-copies":
        for block in (64, 128, 64):
            _copy[(1,)](out, out, BLOCK=block, num_warps=2)
        assert not out.any()  # launches do nothing
    elif name == "wrong-shapes":
        _wrong_shapes[(1,)](out)
    elif name == "nan-global":
        _fill[(1,)](out.float())
    else:
        _product[(1,)](out, WIDTH=1024)  # operands of 256 KiB


def test_each_different_launch_is_compiled_once() -> None:
    kernels = compile_launches(launch, "two-copies")
    assert [(kernel.name, kernel.num_warps) for kernel in kernels] == [("_copy", 2)] * 2
    for kernel in kernels:
        assert 0 < kernel.registers < 64
        assert kernel.spill_bytes == kernel.shared_bytes == kernel.num_wgmma == 0
        assert not kernel.is_wgmma_serialized


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("wrong-shapes", r"32", id="types"),
        pytest.param("too-large", "out of resource: shared memory", id="shared-memory"),
        # A launch compares the constants that a kernel refers to, and NaN differs from itself.
        pytest.param("nan-global", "NOT_A_NUMBER has changed", id="nan-global"),
    ],
)
def test_what_fails_only_on_a_gpu_is_found(name: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        compile_launches(launch, name)
