"""Folders of several types: what a checkpoint can keep, and what it cannot."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.convert.safetensors_file import TensorInfo
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.torch_dist_writer import Piece, TorchDistWriter, data_file_name
from tests.support.tiny_models import build_tiny_qwen3_moe, write_model_folder, write_tiny_qwen3
from tests.support.weights import assert_same_bits, weights_in

ATTENTION = "model.layers.0.self_attn."


def halve(folder: Path, part_of_name: str) -> Path:
    """Store the float32 weights whose name has that part as bfloat16 instead."""
    path = folder / "model.safetensors"
    halved = {
        name: tensor.bfloat16() if part_of_name in name else tensor
        for name, tensor in load_file(path).items()
    }
    assert {tensor.dtype for tensor in halved.values()} == {torch.float32, torch.bfloat16}
    save_file(halved, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("halved", "one", "other"),
    [
        ("layers.1.", "model.layers.0.input_layernorm", "model.layers.1.input_layernorm"),
        ("0.self_attn.k_proj", f"{ATTENTION}q_proj", f"{ATTENTION}k_proj"),
        ("0.self_attn.v_proj", f"{ATTENTION}q_proj", f"{ATTENTION}v_proj"),
        ("0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
    ],
    ids=["layers", "key", "value", "gate and up"],
)
def test_types_that_differ_inside_a_megatron_weight_are_refused_before_writing(
    tmp_path: Path, halved: str, one: str, other: str
) -> None:
    source = halve(write_tiny_qwen3(tmp_path / "source"), halved)
    with pytest.raises(CheckpointError, match="choose one with --dtype") as error:
        convert_from_hf(source, tmp_path / "out", on_start=lambda _total: pytest.fail("begun"))
    assert f"{one}.weight is torch.float32 and {other}.weight is torch.bfloat16" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert_from_hf(source, tmp_path / "out", torch.float32)
    convert_to_hf(tmp_path / "out", tmp_path / "back")
    wide = {name: tensor.float() for name, tensor in weights_in(source).items()}
    assert_same_bits(weights_in(tmp_path / "back"), wide)


def test_experts_of_several_types_are_refused(tmp_path: Path) -> None:
    source = write_model_folder(build_tiny_qwen3_moe(), tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"experts\.0\.down_proj.* and .*experts\.3\.down"):
        convert_from_hf(halve(source, "0.mlp.experts.3.down_proj"), tmp_path / "out")


def test_types_that_differ_from_weight_to_weight_are_kept(tmp_path: Path) -> None:
    source = halve(write_tiny_qwen3(tmp_path / "source"), "proj.weight")
    convert_from_hf(source, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_bits(weights_in(tmp_path / "back"), weights_in(source))


def test_a_stored_tensor_has_one_type(tmp_path: Path) -> None:
    writer = TorchDistWriter(tmp_path)
    pieces = [
        Piece(name="w", full_shape=(2,), offsets=(row,), tensor=torch.ones(1, dtype=dtype))
        for row, dtype in enumerate((torch.float32, torch.bfloat16))
    ]
    with pytest.raises(CheckpointError, match=r"w at \(1,\) is bfloat16, expected float32"):
        writer.write_file(data_file_name(0), pieces)


def test_a_tensor_in_another_type_has_other_bytes() -> None:
    info = TensorInfo(shape=(3, 5), dtype=torch.float32)
    assert (info.num_bytes, info.as_type(None)) == (60, info)
    assert info.as_type(torch.bfloat16).num_bytes == 30
