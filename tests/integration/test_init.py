"""``prefixrl train --init``: a Hugging Face folder or a checkpoint as the initial model."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.hf_writer import write_hf_folder
from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf, convert_to_hf
from prefixrl_mcore.checkpoint.run_checkpoints import latest_checkpoint
from prefixrl_mcore.cli import main
from tests.support.policies import max_difference
from tests.support.tiny_run import CONFIG, TinyTask
from tests.support.weights import HeldWeights, weights_in

NO_LEARNING = ("--policy.optimizer.lr", "1e-30", "--method", "rl", "--trainer.num-steps", "1")


def train(task: TinyTask, run: Path, init: Path, *more: str) -> int:
    return replace(task, init=init).run("train", run, *NO_LEARNING, *more)


@pytest.fixture
def other(tiny_task: TinyTask, tmp_path: Path) -> Path:
    """A model of the shape of the base policy with weights of its own."""
    base = tiny_task.folder / "base"
    weights = {name: tensor * 1.25 for name, tensor in weights_in(base).items()}
    write_hf_folder(HeldWeights(weights), base, tmp_path / "other")
    return tmp_path / "other"


def trained_weights(run: Path, out: Path) -> dict[str, Tensor]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    convert_to_hf(checkpoint, out)
    return weights_in(out)


def test_training_begins_with_the_weights_of_a_folder(
    tiny_task: TinyTask, other: Path, tmp_path: Path
) -> None:
    assert train(tiny_task, tmp_path / "run", other) == 0
    weights = trained_weights(tmp_path / "run", tmp_path / "out")
    assert max_difference(weights, weights_in(other)) == 0.0
    assert not (tmp_path / "run" / "model").exists()


def test_training_begins_with_the_weights_of_a_checkpoint_and_resumes(
    tiny_task: TinyTask,
    other: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    convert_from_hf(other, tmp_path / "checkpoint")
    assert train(tiny_task, tmp_path / "run", tmp_path / "checkpoint") == 0
    weights = trained_weights(tmp_path / "run", tmp_path / "out")
    assert max_difference(weights, weights_in(other)) == 0.0
    tokenizer = (tmp_path / "run" / "model" / "tokenizer.json").read_bytes()
    assert tokenizer == (other / "tokenizer.json").read_bytes()

    more = ("--resume", "--trainer.num-steps", "2")
    assert train(tiny_task, tmp_path / "run", tmp_path / "checkpoint", *more) == 0
    convert_from_hf(tiny_task.folder / "base", tmp_path / "base")
    assert train(tiny_task, tmp_path / "run", tmp_path / "base", *more) == 2
    assert "was made of" in " ".join(capsys.readouterr().err.split())


def test_two_ways_to_say_it_at_once_are_refused(
    tiny_task: TinyTask, other: Path, tmp_path: Path
) -> None:
    flags = tiny_task.flags(tmp_path / "run", *NO_LEARNING)
    assert main(["train", str(CONFIG), "--init", str(other), *flags]) == 2
    assert not (tmp_path / "run").exists()


def test_what_is_no_model_is_named_before_anything_is_written(
    tiny_task: TinyTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_task, tmp_path / "run", tmp_path / "nowhere") == 2
    assert "nowhere: no such checkpoint folder" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
