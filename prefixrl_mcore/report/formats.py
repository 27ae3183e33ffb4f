"""Numbers as readers see them."""

import math

_TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

MISSING = "\N{EN DASH}"
"""Shown where a number is not known."""


def format_flops(flops: float | None) -> str:
    """Return mantissa and power of ten with three digits; 0 as ``0``."""
    if flops is None or not math.isfinite(flops):
        return MISSING
    if flops == 0.0:
        return "0"
    mantissa, exponent = f"{flops:.2e}".split("e")
    return f"{mantissa}{_TIMES}10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def format_accuracy(value: float | None) -> str:
    """Return three decimals."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.3f}"


def format_ratio(ratio: float) -> str:
    """Return a factor: two digits below 1, one decimal up to 100, none above."""
    digits = ".0f" if ratio >= 100 else ".1f" if ratio >= 1 else ".2g"
    return f"{ratio:{digits}}{_TIMES}"


def format_count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def format_seconds(seconds: float | None) -> str:
    """Return ``42 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
