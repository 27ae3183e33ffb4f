"""Folders whose experts are fused, as transformers 5 has them in memory, beside usual ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.hf_folder import HfWeights
from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.config.model_shape import read_hf_config
from tests.support.policies import build_policy, max_difference, weights_of
from tests.support.tiny_models import build_tiny_qwen3_moe, write_model_folder

FUSED = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights by the names of single experts."""
    folder = write_model_folder(build_tiny_qwen3_moe(), tmp_path_factory.mktemp("usual"))
    return load_file(folder / "model.safetensors")


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """The folder that transformers 5 writes when it keeps its own format."""
    model = build_tiny_qwen3_moe()
    folder = write_model_folder(model, tmp_path / "fused")
    model.save_pretrained(folder, save_original_format=False)
    assert FUSED in load_file(folder / "model.safetensors")
    return folder


def rewrite(folder: Path, **changes: Tensor) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file(tensors, folder / "model.safetensors")


def test_single_experts_are_read_out_of_fused_ones(fused: Path, truth: dict[str, Tensor]) -> None:
    with HfWeights(fused) as weights:
        weights.check(read_hf_config(fused))
        found = {name: weights.read(name) for name in weights.infos}
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
            name: info.shape for name, info in weights.infos.items()
        }
    assert max_difference(found, truth) == 0.0


def test_a_policy_begins_with_the_weights_of_either_form(
    fused: Path, truth: dict[str, Tensor]
) -> None:
    assert max_difference(weights_of(build_policy(fused)), truth) == 0.0


def test_conversion_writes_single_experts(
    fused: Path, tmp_path: Path, truth: dict[str, Tensor]
) -> None:
    convert_from_hf(fused, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert max_difference(load_file(tmp_path / "out" / "model.safetensors"), truth) == 0.0


def test_fused_experts_of_another_shape_are_named(fused: Path) -> None:
    rewrite(fused, **{FUSED: torch.zeros(3, 96, 64)})
    with HfWeights(fused) as weights, pytest.raises(CheckpointError) as error:
        weights.check(read_hf_config(fused))
    assert "2 missing: model.layers.1.mlp.experts.3.gate_proj.weight" in str(error.value)


def test_fused_experts_with_an_odd_number_of_rows_are_refused(fused: Path, tmp_path: Path) -> None:
    rewrite(fused, **{FUSED: torch.zeros(4, 97, 64)})
    message = rf"model\.safetensors: {FUSED} has shape \[4, 97, 64\], expected an even second"
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(fused, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=message):
        build_policy(fused)


def test_a_weight_in_both_forms_is_refused(fused: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    rewrite(fused, **{name: torch.zeros(48, 64)})
    with pytest.raises(CheckpointError, match=rf"has {name} as well as {FUSED}"):
        HfWeights(fused)
