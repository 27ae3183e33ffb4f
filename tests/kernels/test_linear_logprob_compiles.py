"""The fused forward compiled for the GPUs it is meant for; no GPU is needed, and none is used."""

import pytest
import torch
from prefixrl_kernels.head.linear_logprob import default_tiles, fused_row_statistics

from tests.support.triton_compile import SHARED_BYTES, CompiledKernel, compile_launches

pytestmark = pytest.mark.slow  # processes that run the compiler

PRODUCT, MERGE = "row_statistics_kernel", "merge_splits_kernel"


def launch(dtype: str, temperatures: list[float], hidden_size: int, is_older: bool) -> None:
    """Launch with the tiles of the device; sizes set nothing but the hidden loop's length."""
    operands = getattr(torch, dtype)
    tiles = default_tiles(torch.float32 if is_older else operands, torch.device("cpu"))
    for temperature in temperatures:
        fused_row_statistics(
            torch.zeros(300, hidden_size, dtype=operands),
            torch.zeros(30000, hidden_size, dtype=operands),
            torch.zeros(300, dtype=torch.int64),
            num_true_columns=30000,
            vocab_start=0,
            temperature=temperature,
            tiles=tiles,
        )


def _of(name: str, kernels: list[CompiledKernel]) -> list[CompiledKernel]:
    return [kernel for kernel in kernels if kernel.name == name]


def test_on_an_h100_the_product_is_pipelined_on_tensor_cores_without_spills() -> None:
    kernels = compile_launches(launch, "bfloat16", [1.0, 0.7], 2560, False)
    products = _of(PRODUCT, kernels)
    assert len(products) == 2  # with and without a division
    for product in products:
        assert product.num_wgmma == 4  # hidden elements of a step / 16
        assert not product.is_wgmma_serialized
        assert product.num_loops == 1  # over tiles and hidden steps at once
        assert product.num_tma_loads == 2 * 4  # per stage: three before the loop, one in it
        assert product.spill_bytes == 0
        # Within what an H100 has, the fifth stage would not be.
        assert product.shared_bytes <= SHARED_BYTES[90] < product.shared_bytes * 5 // 4
    (merge,) = _of(MERGE, kernels)
    assert merge.spill_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "is_older", "capability"),
    [
        pytest.param("float32", 2560, False, 90, id="float32-h100"),
        pytest.param("bfloat16", 64, False, 90, id="one-hidden-tile-h100"),
        pytest.param("bfloat16", 2560, True, 80, id="bfloat16-a100"),
    ],
)
def test_the_other_configurations_compile_without_spills(
    dtype: str, hidden_size: int, is_older: bool, capability: int
) -> None:
    kernels = compile_launches(launch, dtype, [1.0], hidden_size, is_older, capability=capability)
    assert [kernel.name for kernel in kernels] == [PRODUCT, MERGE]
    for kernel in kernels:
        assert kernel.spill_bytes == 0
        assert kernel.shared_bytes <= SHARED_BYTES[capability]
