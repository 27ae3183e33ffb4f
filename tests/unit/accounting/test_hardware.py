"""Peaks of GPUs are those of their data sheets, dense, and nothing is made up."""

import pytest

from prefixrl_mcore.accounting.hardware import memory_bandwidth, peak_flops


@pytest.mark.parametrize(
    ("device_name", "dtype", "expected"),
    [
        pytest.param("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12, id="A100 SXM"),
        pytest.param("NVIDIA A100-PCIE-40GB", "bfloat16", 312e12, id="A100 PCIe"),
        pytest.param("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12, id="H100 SXM"),
        pytest.param("NVIDIA H100 80GB HBM3", "float32", 66.9e12, id="H100 SXM FP32"),
        pytest.param("NVIDIA H100 PCIe", "bfloat16", 756e12, id="H100 PCIe"),
        pytest.param("NVIDIA H100 NVL", "bfloat16", 835.5e12, id="H100 NVL"),
        pytest.param("NVIDIA H200", "bfloat16", 989.4e12, id="H200"),
        pytest.param("NVIDIA H200 NVL", "bfloat16", 835.5e12, id="H200 NVL"),
        pytest.param("NVIDIA GH200 480GB", "bfloat16", 989.4e12, id="GH200"),
        pytest.param("NVIDIA B200", "bfloat16", 2250e12, id="B200"),
        pytest.param("NVIDIA GB200", "bfloat16", 2500e12, id="GB200"),
        pytest.param("NVIDIA H20", "bfloat16", 148e12, id="H20 is not H200"),
    ],
)
def test_the_peak_is_the_dense_figure_of_the_data_sheet(
    device_name: str, dtype: str, expected: float
) -> None:
    assert peak_flops(device_name, dtype) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("device_name", "dtype"),
    [
        ("cpu", "float32"),
        ("NVIDIA H1000", "bfloat16"),
        ("NVIDIA GeForce RTX 3060", "bfloat16"),
    ],
)
def test_an_unknown_device_has_no_peak(device_name: str, dtype: str) -> None:
    assert peak_flops(device_name, dtype) is None


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*bfloat16.*got 'bf16'"):
        peak_flops("NVIDIA H200", "bf16")


@pytest.mark.parametrize(
    ("device_name", "expected"),
    [("NVIDIA H100 80GB HBM3", 3.35e12), ("H100 PCIe", 2e12), ("H200 NVL", 4.8e12), ("cpu", None)],
)
def test_the_bandwidth_is_that_of_the_data_sheet(device_name: str, expected: float | None) -> None:
    assert memory_bandwidth(device_name) == expected
