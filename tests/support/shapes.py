"""Shapes of published models, without their weights."""

from dataclasses import replace

from prefixrl_mcore.config.model_shape import MixtureShape, ModelShape

QWEN3_4B = ModelShape(
    architecture="Qwen3ForCausalLM",
    num_layers=36,
    hidden_size=2560,
    ffn_hidden_size=9728,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151_936,
    rotary_base=1e6,
    layernorm_epsilon=1e-6,
    max_position_embeddings=40_960,
    init_method_std=0.02,
    tie_word_embeddings=True,
    qk_layernorm=True,
    add_qkv_bias=False,
)

QWEN3_30B_A3B = replace(
    QWEN3_4B,
    architecture="Qwen3MoeForCausalLM",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=768,
    num_query_groups=4,
    tie_word_embeddings=False,
    mixture=MixtureShape(num_experts=128, num_experts_per_token=8, is_renormalized=True),
)

LLAMA_3_8B = replace(
    QWEN3_4B,
    architecture="LlamaForCausalLM",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14_336,
    vocab_size=128_256,
    tie_word_embeddings=False,
    qk_layernorm=False,
)

SMALL = replace(
    QWEN3_4B,
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=512,
    tie_word_embeddings=False,
)
"""Sizes that can be multiplied by hand."""

SMALL_MIXTURE = replace(
    SMALL,
    architecture="Qwen3MoeForCausalLM",
    ffn_hidden_size=256,
    mixture=MixtureShape(num_experts=8, num_experts_per_token=2, is_renormalized=True),
)
