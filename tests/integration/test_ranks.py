"""``prefixrl train`` that starts two data-parallel ranks itself."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from tests.support.tiny_run import TinyTask

TWO_RANKS = ("--policy.parallel.data-parallel-size", "2")
SAME = ("loss/policy_gradient", "policy/gradient_norm", "rollout/reward_mean")

pytestmark = pytest.mark.slow


def _train_lines(run: Path) -> list[dict[str, Any]]:
    if not (run / "metrics.jsonl").exists():
        return []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def _processes_of(run: Path) -> list[str]:
    """Return the command lines of the processes that were given the run folder."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if str(run) in command:
            found.append(" ".join(command))
    return found


def test_two_ranks_train_like_one(tiny_task: TinyTask, tmp_path: Path) -> None:
    flags = ("--trainer.num-steps", "2")
    runs = {"one": (), "two": TWO_RANKS}
    for name, more in runs.items():
        process = tiny_task.start("train", tmp_path / name, *flags, *more)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    one, two = (_train_lines(tmp_path / name) for name in runs)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 1]
    for expected, got in zip(one, two, strict=True):
        for name in SAME:
            assert got[name] == pytest.approx(expected[name], rel=1e-4), name
    assert any(line["policy/gradient_norm"] > 0 for line in one)
    assert (tmp_path / "two" / "logs" / "rank-1.log").exists()


def test_sigterm_stops_all_ranks_after_the_step(tiny_task: TinyTask, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    process = tiny_task.start("train", run, "--trainer.num-steps", "1000", *TWO_RANKS)
    deadline = time.monotonic() + 300
    while not _train_lines(run):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(_processes_of(run)) >= 3  # the launcher and two ranks
    process.terminate()
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step-{len(_train_lines(run)):06d}"
    assert _processes_of(run) == []


def test_bad_input_is_told_once(tiny_task: TinyTask, tmp_path: Path) -> None:
    missing = ("--data.problems", str(tmp_path / "missing.jsonl"))
    process = tiny_task.start("train", tmp_path / "bad", *missing, *TWO_RANKS)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    assert output.count("error:") == 1, output
    assert "missing.jsonl" in output.replace("\n", "")
    assert _processes_of(tmp_path / "bad") == []
