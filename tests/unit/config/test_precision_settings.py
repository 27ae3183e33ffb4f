"""Settings of precision, memory and optimizer state that are refused without a machine."""

from typing import Any

import pytest

from prefixrl_mcore.config.model_shape import ModelShape, read_model_shape
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.config.precision import check_precision, recomputed_modules

SHARDED = {"use_distributed_optimizer": True, "use_precision_aware_optimizer": True}
STREAM_TOKENS = 4096

HF_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 99,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def dense(**changes: Any) -> ModelShape:
    return read_model_shape({**HF_CONFIG, **changes})


def mixture() -> ModelShape:
    return read_model_shape(
        {
            **HF_CONFIG,
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        }
    )


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"optimizer": {"use_precision_aware_optimizer": True}},
            "use_precision_aware_optimizer needs use_distributed_optimizer",
        ),
        (
            {"optimizer": {"exp_avg_dtype": "bfloat16", "main_params_dtype": "float16"}},
            "main_params_dtype = 'float16', exp_avg_dtype = 'bfloat16' needs use_precision_aware",
        ),
        (
            {"optimizer": {"cpu_offload": True, "use_distributed_optimizer": True}},
            "cpu_offload needs use_precision_aware_optimizer",
        ),
        (
            {"optimizer": {**SHARDED, "cpu_offload": True, "exp_avg_sq_dtype": "float8"}},
            "cpu_offload keeps all state in float32, got exp_avg_sq_dtype = 'float8'",
        ),
        ({"dtype": "float32", "optimizer": SHARDED}, "needs policy.dtype = 'bfloat16'"),
        ({"dtype": "float32", "layer_spec": "transformer_engine"}, "needs dtype = 'bfloat16'"),
        ({"fp8": "hybrid", "layer_spec": "local"}, "fp8 = 'hybrid' needs layer_spec"),
        ({"fp8": "e4m3", "dtype": "float32"}, "fp8 = 'e4m3' needs layer_spec"),
        ({"fp8_recipe": "delayed"}, "fp8_recipe = 'delayed' is used with policy.fp8 only"),
        ({"optimizer": {"cpu_offload_fraction": 0.5}}, "= 0.5 is used with cpu_offload only"),
        (
            {"experts": {"aux_loss_type": "global_aux_loss"}},
            "'global_aux_loss' is used with aux_loss_coefficient only",
        ),
        ({"recompute_modules": ["mlp"]}, "only with recompute = 'selective', got 'none'"),
        ({"recompute": "selective", "recompute_modules": []}, "recompute_modules is empty"),
        ({"recompute": "selective", "recompute_modules": ["moe_act"]}, "recompute_modules"),
    ],
)
def test_combinations_that_cannot_be_are_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig.model_validate(policy)


@pytest.mark.parametrize(
    "policy",
    [
        {"optimizer": {**SHARDED, "exp_avg_dtype": "float8", "exp_avg_sq_dtype": "bfloat16"}},
        {"optimizer": {**SHARDED, "cpu_offload": True, "cpu_offload_fraction": 0.5}},
        {"fp8": "hybrid", "layer_spec": "transformer_engine", "fp8_recipe": "delayed"},
        {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm"]},
    ],
)
def test_combinations_that_can_be_are_taken(policy: dict[str, Any]) -> None:
    PolicyConfig.model_validate(policy)


def test_selective_recomputation_takes_the_feed_forward_part_unless_told_otherwise() -> None:
    selective = PolicyConfig(recompute="selective")
    assert recomputed_modules(selective, dense()) == ("mlp",)
    assert recomputed_modules(selective, mixture()) == ("moe",)
    named = PolicyConfig(recompute="selective", recompute_modules=("core_attn",))
    assert recomputed_modules(named, mixture()) == ("core_attn",)
    assert recomputed_modules(PolicyConfig(recompute="full"), dense()) == ()


@pytest.mark.parametrize(
    ("shape", "policy", "stream_tokens", "message"),
    [
        (
            mixture(),
            {"recompute": "selective", "recompute_modules": ["mlp"]},
            4096,
            "Qwen3MoeForCausalLM has no 'mlp' layers; name 'moe' instead",
        ),
        (
            dense(),
            {"recompute": "selective", "recompute_modules": ["moe", "layernorm"]},
            4096,
            "Qwen3ForCausalLM has no 'moe' layers",
        ),
        (mixture(), {"fp8": "hybrid"}, 4096, "not implemented for a mixture of experts"),
        (dense(intermediate_size=520), {"fp8": "hybrid"}, 4096, "multiple of 16, got feed-forward"),
        (
            dense(intermediate_size=528),
            {"fp8": "hybrid", "parallel": {"tensor_model_parallel_size": 2}},
            4096,
            r"feed-forward width 264 on a rank \(tensor_model_parallel_size 2\)",
        ),
        (
            dense(hidden_size=192),
            {"fp8": "hybrid", "fp8_recipe": "blockwise"},
            4096,
            "multiple of 128, got hidden size 192",
        ),
        (
            dense(),
            {"fp8": "hybrid"},
            4100,
            "multiple of 16 tokens .* set batch.stream_tokens to 4112",
        ),
        (
            dense(),
            {
                "fp8": "e4m3",
                "parallel": {
                    "tensor_model_parallel_size": 2,
                    "sequence_parallel": True,
                    "context_parallel_size": 2,
                },
            },
            4080,
            "multiple of 64 tokens .* got 4080; set batch.stream_tokens to 4096",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_the_arithmetic(
    shape: ModelShape, policy: dict[str, Any], stream_tokens: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(shape, PolicyConfig.model_validate(policy), stream_tokens)


def test_streams_of_fp8_are_whole_blocks_on_every_rank() -> None:
    parallel = {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "context_parallel_size": 2,
    }
    plain = PolicyConfig.model_validate({"parallel": parallel})
    assert plain.stream_multiple == plain.parallel.stream_multiple == 4
    fp8 = PolicyConfig.model_validate({"parallel": parallel, "fp8": "hybrid"})
    assert fp8.stream_multiple == 2 * 2 * 16
    check_precision(dense(), fp8, 128)
