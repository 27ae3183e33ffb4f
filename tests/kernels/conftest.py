"""Every test of the kernels: memory filled with NaN, both backends, the device if there is one."""

from collections.abc import Iterator

import pytest
import torch
from prefixrl_kernels.head.row_kernels import RowKernels

from tests.support.head_cases import DEVICE, build_kernels, nan_filled_memory


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    with nan_filled_memory():
        yield


@pytest.fixture
def device() -> torch.device:
    """The CUDA device where there is one, else the CPU with Triton's interpreter."""
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest) -> RowKernels:
    """The row kernels of each backend, the Triton ones with tiny blocks."""
    return build_kernels(request.param)
