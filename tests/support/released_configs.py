"""``config.json`` of released models, field by field as published.

Compared with copies of the published files in public repositories:
``Qwen3-Coder-30B-A3B-Instruct`` with that of ztxz16/fastllm and, equal to it, of
sagui-nlp/nanoGPT-moe; ``Qwen3-4B-Instruct-2507`` with
``warpio-docs/ai-docs/model_cards/qwen3:4b.md`` of akougkas/warpio-cli; ``Llama-3.3-70B-Instruct``
with two unrelated copies that agree, its sizes also with the blog post of
tugot17/tokenomics-from-first-principles; the others with ``sglang/Model_Config.md`` of
citsjtu2020/LLM-Prof.
"""

import json
from pathlib import Path
from typing import Any

_QWEN: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}

_QWEN3_MOE: dict[str, Any] = _QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_size": 2048,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rope_scaling": None,
    "sliding_window": None,
    "vocab_size": 151936,
}

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}

_LLAMA_SCALING: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

RELEASED: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B": _QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "transformers_version": "4.40.1",
        "use_mrope": False,
        "vocab_size": 152064,
    },
    "Qwen3-8B": _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "transformers_version": "4.51.0",
        "vocab_size": 151936,
    },
    "Qwen3-4B-Instruct-2507": _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "rope_theta": 5000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "transformers_version": "4.51.0",
        "vocab_size": 151936,
    },
    "Qwen3-32B": _QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "max_position_embeddings": 40960,
        "max_window_layers": 64,
        "model_type": "qwen3",
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "transformers_version": "4.51.0",
        "vocab_size": 151936,
    },
    "Qwen3-30B-A3B": _QWEN3_MOE
    | {
        "attention_bias": False,
        "bos_token_id": 151643,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "transformers_version": "4.51.0",
    },
    "Qwen3-Coder-30B-A3B-Instruct": _QWEN3_MOE
    | {
        "intermediate_size": 5472,
        "max_position_embeddings": 262144,
        "max_window_layers": 28,
        "qkv_bias": False,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.0,
        "shared_expert_intermediate_size": 0,
        "transformers_version": "4.52.3",
        "use_qk_norm": True,
    },
    "Llama-3.1-8B": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_scaling": _LLAMA_SCALING | {"factor": 8.0},
        "tie_word_embeddings": False,
        "transformers_version": "4.43.0.dev0",
    },
    "Llama-3.3-70B-Instruct": _LLAMA
    | {
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 128,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "rope_scaling": _LLAMA_SCALING | {"factor": 8.0},
        "tie_word_embeddings": False,
        "transformers_version": "4.47.0.dev0",
    },
    "Llama-3.2-3B": _LLAMA
    | {
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "rope_scaling": _LLAMA_SCALING | {"factor": 32.0},
        "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
    },
}
"""By the name of the release."""


def write_shape(release: str, folder: Path) -> Path:
    """Return a folder with nothing but the ``config.json`` of a release."""
    model = folder / release
    model.mkdir()
    (model / "config.json").write_text(json.dumps(RELEASED[release]), encoding="utf-8")
    return model
