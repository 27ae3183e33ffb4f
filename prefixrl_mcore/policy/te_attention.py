"""Core attention of Transformer Engine's layer spec over our packed streams.

Not run on a GPU yet: written from the source of Transformer Engine 2.8 to 2.20 and megatron-core
0.19.2; ``tests/gpu/te/test_transformer_engine_on_gpu.py`` is what must be run first.

Megatron's attention module rotates all tokens of a stream in one call, with the angles that the
stream carries (``PackedRotaryEmbedding``), for which the stream says ``sbhd``. Transformer Engine
wants packed sequences as ``thd`` with their cumulative lengths, so that the two are told apart
here: everything around the attention is the same as with the local layers.
"""

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prefixrl_mcore.policy.packed import PackedStream


def thd_stream(packed: PackedStream) -> PackedSeqParams:
    """Return a stream as Transformer Engine's attention reads it.

    There is no padding between sequences (what is padded for context parallelism belongs to its
    sequence, behind the last real token), so that one tensor is all four cumulative lengths: that
    it is the same object tells Transformer Engine so. Under context parallelism lengths are those
    of the whole stream; each rank holds the chunks that Megatron's zigzag gives it, which is the
    order that Transformer Engine expects.
    """
    starts = packed.cu_seqlens_q
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        cu_seqlens_q_padded=starts,
        cu_seqlens_kv_padded=starts,
        max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_kv=packed.max_seqlen_kv,
        pad_between_seqs=False,
    )


class PackedTransformerEngineAttention(MegatronModule):
    """Transformer Engine's causal attention, separately in each sequence of a packed stream."""

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
        """Create the layer; the signature is Megatron's core-attention builder's."""
        super().__init__(config=config)
        self.inner = TEDotProductAttention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            cp_comm_type=cp_comm_type,
            softmax_scale=softmax_scale,
            pg_collection=pg_collection,
        )

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
            attention_mask: must be None: the stream says who sees whom.
            attn_mask_type: ignored, causal.
            attention_bias: must be None.
            packed_seq_params: the stream's ``PackedStream``.

        Raises:
            ValueError: if a mask or bias is given, or no ``PackedStream``.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("PackedTransformerEngineAttention takes no mask and no bias")
        if not isinstance(packed_seq_params, PackedStream):
            raise ValueError(
                "PackedTransformerEngineAttention needs a PackedStream, got "
                f"{type(packed_seq_params).__name__}"
            )
        output = self.inner(
            query_TBNK.squeeze(1),
            key_TBGK.squeeze(1),
            value_TBGK.squeeze(1),
            None,
            AttnMaskType.causal,  # Transformer Engine's wrapper makes it padding_causal for thd
            packed_seq_params=thd_stream(packed_seq_params),
        )
        return output.reshape(output.size(0), 1, -1)
