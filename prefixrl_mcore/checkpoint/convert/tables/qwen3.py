"""Qwen3, dense: grouped-query attention with normed queries and keys, gated feed-forward."""

from prefixrl_mcore.checkpoint.convert.rules import FamilyTable, HfWeight, Rule

_LIVE = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

_EMBEDDING = Rule(
    kind="vocab",
    megatron=("embedding.word_embeddings.weight",),
    hf=(HfWeight(name="model.embed_tokens.weight", dims=("vocab", "hidden")),),
)

TABLE = FamilyTable(
    model_type="qwen3",
    embedding=_EMBEDDING,
    rules=(
        _EMBEDDING,
        Rule(
            kind="replicated",
            megatron=(
                _LIVE + "self_attention.linear_qkv.layer_norm_weight",
                _LIVE + "input_layernorm.weight",
            ),
            hf=(HfWeight(name=_HF + "input_layernorm.weight", dims=("hidden",)),),
        ),
        Rule(
            kind="qkv",
            megatron=(_LIVE + "self_attention.linear_qkv.weight",),
            hf=(
                HfWeight(name=_HF + "self_attn.q_proj.weight", dims=("query", "hidden")),
                HfWeight(name=_HF + "self_attn.k_proj.weight", dims=("key_value", "hidden")),
                HfWeight(name=_HF + "self_attn.v_proj.weight", dims=("key_value", "hidden")),
            ),
        ),
        Rule(
            kind="replicated",
            megatron=(_LIVE + "self_attention.q_layernorm.weight",),
            hf=(HfWeight(name=_HF + "self_attn.q_norm.weight", dims=("head",)),),
        ),
        Rule(
            kind="replicated",
            megatron=(_LIVE + "self_attention.k_layernorm.weight",),
            hf=(HfWeight(name=_HF + "self_attn.k_norm.weight", dims=("head",)),),
        ),
        Rule(
            kind="row",
            megatron=(_LIVE + "self_attention.linear_proj.weight",),
            hf=(HfWeight(name=_HF + "self_attn.o_proj.weight", dims=("hidden", "query")),),
        ),
        Rule(
            kind="replicated",
            megatron=(
                _LIVE + "mlp.linear_fc1.layer_norm_weight",
                _LIVE + "pre_mlp_layernorm.weight",
            ),
            hf=(HfWeight(name=_HF + "post_attention_layernorm.weight", dims=("hidden",)),),
        ),
        Rule(
            kind="glu",
            megatron=(_LIVE + "mlp.linear_fc1.weight",),
            hf=(
                HfWeight(name=_HF + "mlp.gate_proj.weight", dims=("ffn", "hidden")),
                HfWeight(name=_HF + "mlp.up_proj.weight", dims=("ffn", "hidden")),
            ),
        ),
        Rule(
            kind="row",
            megatron=(_LIVE + "mlp.linear_fc2.weight",),
            hf=(HfWeight(name=_HF + "mlp.down_proj.weight", dims=("hidden", "ffn")),),
        ),
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
