"""The modules that Megatron subclasses, with their parameters and without their computation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_engine.pytorch import distributed, ops

__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "ops",
]


class _Module(nn.Module):
    """Any module: it has private state in every ``state_dict``."""

    def get_extra_state(self) -> Tensor:
        """Return what a module without FP8 saves."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Take it."""


class _Matrices(_Module):
    """Modules with matrices, cut as Transformer Engine cuts them."""

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        names: tuple[str, ...],
        bias: bool,
        tp_size: int,
        parallel_mode: str | None,
        init_method: Callable[[Tensor], Any],
        params_dtype: torch.dtype,
        **_: object,
    ) -> None:
        """Create one matrix per name, and a bias for each."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.use_bias, self.tp_size, self.parallel_mode = bias, tp_size, parallel_mode
        is_row, is_column = parallel_mode == "row", parallel_mode == "column"
        num_rows = out_features // tp_size if is_column else out_features
        num_columns = in_features // tp_size if is_row else in_features
        for name in names:
            weight = nn.Parameter(torch.empty(num_rows, num_columns, dtype=params_dtype))
            init_method(weight.data)
            self._add(name, weight, is_cut=is_row or is_column, dim=int(is_row))
            if bias:
                zeros = nn.Parameter(torch.zeros(num_rows, dtype=params_dtype))
                self._add(name.replace("weight", "bias"), zeros, is_cut=is_column, dim=0)

    def _add(self, name: str, parameter: nn.Parameter, *, is_cut: bool, dim: int) -> None:
        for key, value in (
            ("tensor_model_parallel", is_cut),
            ("partition_dim", dim),
            ("partition_stride", 1),
        ):
            setattr(parameter, key, value)
        self.register_parameter(name, parameter)


class Linear(_Matrices):
    """One matrix."""

    def __init__(self, **settings: Any) -> None:
        """Create ``weight`` and ``bias``."""
        super().__init__(names=("weight",), **settings)


class LayerNormLinear(_Matrices):
    """A norm and the matrix behind it."""

    def __init__(self, *, in_features: int, params_dtype: torch.dtype, **settings: Any) -> None:
        """Create ``layer_norm_weight``, ``weight`` and ``bias``."""
        settings |= {"in_features": in_features, "params_dtype": params_dtype}
        super().__init__(names=("weight",), **settings)
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype))


class GroupedLinear(_Matrices):
    """One matrix of every expert of this rank."""

    def __init__(self, *, num_gemms: int, **settings: Any) -> None:
        """Create ``weight0``, ``weight1`` and so on."""
        super().__init__(names=tuple(f"weight{index}" for index in range(num_gemms)), **settings)
        self.num_gemms = num_gemms
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int) -> None:
        """Do nothing."""


class RMSNorm(_Module):
    """A norm of its own."""

    def __init__(self, normalized_shape: int, params_dtype: torch.dtype, **_: object) -> None:
        """Create ``weight``."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype))


class LayerNorm(RMSNorm):
    """Never built here."""


class DotProductAttention(_Module):
    """Attention, which has no parameters."""

    def __init__(self, *_: object, **__: object) -> None:
        """Create nothing."""
        super().__init__()
