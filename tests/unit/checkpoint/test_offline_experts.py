"""Conversion of a mixture of experts without a model, both ways."""

import itertools
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prefixrl_mcore.checkpoint import torch_archive, torch_dist
from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.save_load import load_checkpoint, save_checkpoint
from prefixrl_mcore.checkpoint.torch_dist import TorchDistReader
from prefixrl_mcore.checkpoint.torch_dist_writer import Piece, TorchDistWriter, data_file_name
from tests.support.policies import build_policy, make_batch, max_difference, weights_of
from tests.support.tiny_models import build_tiny_qwen3_moe, write_model_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(build_tiny_qwen3_moe(), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("experts", ["sequential", "grouped"])
def test_a_saved_mixture_becomes_the_folder_that_the_live_model_exports(
    source: Path, tmp_path: Path, experts: str
) -> None:
    policy = build_policy(source, experts=experts)
    policy.update(make_batch())
    path = save_checkpoint(tmp_path / "run", 1, policy, {})
    convert_to_hf(path, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert max_difference(exported, weights_of(policy)) == 0.0
    assert max_difference(exported, load_file(source / "model.safetensors")) > 1e-4


def test_there_and_back_again_gives_the_same_bits(source: Path, tmp_path: Path) -> None:
    convert_from_hf(source, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    truth = load_file(source / "model.safetensors")
    assert max_difference(load_file(tmp_path / "out" / "model.safetensors"), truth) == 0.0


def test_experts_are_stored_as_one_stack_per_matrix(source: Path, tmp_path: Path) -> None:
    convert_from_hf(source, tmp_path / "checkpoint")
    reader = TorchDistReader(tmp_path / "checkpoint" / "megatron")
    name = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    assert reader.shapes[name] == (2, 4, 64, 48)  # layers, experts, hidden, width of an expert
    truth = load_file(source / "model.safetensors")
    assert torch.equal(
        reader.read(name, 1, 3), truth["model.layers.1.mlp.experts.3.down_proj.weight"]
    )


def test_a_piece_with_all_experts_of_a_layer_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.arange(24.0).view(2, 3, 4)  # layers, experts, width
    writer = TorchDistWriter(tmp_path)
    pieces = [
        Piece(name=name, full_shape=(2, 3, 4), offsets=(layer, 0, 0), tensor=sign * part[None])
        for name, sign in (("up", 1), ("down", -1))
        for layer, part in enumerate(numbers)
    ]
    writer.write_file(data_file_name(0), pieces)
    writer.finish()
    places: list[int] = []

    def read_tensor(mapping: mmap.mmap, offset: int, length: int) -> Tensor:
        places.append(offset)
        return torch_archive.read_tensor(mapping, offset, length)

    monkeypatch.setattr(torch_dist, "read_tensor", read_tensor)
    reader = TorchDistReader(tmp_path)
    for layer, name, expert in itertools.product((0, 1), ("up", "down"), (0, 1, 2)):
        reader.prefetch(name, layer, (expert + 1) % 3)
        sign = 1 if name == "up" else -1
        assert torch.equal(reader.read(name, layer, expert), sign * numbers[layer, expert])
    assert len(places) == len(set(places)) == 4  # pieces
    reader.read_piece("down", (1, 0, 0))  # reads the storage again, that is what it is for
    assert len(places) == 5


def test_a_converted_checkpoint_loads_into_a_policy(source: Path, tmp_path: Path) -> None:
    convert_from_hf(source, tmp_path / "checkpoint")
    other = write_model_folder(build_tiny_qwen3_moe(seed=1), tmp_path / "other")
    policy = build_policy(other)
    load_checkpoint(tmp_path / "checkpoint", policy)
    assert max_difference(weights_of(policy), load_file(source / "model.safetensors")) == 0.0
