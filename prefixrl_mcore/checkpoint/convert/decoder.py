"""The rules of decoder-only transformers, from which the families' tables are put together.

All families here have grouped-query attention with one fused projection in Megatron, RMSNorm, and
gated feed-forward layers without biases; they differ in what ``decoder_table`` takes.
"""

from prefixrl_mcore.checkpoint.convert.layout import Kind
from prefixrl_mcore.checkpoint.convert.rules import Dim, FamilyTable, HfWeight, Rule

_LIVE = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_GROUPED, _SEQUENTIAL = "mlp.experts.", "mlp.experts.local_experts.{expert}."
"""Transformer Engine's grouped experts and ours; Megatron's sequential ones."""
_STORED_EXPERTS = "mlp.experts.experts."

_EMBEDDING = Rule(
    kind="vocab",
    megatron=("embedding.word_embeddings.weight",),
    hf=(HfWeight(name="model.embed_tokens.weight", dims=("vocab", "hidden")),),
)


def decoder_table(
    model_type: str,
    *,
    has_qk_norm: bool = False,
    has_qkv_bias: bool = False,
    is_mixture: bool = False,
) -> FamilyTable:
    """Return the table of a family.

    Args:
        model_type: value of ``model_type`` in ``config.json``.
        has_qk_norm: query and key heads are normed.
        has_qkv_bias: the query, key and value projections have biases.
        is_mixture: every feed-forward layer is a mixture of experts.
    """
    return FamilyTable(
        model_type=model_type,
        embedding=_EMBEDDING,
        rules=(
            _EMBEDDING,
            *_attention(has_qk_norm=has_qk_norm, has_qkv_bias=has_qkv_bias),
            *(_mixture() if is_mixture else _dense()),
            Rule(
                kind="replicated",
                megatron=("decoder.final_layernorm.weight",),
                hf=(HfWeight(name="model.norm.weight", dims=("hidden",)),),
            ),
            Rule(
                kind="vocab",
                megatron=("output_layer.weight",),
                hf=(HfWeight(name="lm_head.weight", dims=("vocab", "hidden")),),
                is_output_head=True,
            ),
        ),
    )


def _attention(*, has_qk_norm: bool, has_qkv_bias: bool) -> list[Rule]:
    """Return the first norm and the attention of a layer."""
    rules = [
        _plain(
            "replicated",
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            "input_layernorm.weight",
            ("hidden",),
        ),
        _query_key_value("weight", "hidden"),
    ]
    if has_qkv_bias:
        rules.append(_query_key_value("bias"))
    if has_qk_norm:
        for one in ("q", "k"):
            rules.append(
                _plain(
                    "replicated",
                    (f"self_attention.{one}_layernorm.weight",),
                    f"self_attn.{one}_norm.weight",
                    ("head",),
                )
            )
    rules.append(
        _plain(
            "row",
            ("self_attention.linear_proj.weight",),
            "self_attn.o_proj.weight",
            ("hidden", "query"),
        )
    )
    return rules


def _dense() -> list[Rule]:
    """Return the second norm and the feed-forward layer."""
    return [
        _plain(
            "replicated",
            ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
            "post_attention_layernorm.weight",
            ("hidden",),
        ),
        _gate_up(("mlp.linear_fc1.weight",), "mlp.", "ffn"),
        _plain("row", ("mlp.linear_fc2.weight",), "mlp.down_proj.weight", ("hidden", "ffn")),
    ]


def _mixture() -> list[Rule]:
    """Return the second norm, the router and the experts."""
    return [
        _plain(
            "replicated",
            ("pre_mlp_layernorm.weight",),
            "post_attention_layernorm.weight",
            ("hidden",),
            # Both specs store this norm under the name that dense layers use.
            stored="mlp.linear_fc1.layer_norm_weight",
        ),
        _plain("replicated", ("mlp.router.weight",), "mlp.gate.weight", ("experts", "hidden")),
        _gate_up(
            _expert_names("linear_fc1.weight"),
            "mlp.experts.{expert}.",
            "expert_ffn",
            stored=_STORED_EXPERTS + "linear_fc1.weight",
        ),
        _plain(
            "row",
            _expert_names("linear_fc2.weight"),
            "mlp.experts.{expert}.down_proj.weight",
            ("hidden", "expert_ffn"),
            stored=_STORED_EXPERTS + "linear_fc2.weight",
        ),
    ]


def _expert_names(name: str) -> tuple[str, ...]:
    """Return an expert's weight in Transformer Engine's, our and Megatron's experts."""
    return (_GROUPED + name + "{expert}", _GROUPED + name, _SEQUENTIAL + name)


def _plain(
    kind: Kind,
    megatron: tuple[str, ...],
    hf: str,
    dims: tuple[Dim, ...],
    *,
    stored: str | None = None,
) -> Rule:
    """Return the rule of one weight of a layer that Hugging Face stores as it is."""
    return Rule(
        kind=kind,
        megatron=tuple(_LIVE + name for name in megatron),
        hf=(HfWeight(name=_HF + hf, dims=dims),),
        stored=None if stored is None else _LIVE + stored,
    )


def _query_key_value(what: str, *inputs: Dim) -> Rule:
    """Return the rule of the projections' weight or bias."""
    return Rule(
        kind="qkv",
        megatron=(_LIVE + f"self_attention.linear_qkv.{what}",),
        hf=(
            HfWeight(name=_HF + f"self_attn.q_proj.{what}", dims=("query", *inputs)),
            HfWeight(name=_HF + f"self_attn.k_proj.{what}", dims=("key_value", *inputs)),
            HfWeight(name=_HF + f"self_attn.v_proj.{what}", dims=("key_value", *inputs)),
        ),
    )


def _gate_up(megatron: tuple[str, ...], hf: str, width: Dim, *, stored: str | None = None) -> Rule:
    """Return the rule of a gated layer's first matrix."""
    return Rule(
        kind="glu",
        megatron=tuple(_LIVE + name for name in megatron),
        hf=(
            HfWeight(name=_HF + hf + "gate_proj.weight", dims=(width, "hidden")),
            HfWeight(name=_HF + hf + "up_proj.weight", dims=(width, "hidden")),
        ),
        stored=None if stored is None else _LIVE + stored,
    )
