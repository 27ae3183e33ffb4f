"""Megatron's configuration of a model shape.

Shape and layout rules are in ``config``, which needs no torch, so that ``prefixrl check``
refuses what training refuses.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own alias)
from megatron.core.distributed import finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from prefixrl_mcore.config.layout import check_divisible, check_experts
from prefixrl_mcore.config.model_shape import (
    FAMILIES,
    ModelShape,
    read_hf_config,
    read_model_shape,
)
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.config.precision import recomputed_modules
from prefixrl_mcore.policy.experts import choose_experts
from prefixrl_mcore.policy.layers import Layers

__all__ = [
    "FAMILIES",
    "ModelShape",
    "build_transformer_config",
    "read_hf_config",
    "read_model_shape",
]


def _mixture_settings(
    shape: ModelShape, policy: PolicyConfig, device: torch.device
) -> dict[str, Any]:
    """Return what Megatron must know of the experts."""
    mixture, parallel = shape.mixture, policy.parallel
    if mixture is None:
        return {}
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_ffn_hidden_size": shape.ffn_hidden_size,
        "moe_router_topk": mixture.num_experts_per_token,
        "moe_router_pre_softmax": not mixture.is_renormalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": (
            policy.experts.aux_loss_type if policy.experts.aux_loss_coefficient else "none"
        ),
        "moe_aux_loss_coeff": policy.experts.aux_loss_coefficient,
        "moe_z_loss_coeff": policy.experts.z_loss_coefficient or None,
        "moe_grouped_gemm": choose_experts(shape, policy, device) == "grouped",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


def _recompute_settings(shape: ModelShape, policy: PolicyConfig) -> dict[str, Any]:
    """Return which activations Megatron computes again."""
    if policy.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(recomputed_modules(policy, shape)),
        }
    if policy.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {}


def _fp8_settings(policy: PolicyConfig) -> dict[str, Any]:
    """Return in which FP8 the matrix products are."""
    if policy.fp8 is None:
        return {}
    return {"fp8": policy.fp8, "fp8_recipe": policy.fp8_recipe}


def build_transformer_config(
    shape: ModelShape, policy: PolicyConfig, layers: Layers, *, device: torch.device
) -> TransformerConfig:
    """Return Megatron's configuration; the only place where it is made.

    Gradients follow Megatron's per-token rule: the loss function returns a local sum and a local
    token count, and ``finalize_model_grads`` divides once by the global count.

    Raises:
        ValueError: if the layout does not divide the model.
    """
    parallel = policy.parallel
    check_divisible(shape, parallel)
    check_experts(shape, policy)
    dtype = torch.float32 if policy.dtype == "float32" else torch.bfloat16
    return TransformerConfig(
        **_mixture_settings(shape, policy, device),
        **_recompute_settings(shape, policy),
        **_fp8_settings(policy),
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.layernorm_epsilon,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=shape.init_method_std,
        attention_softmax_in_fp32=True,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=device.type == "cpu",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=False,
        batch_p2p_comm=device.type == "cuda",
        batch_p2p_sync=device.type == "cuda",
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, dense or not
        # That of Transformer Engine's layers is switched on in build.py.
        gradient_accumulation_fusion=layers.fuses_weight_gradients and layers.spec == "local",
        bias_activation_fusion=False,  # compiles on first use; no gain on the CPU
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        finalize_model_grads_func=finalize_model_grads,
    )
