"""Core attention of the local layer spec: causal, inside each sequence of a packed stream.

Megatron's own ``DotProductAttention`` refuses packed streams; the alternative upstream needs
Transformer Engine. This one is, as the stream says that ``policy/layers.py`` has chosen: torch's
flash attention over sequences of any length (16-bit, on a GPU); or torch's scaled dot-product
attention on the padded layout of ``packed.py``, on any device; under context parallelism that of
``context.py``. All with grouped query heads.
"""

from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  (torch's own alias)
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from prefixrl_mcore.policy.context import context_attention
from prefixrl_mcore.policy.packed import FromSlots, PackedStream, ToSlots


class PackedCausalAttention(MegatronModule):
    """``softmax(q k^T / sqrt(d)) v``, causal, separately in each sequence."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Create the (parameterless) layer; the signature is Megatron's core-attention builder's.

        Raises:
            ValueError: for masks and dropout, which are not implemented.
        """
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"layer {layer_number}: only causal self-attention is implemented, got "
                f"{attn_mask_type} {attention_type!r}"
            )
        if config.attention_dropout:
            raise ValueError(
                f"layer {layer_number}: attention dropout {config.attention_dropout} is not "
                "implemented, expected 0"
            )
        self.softmax_scale = softmax_scale
        self._context_size = config.context_parallel_size
        self._context_group = getattr(pg_collection, "cp", None)

    def forward(
        self,
        query_TBNK: Tensor,
        key_TBGK: Tensor,
        value_TBGK: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return the [T, 1, heads * width] attention output of this rank's heads.

        Args:
            query_TBNK: [T, 1, heads, width] rotated queries.
            key_TBGK: [T, 1, key-value heads, width] rotated keys.
            value_TBGK: [T, 1, key-value heads, width] values.
            attention_mask: must be None: the packed layout says who sees whom.
            attn_mask_type: ignored, causal.
            attention_bias: must be None.
            packed_seq_params: the stream's ``PackedStream``.

        Raises:
            ValueError: if a mask or bias is given, no ``PackedStream``, or a whole stream under
                context parallelism.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("PackedCausalAttention takes no mask and no bias; pass None")
        if not isinstance(packed_seq_params, PackedStream):
            raise ValueError(
                "PackedCausalAttention needs a PackedStream, got "
                f"{type(packed_seq_params).__name__}"
            )
        packed = packed_seq_params
        if (packed.context is None) != (self._context_size == 1):
            raise ValueError(
                f"PackedCausalAttention: context_parallel_size is {self._context_size}, got a "
                f"{'whole' if packed.context is None else 'shared'} stream"
            )
        if packed.context is not None:
            group = self._context_group or parallel_state.get_context_parallel_group()
            return context_attention(
                query_TBNK.squeeze(1),
                key_TBGK.squeeze(1),
                value_TBGK.squeeze(1),
                packed.context,
                group=cast(dist.ProcessGroup, group),
                softmax_scale=self.softmax_scale,
            ).unsqueeze(1)
        attend = _padded_attention if packed.buckets else _varlen_attention
        return attend(
            query_TBNK.squeeze(1),
            key_TBGK.squeeze(1),
            value_TBGK.squeeze(1),
            packed,
            self.softmax_scale,
        ).unsqueeze(1)


def _varlen_attention(
    query_TNK: Tensor,
    key_TGK: Tensor,
    value_TGK: Tensor,
    packed: PackedStream,
    softmax_scale: float | None,
) -> Tensor:
    """Return [T, heads * width] by torch's flash attention; never run on a GPU yet.

    It takes grouped heads as they are, in the backward pass too (it sums the key-value gradients
    of a group), float16 and bfloat16 only, on compute capability 8 and above.
    """
    output = varlen_attn(
        query_TNK.contiguous(),
        key_TGK.contiguous(),
        value_TGK.contiguous(),
        packed.cu_seqlens_q,
        packed.cu_seqlens_kv,
        packed.max_seqlen_q,
        packed.max_seqlen_kv,
        scale=softmax_scale,
        window_size=(-1, 0),  # all earlier tokens, no later one: causal
    )
    assert isinstance(output, Tensor), "no auxiliary output was asked for"
    return output.flatten(1)


def _padded_attention(
    query_TNK: Tensor,
    key_TGK: Tensor,
    value_TGK: Tensor,
    packed: PackedStream,
    softmax_scale: float | None,
) -> Tensor:
    """Return [T, heads * width] by scaled dot-product attention, bucket by bucket."""
    query_P, key_P, value_P = (
        _to_slots(tensor, packed) for tensor in (query_TNK, key_TGK, value_TGK)
    )
    outputs: list[Tensor] = []
    first = 0
    for bucket in packed.buckets:
        last = first + bucket.num_sequences * bucket.length
        outputs.append(
            _causal_attention(
                query_P[first:last],
                key_P[first:last],
                value_P[first:last],
                length=bucket.length,
                softmax_scale=softmax_scale,
            )
        )
        first = last
    output_P = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return FromSlots.apply(output_P, packed)  # pyright: ignore[reportReturnType]  # untyped in torch


def _to_slots(tensor_T: Tensor, packed: PackedStream) -> Tensor:
    """Lay a [T, heads, width] tensor out in slots."""
    return ToSlots.apply(tensor_T, packed)  # pyright: ignore[reportReturnType]  # untyped in torch


def _causal_attention(
    query_PNK: Tensor,
    key_PGK: Tensor,
    value_PGK: Tensor,
    *,
    length: int,
    softmax_scale: float | None,
) -> Tensor:
    """Return [slots, heads * width] of one bucket of sequences of ``length`` slots."""
    query, key, value = (
        tensor.unflatten(0, (-1, length)).transpose(1, 2)
        for tensor in (query_PNK, key_PGK, value_PGK)
    )
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=softmax_scale,
        enable_gqa=key.size(1) != query.size(1),
    )
    return output.transpose(1, 2).flatten(0, 1).flatten(1)
