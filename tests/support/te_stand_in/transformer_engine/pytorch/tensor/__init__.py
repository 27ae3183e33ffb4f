"""Tensors of FP8."""


class QuantizedTensor:
    """None of ours is one."""
