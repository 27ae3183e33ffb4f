"""What a GPU could compute at most, by its data sheet: the denominator of MFU.

Only dense figures: data sheets print those with 2:4 sparsity larger, which training does not use.
A device that is not listed has no peak and so no MFU, rather than a made-up one;
``trainer.peak_flops`` gives it.

Sources, NVIDIA: A100 data sheet (1758950-r4), A30 data sheet, L40S data sheet (2023), H100
architecture white paper v1.04 (table 2: SXM5 and PCIe, dense), H100 data sheet (2024: NVL, sparse
figures halved), H200 data sheet (SXM and NVL, sparse figures halved), Blackwell architecture brief
(HGX B200 at 1000 W, GB200). H800 and GH200 compute like the H100 SXM5, A800 like the A100; GPUs
whose data sheet gives another number (H20) are entries of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_DTYPES = ("float32", "bfloat16")

_TERA = 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class _Peak:
    """Dense 1e12 FLOPs per second of one GPU."""

    float32: float
    bfloat16: float


_A100 = _Peak(float32=19.5, bfloat16=312.0)
_H100_SXM = _Peak(float32=66.9, bfloat16=989.4)
_H100_NVL = _Peak(float32=60.0, bfloat16=835.5)

_PEAKS: Mapping[tuple[str, ...], _Peak] = {
    ("GB200",): _Peak(float32=90.0, bfloat16=2500.0),
    ("B200",): _Peak(float32=80.0, bfloat16=2250.0),
    ("H200", "NVL"): _H100_NVL,
    ("H200",): _H100_SXM,
    ("GH200",): _H100_SXM,
    ("H100", "NVL"): _H100_NVL,
    ("H100", "PCIE"): _Peak(float32=51.2, bfloat16=756.0),
    ("H100",): _H100_SXM,
    ("H800", "PCIE"): _Peak(float32=51.2, bfloat16=756.0),
    ("H800",): _H100_SXM,
    ("H20",): _Peak(float32=44.0, bfloat16=148.0),
    ("A100",): _A100,
    ("A800",): _A100,
    ("A30",): _Peak(float32=10.3, bfloat16=165.0),
    ("L40S",): _Peak(float32=91.6, bfloat16=362.05),
}
"""Words of a device's name, upper case, the special before the general → its peaks."""

_BANDWIDTHS: Mapping[tuple[str, ...], float] = {
    ("B200",): 8.0,
    ("H200",): 4.8,
    ("H100", "NVL"): 3.9,
    ("H100", "PCIE"): 2.0,
    ("H100",): 3.35,
    ("H800",): 3.35,
    ("H20",): 4.0,
    ("A100",): 2.04,
    ("A800",): 2.04,
    ("A30",): 0.933,
    ("L40S",): 0.864,
}
"""As ``_PEAKS``, 1e12 bytes per second; the largest of variants (the A100 of 40 GB has 1.56)."""


def memory_bandwidth(device_name: str) -> float | None:
    """Return the bytes per second that one GPU reads at most; None where nothing is known.

    Args:
        device_name: as for ``peak_flops``.
    """
    words = set(device_name.upper().replace("-", " ").split())
    for needed, tera in _BANDWIDTHS.items():
        if words.issuperset(needed):
            return tera * _TERA
    return None


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the dense peak of one GPU in FLOPs per second; None where nothing is known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it ("NVIDIA H100 80GB HBM3"), or
            "cpu". Names are compared by whole words, so that an unknown relative of a known GPU
            does not inherit its peak.
        dtype: of the operands of matrix products: ``float32`` (CUDA cores) or ``bfloat16``.

    Raises:
        ValueError: if ``dtype`` is none of these.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"peak_flops: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    words = set(device_name.upper().replace("-", " ").split())
    for needed, peak in _PEAKS.items():
        if words.issuperset(needed):
            return getattr(peak, dtype) * _TERA
    return None
