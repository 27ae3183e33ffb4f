"""The language-model head as GPTModel's ``output_processor``: trained rows only.

Shape suffixes: ``T`` tokens of a stream, ``S`` this rank's share of them under sequence
parallelism, ``B`` = 1, ``H`` hidden size, ``R`` rows that predict a completion token, ``V`` this
rank's share of the vocabulary.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from prefixrl_kernels.head import head_logprobs
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadRows:
    """What the head computes for one stream; handed through ``output_processor_context``."""

    rows_R: Tensor
    """[R] int64 positions in the stream."""

    targets_R: Tensor
    """[R] int64 token ids."""

    temperature: float
    """Divides the logits."""

    true_vocab_size: int
    """Tokens of the vocabulary without padding."""


def compute_row_logprobs(
    *,
    hidden_states: Tensor,
    output_layer: torch.nn.Module,
    output_weight: Tensor | None,
    context: HeadRows,
    config: TransformerConfig,
    **unused: Any,  # noqa: ANN401  (further arguments of the hook)
) -> Tensor:
    """Return [2, R] float32: logprob of each row's target, entropy of each row's distribution.

    The signature is that of GPTModel's ``output_processor``. All ranks of the tensor-parallel
    group must call this, and its backward pass.

    Args:
        hidden_states: [S, B, H] output of the final norm.
        output_layer: Megatron's output layer; its weight is None when the embeddings are tied.
        output_weight: [V, H] the embedding, when tied.
        context: the rows.
        config: the model's configuration.
        unused: what else Megatron passes.
    """
    weight_VH = output_layer.weight if output_weight is None else output_weight
    assert isinstance(weight_VH, Tensor), "the last stage holds an output weight"
    tp_group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(tp_group, dist.ProcessGroup), "initialize has built the groups"
    if config.sequence_parallel:
        # head_logprobs sums the gradient over the group, so each rank keeps its own share of it.
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=tp_group
        )
    logprobs_R, entropies_R = head_logprobs(
        hidden_states.squeeze(1).index_select(0, context.rows_R),
        weight_VH,
        context.targets_R,
        temperature=context.temperature,
        true_vocab_size=context.true_vocab_size,
        tp_group=tp_group,
        vocab_start=tp_group.rank() * weight_VH.size(0),
    )
    return torch.stack((logprobs_R, entropies_R))
