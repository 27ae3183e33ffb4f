import pytest
import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.convert import layout
from prefixrl_mcore.checkpoint.convert.layout import Kind
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, Place, find_table, hf_name
from prefixrl_mcore.checkpoint.manifest import CheckpointError

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "intermediate_size": 6,
    "vocab_size": 5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}


def column(*values: float) -> Tensor:
    """[len(values), 1] one number per row."""
    return torch.tensor(values)[:, None]


def test_queries_keys_and_values_are_interleaved_by_group() -> None:
    # Four query heads, two groups, head size 1: group 0 has queries 0 and 1.
    query, key, value = column(0, 1, 2, 3), column(10, 11), column(20, 21)
    full = layout.hf_to_full("qkv", [query, key, value], num_groups=2)
    assert full[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    back = layout.full_to_hf("qkv", full, rows=[4, 2, 2], num_groups=2)
    assert [part[:, 0].tolist() for part in back] == [[0, 1, 2, 3], [10, 11], [20, 21]]
    assert all(part.is_contiguous() for part in back)


def test_a_bias_is_interleaved_like_its_matrix() -> None:
    parts = [torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])]
    full = layout.hf_to_full("qkv", parts, num_groups=2)
    assert full.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_each_rank_has_its_gate_rows_above_its_up_rows() -> None:
    full = layout.hf_to_full("glu", [column(0, 1, 2, 3), column(10, 11, 12, 13)], num_groups=1)
    assert full[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    shards = [layout.shard("glu", full, rank=rank, size=2) for rank in range(2)]
    assert [part[:, 0].tolist() for part in shards] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    assert layout.merge("glu", shards)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    back = layout.full_to_hf("glu", full, rows=[4, 4], num_groups=1)
    assert [part[:, 0].tolist() for part in back] == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_row_parallel_weights_are_cut_by_columns_and_others_by_rows() -> None:
    full = torch.tensor([[0, 1], [2, 3]])
    assert layout.shard("row", full, rank=1, size=2).tolist() == [[1], [3]]
    assert layout.shard("qkv", full, rank=1, size=2).tolist() == [[2, 3]]
    assert layout.shard("vocab", full, rank=0, size=2).tolist() == [[0, 1]]
    assert layout.shard("replicated", full, rank=1, size=2).tolist() == full.tolist()


def test_vocabulary_padding_is_zero_and_is_cut_again() -> None:
    full = layout.pad_vocab(column(1, 2, 3), 4)
    assert full[:, 0].tolist() == [1, 2, 3, 0]
    (back,) = layout.full_to_hf("vocab", full, rows=[3], num_groups=1)
    assert back[:, 0].tolist() == [1, 2, 3]
    assert layout.pad_vocab(full, 4) is full


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["replicated", "row", "vocab", "qkv", "glu"])
def test_merging_the_shards_gives_the_whole(kind: Kind, size: int) -> None:
    full = torch.arange(16 * 8).view(16, 8)
    shards = [layout.shard(kind, full, rank=rank, size=size) for rank in range(size)]
    assert torch.equal(layout.merge(kind, shards), full)


def test_a_weight_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 1\).*over 2.*dimension 0 has 5"):
        layout.shard("vocab", column(0, 1, 2, 3, 4), rank=0, size=2)


def test_the_qwen3_table_describes_every_weight_once_in_file_order() -> None:
    table, dims = find_table(QWEN3), ModelDims.from_hf_config(QWEN3)
    shapes = table.hf_shapes(dims)
    assert len(shapes) == 1 + 2 * 11 + 2
    assert shapes["model.embed_tokens.weight"] == (5, 8)
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (12, 8)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (6, 8)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (8, 12)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (8, 6)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (3,)
    assert next(iter(shapes)) == "model.embed_tokens.weight"
    assert list(shapes)[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_a_tied_model_has_no_output_head() -> None:
    dims = ModelDims.from_hf_config({**QWEN3, "tie_word_embeddings": True})
    table = find_table(QWEN3)
    assert "lm_head.weight" not in table.hf_shapes(dims)
    assert table.find("output_layer.weight", dims) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("decoder.layers.1.input_layernorm.weight", "input_layernorm", id="local"),
        pytest.param(
            "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
            "input_layernorm",
            id="Transformer Engine",
        ),
        pytest.param(
            "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
            "post_attention_layernorm",
            id="Transformer Engine, second norm",
        ),
    ],
)
def test_both_specs_names_lead_to_the_same_rule(name: str, expected: str) -> None:
    found = find_table(QWEN3).find(name, ModelDims.from_hf_config(QWEN3))
    assert found is not None
    rule, place = found
    assert place == Place(layer=1)
    assert hf_name(rule.hf[0], place) == f"model.layers.1.{expected}.weight"


MIXTURE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 4,
}


@pytest.mark.parametrize(
    "name",
    ["mlp.experts.linear_fc1.weight2", "mlp.experts.local_experts.2.linear_fc1.weight"],
    ids=["grouped", "sequential"],
)
def test_an_expert_has_its_layer_and_index_under_either_spec(name: str) -> None:
    dims = ModelDims.from_hf_config(MIXTURE)
    found = find_table(MIXTURE).find(f"decoder.layers.1.{name}", dims)
    assert found is not None
    rule, place = found
    assert place == Place(layer=1, expert=2)
    prefix = "model.layers.1.mlp.experts.2"
    assert [hf_name(weight, place) for weight in rule.hf] == [
        f"{prefix}.gate_proj.weight",
        f"{prefix}.up_proj.weight",
    ]
    assert rule.full_shape(dims) == (8, 8)
    assert rule.checkpoint_name == "decoder.layers.mlp.experts.experts.linear_fc1.weight"


def test_the_qwen3_moe_table_describes_every_expert_once() -> None:
    dims = ModelDims.from_hf_config(MIXTURE)
    shapes = find_table(MIXTURE).hf_shapes(dims)
    assert len(shapes) == 1 + 2 * (9 + 3 * 3) + 2
    assert shapes["model.layers.1.mlp.experts.2.down_proj.weight"] == (8, 4)
    assert shapes["model.layers.0.mlp.gate.weight"] == (3, 8)
    assert not [name for name in shapes if "mlp.gate_proj" in name]


def test_an_unknown_name_has_no_rule() -> None:
    dims = ModelDims.from_hf_config(QWEN3)
    assert find_table(QWEN3).find("decoder.layers.0.mlp.router.weight", dims) is None
    assert find_table(QWEN3).find("xdecoder.final_layernorm.weight", dims) is None


@pytest.mark.parametrize("model_type", ["bert", None, "../qwen3", "__init__"])
def test_an_unknown_family_is_refused_with_the_known_ones(model_type: str | None) -> None:
    with pytest.raises(CheckpointError, match="expected one of llama, qwen2, qwen3, qwen3_moe"):
        find_table({"model_type": model_type})
