"""Bad input of ``prefixrl convert``: one named error, exit code 2, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf
from prefixrl_mcore.cli import main
from tests.support.tiny_models import write_tiny_qwen3

NORM = "model.norm.weight"


def set_config(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil


def set_weight(name: str, weight: torch.Tensor | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = {**load_file(path), name: weight}
        save_file({k: v for k, v in weights.items() if v is not None}, path)

    return spoil


def cut_off(name: str, num_bytes: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:-num_bytes])

    return spoil


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


HF_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown architecture": (
        set_config(architectures=["MambaForCausalLM"], model_type="mamba"),
        "MambaForCausalLM",
    ),
    "unknown field": (set_config(attn_logit_softcapping=30.0), "attn_logit_softcapping = 30.0"),
    "unknown rope": (
        set_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        "yarn",
    ),
    "missing field": (set_config(num_hidden_layers=None), "num_hidden_layers is missing"),
    "missing weight": (set_weight(NORM, None), f"1 missing: {NORM}"),
    "extra weight": (set_weight("extra", torch.ones(1)), "1 unexpected: extra"),
    "wrong shape": (set_weight(NORM, torch.ones(63)), f"{NORM} got [63], expected [64]"),
    "type without numbers": (
        set_weight(NORM, torch.ones(64).to(torch.float8_e4m3fn)),
        f"{NORM} has type F8_E4M3",
    ),
    "truncated weights": (cut_off("model.safetensors", 1), "is damaged or truncated"),
    "weights that are none": (overwrite("model.safetensors", b"<html>"), "damaged or truncated"),
    "config that is none": (overwrite("config.json", b"{"), "config.json: not valid JSON"),
}

CHECKPOINT_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated tensors": (cut_off("megatron/__0_1.distcp", 1), "__0_1.distcp: got"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
    "other index": (
        lambda folder: overwrite(
            "megatron/.metadata", bytes((folder / "megatron/.metadata").stat().st_size)
        )(folder),
        ".metadata: content is damaged",
    ),
    "other config": (overwrite("hf/config.json", b"{}"), "config.json: got 2 bytes"),
}


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("fault", HF_FAULTS)
def test_a_bad_folder_is_named_and_leaves_nothing(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = HF_FAULTS[fault]
    folder = write_tiny_qwen3(tmp_path / "model")
    spoil(folder)
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "out")]) == 2
    assert message in told(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_bad_checkpoint_is_named_and_leaves_nothing(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = CHECKPOINT_FAULTS[fault]
    convert_from_hf(write_tiny_qwen3(tmp_path / "model"), tmp_path / "checkpoint")
    spoil(tmp_path / "checkpoint")
    assert main(["convert", "to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 2
    assert message in told(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model"]


@pytest.mark.parametrize("size", ["0GB", "-1", "5 apples", ""])
def test_a_size_that_is_none_is_refused(
    tmp_path: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    arguments = ["from-hf", str(folder), str(tmp_path / "out"), f"--shard-size={size}"]
    assert main(["convert", *arguments]) == 2
    assert "expected a number of bytes such as 5GB" in told(capsys)


@pytest.mark.parametrize("arguments", [["from-hf", "--tp", "2"], ["to-hf", "--pp=4"]])
def test_a_layout_is_refused_with_where_it_belongs(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    action, *flags = arguments
    with pytest.raises(SystemExit) as refusal:
        main(["convert", action, str(tmp_path / "in"), str(tmp_path / "out"), *flags, "--ep", "2"])
    assert refusal.value.code == 2
    message = told(capsys)
    assert f"there is no {flags[0][:4]}: a checkpoint has no layout" in message
    assert "give the layout to training, in policy.parallel" in message


def test_the_flags_of_type_and_size_do_what_they_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_qwen3(tmp_path / "model")
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "checkpoint")]) == 0
    flags = ["--dtype", "bf16", "--shard-size", "40kB"]
    out = tmp_path / "out"
    assert main(["convert", "to-hf", str(tmp_path / "checkpoint"), str(out), *flags]) == 0
    files = sorted(out.glob("*.safetensors"))
    tensors = [tensor for path in files for tensor in load_file(path).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert len(files) > 3
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 40_000 for path in files)
    assert "peak memory 0." in told(capsys)
