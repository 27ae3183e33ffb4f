import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.weight_names import (
    WeightCoverage,
    read_config_number,
    read_end_token_ids,
    read_weight_coverage,
)
from prefixrl_mcore.rollout.weight_sync.folder import weights_of_folder
from prefixrl_mcore.rollout.weight_sync.fused import fused_name
from tests.support.tiny_models import (
    EOS_ID,
    build_tiny_qwen3,
    build_tiny_qwen3_moe,
    write_model_folder,
    write_tiny_qwen3,
)


@pytest.mark.parametrize("is_tied", [True, False])
def test_folder_names_the_weights_that_the_model_has(tmp_path: Path, is_tied: bool) -> None:
    write_tiny_qwen3(tmp_path, tie_word_embeddings=is_tied)

    coverage = read_weight_coverage(tmp_path)

    model = build_tiny_qwen3(tie_word_embeddings=is_tied)
    assert coverage.shapes == {n: tuple(w.shape) for n, w in model.named_parameters()}
    assert coverage.tied_names == (frozenset({"lm_head.weight"}) if is_tied else frozenset())


def test_tied_head_in_the_files_is_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    weight = np.zeros((4, 2), dtype=np.float32)
    save_file({"model.w": weight, "lm_head.weight": weight}, tmp_path / "model.safetensors")

    coverage = read_weight_coverage(tmp_path)

    assert coverage.is_to_load("model.w", (4, 2))
    assert not coverage.is_to_load("lm_head.weight", (4, 2))
    coverage.check_complete()


def test_many_missing_names_are_counted_and_some_are_named() -> None:
    coverage = WeightCoverage(shapes={f"w{index}": (1,) for index in range(8)})
    assert coverage.is_to_load("w3", (1,))

    with pytest.raises(
        EngineError, match="7 of the model's 8 did not come: w0, w1, w2, w4, w5 and 2 more"
    ):
        coverage.check_complete()


def test_end_tokens_of_both_configs_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')

    assert read_end_token_ids(tmp_path) == {5, 7}


def test_end_token_of_the_tiny_model_is_found(tmp_path: Path) -> None:
    assert read_end_token_ids(write_tiny_qwen3(tmp_path)) == {EOS_ID}


def test_missing_number_is_an_error_that_names_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": "many"}')

    assert read_config_number(tmp_path, "head_dim", 64) == 64
    with pytest.raises(ValueError, match=r"config\.json: expected a whole number as 'vocab_size'"):
        read_config_number(tmp_path, "vocab_size")


def test_fused_experts_are_asked_for_and_streamed_one_by_one_as_the_policy_sends_them(
    tmp_path: Path,
) -> None:
    model = build_tiny_qwen3_moe()
    single = load_file(write_model_folder(model, tmp_path / "usual") / "model.safetensors")
    fused = write_model_folder(model, tmp_path / "fused")
    model.save_pretrained(fused, save_original_format=False)

    coverage = read_weight_coverage(fused)
    streamed = dict(weights_of_folder(fused))

    assert coverage.shapes == {name: tuple(weight.shape) for name, weight in single.items()}
    assert streamed.keys() == single.keys()
    assert all(torch.equal(streamed[name].cpu(), single[name]) for name in single)
    names = [fused_name(name) for name in streamed]
    assert len(list(groupby(names))) == len(set(names))  # what belongs together comes together


def test_weights_that_no_index_names_are_refused_as_the_policy_refuses_them(
    tmp_path: Path,
) -> None:
    write_tiny_qwen3(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "old.safetensors")

    with pytest.raises(ValueError, match=r"does not name: \['old\.safetensors'\]"):
        read_weight_coverage(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor model\.s.*index"):
        read_weight_coverage(tmp_path)
