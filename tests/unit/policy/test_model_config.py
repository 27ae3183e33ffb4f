"""Reading of Hugging Face ``config.json``: what is mapped, what is refused and how it is named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixrl_mcore.checkpoint.convert.rules import ModelDims, find_table
from prefixrl_mcore.config.model_shape import MixtureShape
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.config.rotary import Llama3Scaling
from prefixrl_mcore.policy.layers import Layers
from prefixrl_mcore.policy.model_config import (
    build_transformer_config,
    read_hf_config,
    read_model_shape,
)
from tests.support.released_configs import RELEASED

LOCAL = Layers(spec="local", attention="sdpa", fuses_weight_gradients=False, reasons=())

QWEN3_8B_V4 = RELEASED["Qwen3-8B"]


def _v5() -> dict[str, Any]:
    config = dict(QWEN3_8B_V4)
    for name in ("rope_scaling", "rope_theta", "torch_dtype"):
        del config[name]
    return config | {
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 36,
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    }


def test_qwen3_8b_of_either_transformers_generation_has_this_shape() -> None:
    shape = read_model_shape(QWEN3_8B_V4)
    assert read_model_shape(_v5()) == shape
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (36, 4096, 12288)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.kv_channels) == (32, 8, 128)
    assert (shape.rotary_base, shape.layernorm_epsilon) == (1e6, 1e-6)
    assert (shape.qk_layernorm, shape.add_qkv_bias, shape.tie_word_embeddings) == (
        True,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("tp", "rows"), [(1, 151936), (8, 151936), (7, 151942)], ids=["1", "divides", "padded"]
)
def test_vocabulary_is_padded_to_equal_shards(tp: int, rows: int) -> None:
    assert read_model_shape(QWEN3_8B_V4).padded_vocab_size(tp) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM", id="family"),
        pytest.param({"architectures": None}, "architectures", id="no-family"),
        pytest.param({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling", id="yarn"),
        pytest.param(
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
            r"rope_parameters.*only rope_type 'default'",
            id="llama3",
        ),
        pytest.param(
            {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
            id="partial-rotary",
        ),
        pytest.param({"use_sliding_window": True}, "use_sliding_window", id="sliding-window"),
        pytest.param(
            {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", id="layers"
        ),
        pytest.param({"hidden_act": "gelu"}, "hidden_act = 'gelu'", id="activation"),
        pytest.param({"attention_dropout": 0.1}, "attention_dropout", id="dropout"),
        pytest.param(
            {"quantization_config": {"quant_method": "fp8"}}, "quantization_config", id="fp8"
        ),
        pytest.param({"logit_softcap": 30.0}, "unknown.*logit_softcap = 30.0", id="unknown"),
        pytest.param({"rms_norm_eps": None}, "rms_norm_eps is missing", id="missing"),
        pytest.param({"rope_theta": None}, "rope_theta is missing", id="no-theta"),
        pytest.param({"vocab_size": 0}, "vocab_size must be a positive integer", id="zero"),
        pytest.param({"vocab_size": True}, "vocab_size must be a positive integer", id="true"),
        pytest.param({"head_dim": []}, "head_dim must be a positive integer, got ..", id="list"),
        pytest.param({"head_dim": 0}, "head_dim must be a positive integer, got 0", id="no-head"),
        pytest.param({"num_key_value_heads": 0}, "num_key_value_heads must be", id="no-groups"),
        pytest.param({"attention_bias": True}, "attention_bias = True is not impl", id="bias"),
        # transformers 5 reads no such file, so that no engine could serve it.
        pytest.param({"attention_bias": None}, "bias = None is not .* expected False", id="null"),
        pytest.param({"rope_theta": "1e6"}, "rope_theta must be a positive number", id="quoted"),
        pytest.param({"rope_theta": 0}, "rope_theta must be a positive number", id="no-base"),
        pytest.param({"rope_parameters": "x"}, "rope_parameters = 'x' is of type str", id="text"),
        pytest.param({"layer_types": 3}, "layer_types = 3 is of type int", id="number"),
        pytest.param({"rms_norm_eps": True}, "type bool, expected int or float", id="bool"),
        pytest.param({"tie_word_embeddings": "no"}, "type str, expected bool", id="no"),
        pytest.param({"architectures": "Qwen3"}, "type str, expected list", id="name"),
    ],
)
def test_a_field_that_is_not_implemented_is_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_model_shape(QWEN3_8B_V4 | change)


def test_null_is_the_default_where_there_is_one() -> None:
    nulls = {"num_key_value_heads": None, "initializer_range": None, "head_dim": None}
    shape = read_model_shape(QWEN3_8B_V4 | nulls)
    assert shape.num_query_groups == shape.num_attention_heads == 32
    assert (shape.init_method_std, shape.kv_channels) == (0.02, 4096 // 32)
    assert ModelDims.from_hf_config(QWEN3_8B_V4 | nulls).num_groups == 32


MIXTURE = QWEN3_8B_V4 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
LLAMA_31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {
    key: value
    for key, value in QWEN3_8B_V4.items()
    if key not in ("max_window_layers", "sliding_window", "use_sliding_window")
} | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": LLAMA_31}


def test_experts_of_either_transformers_generation() -> None:
    shape = read_model_shape(MIXTURE)
    v5 = {key: value for key, value in MIXTURE.items() if key != "num_experts"}
    assert read_model_shape(v5 | {"num_local_experts": 128}) == shape
    assert shape.mixture == MixtureShape(
        num_experts=128, num_experts_per_token=8, is_renormalized=True
    )
    assert shape.ffn_hidden_size == 768


def test_llama_scaling_of_either_transformers_generation() -> None:
    shape = read_model_shape(LLAMA)
    assert shape.rotary_scaling == Llama3Scaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    v5 = {key: value for key, value in LLAMA.items() if key not in ("rope_scaling", "rope_theta")}
    assert read_model_shape(v5 | {"rope_parameters": LLAMA_31 | {"rope_theta": 1000000}}) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"factor": None}, r"rope_scaling\.factor must be a positive", id="null"),
        pytest.param({"factor": "8"}, r"rope_scaling\.factor must be a positive", id="text"),
        pytest.param({"low_freq_factor": -1}, r"low_freq_factor must be a positive", id="negative"),
        pytest.param({"rope_type": ["llama3"]}, "is not implemented", id="list"),
    ],
)
def test_a_scaling_with_a_value_that_is_none_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_model_shape(LLAMA | {"rope_scaling": LLAMA_31 | change})


@pytest.mark.parametrize(
    "second",
    [
        pytest.param({"rope_type": "default", "rope_theta": 1e4}, id="default"),
        pytest.param(LLAMA_31 | {"rope_theta": 1e4}, id="base"),
        pytest.param(LLAMA_31 | {"rope_theta": 1e6, "factor": 4.0}, id="factor"),
    ],
)
def test_two_rotary_embeddings_in_one_file_must_agree(second: dict[str, Any]) -> None:
    """Transformers and we would follow another one of them."""
    both = LLAMA | {"rope_parameters": LLAMA_31 | {"rope_theta": 1e6}}
    assert read_model_shape(both) == read_model_shape(LLAMA)
    with pytest.raises(ValueError, match=r"twice, differently: rope_parameters = .*, rope_theta"):
        read_model_shape(LLAMA | {"rope_parameters": second})


def test_a_field_that_transformers_adds_when_it_saves_changes_nothing() -> None:
    assert read_model_shape(QWEN3_8B_V4 | {"_attn_implementation_autoset": True}) == (
        read_model_shape(QWEN3_8B_V4)
    )


def test_qwen2_has_biases_that_its_config_does_not_name() -> None:
    config = QWEN3_8B_V4 | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    del config["attention_bias"]
    shape = read_model_shape(config)
    assert (shape.add_qkv_bias, shape.qk_layernorm) == (True, False)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        pytest.param(MIXTURE, {"mlp_only_layers": [0]}, "mlp_only_layers", id="dense-layers"),
        pytest.param(MIXTURE, {"decoder_sparse_step": 2}, "decoder_sparse_step", id="every-second"),
        pytest.param(MIXTURE, {"num_experts_per_tok": 129}, "exceeds the 128", id="too-many"),
        pytest.param(MIXTURE, {"num_experts_per_tok": 1}, "no gradient", id="one-expert"),
        pytest.param(MIXTURE, {"shared_expert_intermediate_size": 1}, "expected 0", id="shared"),
        pytest.param(LLAMA, {"mlp_bias": True}, "mlp_bias", id="mlp-bias"),
        pytest.param(LLAMA, {"attention_bias": True}, "attention_bias", id="attention-bias"),
        pytest.param(
            *(LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            "only rope_type 'default' or 'llama3'",
            id="yarn",
        ),
        pytest.param(
            *(LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
            "'llama3' with exactly",
            id="half-a-scaling",
        ),
    ],
)
def test_what_a_family_does_not_implement_is_refused(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_model_shape(config | change)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tensor_model_parallel_size": 16}, "8 key-value heads do not divide into 16"),
        ({"pipeline_model_parallel_size": 5}, "36 layers do not divide into 5"),
        (
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 4},
            "36 layers do not divide into 16",
        ),
    ],
    ids=["tp", "pp", "vpp"],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(
    parallel: dict[str, int], message: str
) -> None:
    policy = PolicyConfig.model_validate({"parallel": parallel})
    with pytest.raises(ValueError, match=message):
        build_transformer_config(
            read_model_shape(QWEN3_8B_V4), policy, LOCAL, device=torch.device("cpu")
        )


def test_megatron_config_divides_by_global_token_counts() -> None:
    config = build_transformer_config(
        read_model_shape(QWEN3_8B_V4), PolicyConfig(), LOCAL, device=torch.device("cpu")
    )
    assert config.calculate_per_token_loss
    assert (config.bf16, config.params_dtype) == (True, torch.bfloat16)
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)


def test_a_folder_without_a_readable_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: does not exist"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="got list, expected a JSON object"):
        read_hf_config(tmp_path)


NUM_PARAMETERS = {
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    # Half of 61,064,245,248, which is total_size in the index of its published bfloat16 files.
    "Qwen3-Coder-30B-A3B-Instruct": 30_532_122_624,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "Llama-3.2-3B": 3_212_749_824,
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_understood_and_its_table_has_all_parameters(name: str) -> None:
    config = RELEASED[name]
    shape = read_model_shape(config)
    assert (shape.num_layers, shape.vocab_size) == (
        config["num_hidden_layers"],
        config["vocab_size"],
    )
    assert shape.layernorm_epsilon == config["rms_norm_eps"]
    shapes = find_table(config).hf_shapes(ModelDims.from_hf_config(config))
    assert sum(math.prod(one) for one in shapes.values()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "field", "other"),
    [
        ("Qwen2.5-7B", "use_mrope", True),
        ("Qwen3-Coder-30B-A3B-Instruct", "use_qk_norm", False),
        ("Qwen3-Coder-30B-A3B-Instruct", "shared_expert_intermediate_size", 512),
        ("Qwen3-Coder-30B-A3B-Instruct", "qkv_bias", True),
    ],
)
def test_a_field_of_a_release_is_understood_with_its_one_value(
    name: str, field: str, other: Any
) -> None:
    config = RELEASED[name]
    assert read_model_shape(config).vocab_size == config["vocab_size"]
    with pytest.raises(ValueError, match=f"{field} = {other}"):
        read_model_shape({**config, field: other})
