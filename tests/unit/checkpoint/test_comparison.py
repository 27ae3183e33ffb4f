"""``convert verify``: what counts as the same, and what is said of what is not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.comparison import Comparison, compare_models, open_model
from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.cli import main
from tests.support.tiny_models import build_tiny_families, write_model_folder, write_tiny_qwen3

NORM = "model.norm.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "model")


def changed(model: Path, target: Path, **changes: Tensor | None) -> Path:
    """Copy a model folder with weights replaced, added or (None) left out."""
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = {**load_file(model / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, target / "model.safetensors")
    return target


def compare(first: Path, second: Path) -> Comparison:
    with open_model(first) as one, open_model(second) as other:
        return compare_models(one, other)


def test_a_folder_and_the_checkpoint_made_of_it_are_the_same(model: Path, tmp_path: Path) -> None:
    convert_from_hf(model, tmp_path / "checkpoint")
    there, back = compare(model, tmp_path / "checkpoint"), compare(tmp_path / "checkpoint", model)
    assert there.differences == back.differences == ()
    assert there.num_weights == 24
    assert there.num_bytes == sum(t.nbytes for t in load_file(model / "model.safetensors").values())


def test_one_flipped_bit_is_found_with_its_size(model: Path, tmp_path: Path) -> None:
    norm = load_file(model / "model.safetensors")[NORM]
    norm[3] += 0.25
    (difference,) = compare(model, changed(model, tmp_path / "b", **{NORM: norm})).differences
    assert (difference.name, difference.what) == (NORM, "values")
    assert difference.max_difference == pytest.approx(0.25, abs=1e-6)


def test_a_negative_zero_differs_from_zero_in_bits_only(model: Path, tmp_path: Path) -> None:
    zeros = torch.zeros(64)
    a = changed(model, tmp_path / "a", **{NORM: zeros})
    b = changed(model, tmp_path / "b", **{NORM: -zeros})
    (difference,) = compare(a, b).differences
    assert (difference.what, difference.max_difference) == ("values", 0.0)


def test_equal_nans_are_equal_and_a_nan_on_one_side_is_not(model: Path, tmp_path: Path) -> None:
    nans = torch.full((64,), float("nan"))
    a = changed(model, tmp_path / "a", **{NORM: nans})
    assert compare(a, a).differences == ()
    (difference,) = compare(a, model).differences
    assert difference.max_difference != difference.max_difference  # NaN


def test_another_type_is_told_with_the_rounding(model: Path, tmp_path: Path) -> None:
    convert_from_hf(model, tmp_path / "checkpoint")
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "half", torch.bfloat16)
    found = {one.name: one for one in compare(model, tmp_path / "half").differences}
    assert {one.what for one in found.values()} == {"type"}
    norm = load_file(model / "model.safetensors")[NORM]
    rounding = float((norm - norm.bfloat16().float()).abs().max())
    assert found[NORM].max_difference == pytest.approx(rounding)
    assert (found[NORM].first, found[NORM].second) == ("float32", "bfloat16")


def test_missing_extra_and_misshapen_weights_are_told(model: Path, tmp_path: Path) -> None:
    changes = {NORM: None, "extra": torch.ones(2), "model.embed_tokens.weight": torch.ones(2, 2)}
    found = compare(model, changed(model, tmp_path / "b", **changes)).differences
    told = {(one.name, one.what, one.first, one.second) for one in found}
    assert told == {
        (NORM, "missing", "there", "missing"),
        ("extra", "missing", "missing", "there"),
        ("model.embed_tokens.weight", "shape", "[32, 64]", "[2, 2]"),
    }


def test_two_folders_that_lack_the_same_weight_are_not_whole(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = changed(model, tmp_path / "b", **{NORM: None})
    assert main(["convert", "verify", str(lacking), str(lacking), "--forward"]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("weights do not fit its config.json: 1 missing: model.norm.weight") == 2
    assert "equal as far as they go, but not whole: 23 weights" in told
    assert "forward passes not compared" in told
    assert compare(model, model).faults == ()


def test_a_config_that_computes_something_else_is_told(model: Path, tmp_path: Path) -> None:
    other = changed(model, tmp_path / "b")
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 7.0
    (other / "config.json").write_text(json.dumps(config))
    (difference,) = compare(model, other).differences
    assert (difference.name, difference.what, difference.second) == ("rotary_base", "config", "7.0")


def test_a_run_is_its_latest_checkpoint_although_it_has_a_config_of_its_own(
    model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text('{"method": "rl"}')
    convert_from_hf(model, run / "checkpoints" / "step-000003")
    found = compare(model, run)
    assert (found.differences, found.faults) == ((), ())
    with open_model(run) as opened:
        assert opened.path == run / "checkpoints" / "step-000003"


def test_what_is_no_model_is_told_with_what_it_could_be(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"here or in checkpoints/; .* has a config\.json"),
        open_model(tmp_path),
    ):
        pass


def test_a_tied_copy_of_the_embedding_is_no_difference(model: Path, tmp_path: Path) -> None:
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    other = changed(model, tmp_path / "b", **{"lm_head.weight": embedding.clone()})
    assert compare(model, other).differences == ()


@pytest.mark.parametrize("family", ["qwen3", "qwen3-moe", "llama-3", "qwen2.5-tied"])
def test_verify_says_the_same_of_forward_passes_of_a_folder_and_its_checkpoint(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model_folder(build_tiny_families()[family], tmp_path / "model")
    assert main(["convert", "from-hf", str(model), str(tmp_path / "checkpoint")]) == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("<user> 1 + 2 :\n\n3 4 5 6 7\n")
    arguments = [str(model), str(tmp_path / "checkpoint"), "--prompts", str(prompts)]
    assert main(["convert", "verify", *arguments]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "equal, bit for bit" in told
    # "<user> 1 + 2 :" and "3 4 5 6 7" have four predicted tokens each.
    assert "forward: 8 tokens, max |difference of logprobs| 0 nats, top-1 agreement 1.0000" in told


def test_verify_exits_with_1_and_shows_how_logprobs_differ(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    other = changed(model, tmp_path / "b", **{"model.embed_tokens.weight": embedding + 0.5})
    assert main(["convert", "verify", str(model), str(other), "--forward"]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "1 differences" in told
    assert "different: 24 weights" in told
    assert "max |difference of logprobs| 0 nats" not in told
    assert "nats, top-1 agreement" in told


def test_verify_of_what_is_no_model_is_bad_input(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["convert", "verify", str(model), str(tmp_path / "empty")]) == 2
    assert "holds no complete checkpoint" in " ".join(capsys.readouterr().err.split())
