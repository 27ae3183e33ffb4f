"""A training run whose device has no memory left, played by a schedule that says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from prefixrl_mcore.trainer.out_of_memory import TrainerMemoryError
from tests.support.tiny_run import TinyTask, metrics_of

_MESSAGE = "CUDA out of memory. Tried to allocate 20.00 GiB."


def _fail_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Megatron's schedule run out of memory when it is asked for the ``call``-th time."""
    num_calls = 0

    def get() -> Callable[..., Any]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise torch.OutOfMemoryError(_MESSAGE)
        return get_forward_backward_func()

    monkeypatch.setattr("prefixrl_mcore.policy.forward_backward.get_forward_backward_func", get)


def test_the_dry_run_step_runs_out_first(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(1, monkeypatch)
    with pytest.raises(TrainerMemoryError) as raised:
        tiny_task.run("train", tmp_path / "run", "--trainer.dry-run-step", "True")
    text = str(raised.value)
    assert text.startswith(
        f"out of memory on rank 0 in the dry-run step before step 0 (longest "
        f"sequences): {_MESSAGE}\n"
        "batch: 1 streams of 256 tokens over 1 data-parallel rank(s), 4 sequences, longest 64 "
        "tokens, at most 128 completion tokens in a stream\nmemory: "
    )
    assert "GiB predicted; peak of the process " in text
    assert "batch.stream_tokens = 64 (now 256" in text
    assert metrics_of(tmp_path / "run", "eval") == []


def test_the_dry_run_step_takes_both_batches(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(2, monkeypatch)
    with pytest.raises(TrainerMemoryError) as raised:
        tiny_task.run("train", tmp_path / "run", "--trainer.dry-run-step", "True")
    # 33 tokens, 8 x 25 (at least 0.75 x 33), and the rest of 256; one token of each is context.
    text = str(raised.value)
    assert "in the dry-run step before step 0 (most trained tokens): " in text
    assert "10 sequences, longest 33 tokens, at most 246 completion tokens" in text


def test_a_supervised_step_says_that_it_is_one(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(3, monkeypatch)  # the first was the validation loss
    flags = ("--method", "sft_then_rl", "--sft.validation-fraction", "0.25")
    flags += ("--sft.traces-per-step", "4")
    with pytest.raises(TrainerMemoryError, match="in supervised step 1, phase forward_backward"):
        tiny_task.run("train", tmp_path / "run", *flags)


def test_an_evaluation_says_that_it_is_one(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_settings: object) -> None:
        raise torch.OutOfMemoryError(_MESSAGE)

    monkeypatch.setattr("prefixrl_mcore.trainer.session.evaluate_in_training", fail)
    with pytest.raises(TrainerMemoryError) as raised:
        tiny_task.run("train", tmp_path / "run")
    assert str(raised.value).startswith("out of memory on rank 0 in the start, phase eval: ")
    assert "rollout.transformers.max_batch_size below" in str(raised.value)


def test_a_later_step_says_which(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_at(2, monkeypatch)
    with pytest.raises(TrainerMemoryError) as raised:
        tiny_task.run("train", tmp_path / "run")
    text = str(raised.value)
    assert text.startswith(f"out of memory on rank 0 in step 1, phase forward_backward: {_MESSAGE}")
    assert "policy.recompute" in text
    assert len(metrics_of(tmp_path / "run", "train")) == 1
