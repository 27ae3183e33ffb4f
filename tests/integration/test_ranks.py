"""``prefixrl train`` on two data-parallel ranks that it starts itself, or torchrun on two nodes."""

import re
import signal
import time
from pathlib import Path
from subprocess import Popen

import pytest

from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from tests.support.ports import free_port
from tests.support.tiny_run import ROOT, TinyTask, metrics_of

TWO_RANKS = ("--policy.parallel.data-parallel-size", "2")
SAME = ("loss/policy_gradient", "policy/gradient_norm", "rollout/reward_mean")

pytestmark = pytest.mark.slow


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


def _start_nodes(tiny_task: TinyTask, run: Path, *flags: str) -> list["Popen[str]"]:
    """Start what the page shows for two nodes, on this machine and with one rank each."""
    lines = re.findall(
        r"^ {4}(torchrun .*)", (ROOT / "docs/first_run.md").read_text(), re.MULTILINE
    )
    here = {"torchrun": "torch.distributed.run", "node0": "127.0.0.1", "29500": str(free_port())}
    here["8"] = "1"  # ranks of a node
    words = [[here.get(word, word) for word in line.split()] for line in lines]
    return [tiny_task.start_module(line, run, *flags, *TWO_RANKS) for line in words]


def test_two_ranks_train_like_one_and_so_do_two_nodes(tiny_task: TinyTask, tmp_path: Path) -> None:
    flags = ("--trainer.num-steps", "2")
    runs = {
        "one": lambda run: [tiny_task.start("train", run, *flags)],
        "two": lambda run: [tiny_task.start("train", run, *flags, *TWO_RANKS)],
        "nodes": lambda run: _start_nodes(tiny_task, run, *flags),
    }
    for name, start in runs.items():
        processes = start(tmp_path / name)
        try:
            outputs = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:  # torchrun's ranks are in sessions of their own
                process.terminate()
                process.wait(timeout=60)
        assert [process.returncode for process in processes] == [0] * len(processes), outputs
    one, two, nodes = (metrics_of(tmp_path / name, "train") for name in runs)
    assert [line["step"] for line in one] == [0, 1]
    for expected, *others in zip(one, two, nodes, strict=True):
        for got in others:
            assert got["step"] == expected["step"]
            for name in SAME:
                assert got[name] == pytest.approx(expected[name], rel=1e-4), name
    assert any(line["policy/gradient_norm"] > 0 for line in one)
    assert (tmp_path / "two" / "logs" / "rank-1.log").exists()
    assert sorted(path.name for path in (tmp_path / "nodes" / "heartbeats").glob("*.json")) == [
        "rank-00000.json",
        "rank-00001.json",
    ]


def test_sigterm_stops_all_ranks_after_the_step(tiny_task: TinyTask, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    process = tiny_task.start("train", run, "--trainer.num-steps", "1000", *TWO_RANKS)
    deadline = time.monotonic() + 300
    while not metrics_of(run, "train"):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(_processes_of(run)) >= 3  # the launcher and two ranks
    process.terminate()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step-{len(metrics_of(run, 'train')):06d}"
    assert _processes_of(run) == []


def test_bad_input_is_told_once(tiny_task: TinyTask, tmp_path: Path) -> None:
    missing = ("--data.problems", str(tmp_path / "missing.jsonl"))
    process = tiny_task.start("train", tmp_path / "bad", *missing, *TWO_RANKS)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    assert output.count("error:") == 1, output
    assert "missing.jsonl" in output.replace("\n", "")
    assert _processes_of(tmp_path / "bad") == []
