"""RMSNorm for Megatron's local layer spec, usable under sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RmsNorm(torch.nn.RMSNorm):
    """``x / rms(x) * weight`` over the last dimension.

    Megatron's own torch norm refuses sequence parallelism. There each tensor-parallel rank
    normalises its share of the tokens, so the weight's gradient must be summed over the
    tensor-parallel group; the attribute ``sequence_parallel`` asks Megatron to do that.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Create the norm; the signature is that of Megatron's layer-norm builders."""
        super().__init__(hidden_size, eps=eps)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (not a declared attribute)
