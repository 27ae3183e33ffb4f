"""The language-model head as GPTModel's ``output_processor``: trained rows only.

Shape suffixes: ``T`` tokens of a stream, ``S`` this rank's share of them under sequence
parallelism, ``B`` = 1, ``H`` hidden size, ``R`` rows that predict a completion token, ``V`` this
rank's share of the vocabulary.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from prefixrl_kernels import HeadStatistics, RowIndex, head_logprobs, reinforce_head
from torch import Tensor

from prefixrl_mcore.config.policy import LossConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSettings:
    """How the head computes; the same for every stream."""

    temperature: float
    """Divides the logits."""

    true_vocab_size: int
    """Tokens of the vocabulary without padding."""

    logits_dtype: torch.dtype
    """float32, or the model's own dtype."""

    memory_bytes: int
    """What the head may use beyond inputs and gradients."""

    backend: Literal["auto", "triton", "torch"]
    """Row kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLoss:
    """The loss of one stream's rows."""

    advantages_R: Tensor
    """[R] float32."""

    weights_R: Tensor
    """[R] float32 aggregation weights."""

    rollout_logprobs_R: Tensor | None
    """[R] float32 nats; None when the batch has none."""

    reference_logprobs_R: Tensor | None
    """[R] float32 nats under the reference; None without a KL term."""

    config: LossConfig
    """Estimator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadTask:
    """What the head computes for one stream; handed through ``output_processor_context``."""

    index: RowIndex
    """Positions of the rows in the stream."""

    targets_R: Tensor
    """[R] int64 token ids."""

    settings: HeadSettings
    """How."""

    loss: RowLoss | None
    """None computes logprobs and entropies only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOutput:
    """What the model returns on the last pipeline stage."""

    summed_loss: Tensor
    """[] float32 with gradient; 0 when no loss was asked for."""

    logprobs_R: Tensor
    """[R] float32 nats, of the targets."""

    entropies_R: Tensor
    """[R] float32 nats."""

    statistics: HeadStatistics | None
    """Further statistics of the rows; None when no loss was asked for."""


def compute_head(
    *,
    hidden_states: Tensor,
    output_layer: torch.nn.Module,
    output_weight: Tensor | None,
    context: HeadTask,
    config: TransformerConfig,
    **unused: Any,  # noqa: ANN401  (further arguments of the hook)
) -> HeadOutput:
    """Return loss, logprobs and entropies of the stream's rows.

    The signature is that of GPTModel's ``output_processor``. All ranks of the tensor-parallel
    group must call this, and its backward pass. The gradient of the weight is added to
    ``main_grad`` in float32, not rounded on its way there; the head may do so in the forward pass,
    since Megatron's schedules run every forward pass once, in no recomputed region, and (with the
    sum of the loss, which Megatron divides at the end) backward with an upstream gradient of 1.

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
    settings, loss = context.settings, context.loss
    shared: dict[str, Any] = {
        "true_vocab_size": settings.true_vocab_size,
        "temperature": settings.temperature,
        "logits_dtype": settings.logits_dtype,
        "tp_group": tp_group,
        "vocab_start": tp_group.rank() * weight_VH.size(0),
        "sequence_parallel": config.sequence_parallel,
        "memory_budget_bytes": settings.memory_bytes,
        "backend": settings.backend,
    }
    hidden_SH = hidden_states.squeeze(1)
    if loss is None:
        logprobs_R, entropies_R = head_logprobs(
            hidden_SH, weight_VH, context.targets_R, rows_R=context.index, **shared
        )
        return HeadOutput(
            summed_loss=logprobs_R.new_zeros(()),
            logprobs_R=logprobs_R,
            entropies_R=entropies_R,
            statistics=None,
        )
    summed_loss, statistics = reinforce_head(
        hidden_SH,
        weight_VH,
        context.targets_R,
        context.index,
        loss.advantages_R,
        weights_R=loss.weights_R,
        rollout_logprobs_R=loss.rollout_logprobs_R,
        importance=loss.config.importance,
        min_importance=loss.config.min_importance,
        max_importance=loss.config.max_importance,
        clip_low=loss.config.clip_low,
        clip_high=loss.config.clip_high,
        entropy_coefficient=loss.config.entropy_coefficient,
        kl=loss.config.kl,
        kl_coefficient=loss.config.kl_coefficient,
        reference_logprobs_R=loss.reference_logprobs_R,
        weight_grad="main_grad",
        promised_upstream=1.0,
        **shared,
    )
    return HeadOutput(
        summed_loss=summed_loss,
        logprobs_R=statistics.logprobs_R,
        entropies_R=statistics.entropies_R,
        statistics=statistics,
    )
