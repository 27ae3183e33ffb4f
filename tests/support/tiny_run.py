"""A whole run at the smallest scale: a two-part quiz that a briefly trained policy half knows."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixrl_mcore.cli import main
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.demo.settings import TaskConfig
from prefixrl_mcore.demo.task import build_task
from tests.support.signal_handlers import restored_stop_signals

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "demo" / "run.toml"

TASK = TaskConfig(
    num_parts=2,
    num_ops=1,
    sound_probability=0.3,
    base_steps=100,
    num_problems=8,
    num_held_out=8,
    screening_samples=1,
)


@dataclass(frozen=True, kw_only=True)
class TinyTask:
    """The folder with base policy and problems, and the flags that point a run at it."""

    folder: Path

    init: Path | None = None
    """What the run begins with, for ``--init``; None takes ``folder/base`` as ``model.path``."""

    def flags(self, run_folder: Path, *more: str) -> list[str]:
        """Return the flags of a short run in ``run_folder``."""
        model = (
            ("--model.path", self.folder / "base") if self.init is None else ("--init", self.init)
        )
        return [
            *("--run-folder", str(run_folder)),
            *map(str, model),
            *("--data.problems", str(self.folder / "train.jsonl")),
            *("--data.held-out.held-out", str(self.folder / "held_out.jsonl")),
            *("--data.traces", str(self.folder / "traces")),
            *("--data.prefixes", str(self.folder / "prefixes")),
            *("--rollout.engine", "transformers"),
            *("--batch.prompts-per-step", "4", "--batch.group-size", "4"),
            *("--batch.stream-tokens", "256", "--rollout.max-total-tokens", "64"),
            *("--rollout.max-completion-tokens", "32"),
            *("--trainer.num-steps", "4", "--trainer.rollouts-every-steps", "1"),
            *("--checkpoint.every-steps", "2", "--evaluation.every-steps", "2"),
            *("--evaluation.num-samples", "4", "--evaluation.training-num-samples", "2"),
            *("--evaluation.unlock-num-samples", "2", "--evaluation.train-set-num-samples", "4"),
            *more,
        ]

    def run(self, command: str, run_folder: Path, *more: str) -> int:
        """Run ``prefixrl COMMAND`` in this process; return the exit code."""
        name, *options = command.split()
        with restored_stop_signals():
            return main([name, str(CONFIG), *options, *self.flags(run_folder, *more)])

    def start(self, command: str, run_folder: Path, *more: str) -> "subprocess.Popen[str]":
        """Start ``prefixrl COMMAND`` in a process of its own, with its output in one pipe.

        It is ended with the test, if that has not seen to it.
        """
        return self.start_module(["prefixrl_mcore.cli", command, "my.toml"], run_folder, *more)

    def start_module(
        self, words: Sequence[str], run_folder: Path, *more: str
    ) -> "subprocess.Popen[str]":
        """Start ``python -m WORDS`` with a run's flags, like ``start``; my.toml is the config."""
        process = subprocess.Popen(
            [
                *(sys.executable, "-m"),
                *(str(CONFIG) if word == "my.toml" else word for word in words),
                *self.flags(run_folder, *more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
            start_new_session=True,
        )
        _started.append(process)
        return process


_started: list["subprocess.Popen[str]"] = []


def end_started_runs() -> None:
    """Kill the runs that a failed test has left, with all their ranks."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


_CHARGES = {
    *("flops/total", "flops/interrupted", "flops/num_interrupted_generations"),
    *("tokens/charged", "tokens/computed"),
}
"""What an interruption adds to: everything else is that of an undisturbed run."""


def metrics_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the whole lines of one kind of a run's metrics; none if there is no file yet."""
    if not (run / "metrics.jsonl").exists():
        return []
    # A running trainer may be in the middle of the last one.
    whole, _, _ = (run / "metrics.jsonl").read_text().rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if line["kind"] == kind]


def without_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what depends on the machine's speed."""
    return [
        {
            key: value
            for key, value in line.items()
            if not key.startswith(("time", "throughput/", "memory/", "balance/"))
            and not key.endswith(("_per_second", "seconds", "/step_fraction"))
        }
        for line in lines
    ]


def course_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return what a run wrote, without what depends on the clock or counts interruptions."""
    lines = without_clock(metrics_of(run, kind))
    return [{name: line[name] for name in line if name not in _CHARGES} for line in lines]


def build_tiny_task(folder: Path) -> TinyTask:
    """Train the base policy, choose problems, collect traces and cut prefixes in ``folder``."""
    tiny = TinyTask(folder=folder)
    config = load_config(RunConfig, CONFIG, tiny.flags(folder / "collect"))
    build_task(TASK, config, on_progress=lambda *_: None)
    assert tiny.run("collect", folder / "collect") == 0
    assert tiny.run("prefixes", folder / "collect") == 0
    return tiny
