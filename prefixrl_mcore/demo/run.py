"""``prefixrl demo``: every stage of PrefixRL and its baselines, as a user would start them.

Each stage is a ``prefixrl`` command in a process of its own, so the demo proves the commands and
not a shortcut around them. Stages that are done are not run again.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from prefixrl_mcore.config.base import ConfigError, read_toml, validate
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.demo.display import DemoDisplay, StageState, clock
from prefixrl_mcore.demo.settings import TaskConfig
from prefixrl_mcore.demo.task import build_task
from prefixrl_mcore.eval.command import progress_file
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.report.figures import plot_headline
from prefixrl_mcore.report.html import build_report
from prefixrl_mcore.report.summary import fallback_lines, write_summary

METHODS = ("prefixrl", "rl", "sft_then_rl")
"""Runs of the demo, in the order in which they are started."""

_POLL_SECONDS = 0.25
_MAX_PARALLEL = 2


class StageFailedError(RuntimeError):
    """A stage's command failed; the message shows the end of its log."""


class Demo:
    """The demo's folder, its stages and what they have written so far."""

    def __init__(
        self, folder: Path, *, run_file: Path, task: TaskConfig, engine: str | None
    ) -> None:
        """Prepare the stages; nothing is run yet."""
        self.folder = folder
        self.task = task
        self._run_file = run_file
        self._flags = [] if engine is None else ["--rollout.engine", engine]
        if torch.cuda.is_available():  # there may be one GPU only
            self._flags.append("--rollout.colocated")
        self.config = load_config(RunConfig, run_file, self._paths("prefixrl"))
        self._done_file = folder / "stages.json"
        self._seconds: dict[str, float] = {}
        if self._done_file.exists():
            self._seconds = json.loads(self._done_file.read_text())
        self.stages = {name: StageState(title=title) for name, title in _titles().items()}
        for name, stage in self.stages.items():
            if name in self._seconds:
                stage.state, stage.seconds = "done", self._seconds[name]

    @property
    def seconds_per_stage(self) -> dict[str, float]:
        """Wall time of each finished stage, process start included."""
        return dict(self._seconds)

    def run_folder(self, method: str) -> Path:
        """Return the run folder of one method."""
        return self.folder / method

    def make_task(self, display: DemoDisplay) -> None:
        """Train the base policy and choose the problems, in this process."""
        stage = self.stages["task"]
        if stage.state == "done":
            return
        self._begin(stage)

        def on_progress(what: str, completed: int, total: int) -> None:
            stage.detail, stage.completed, stage.total = what, completed, total
            display.refresh()

        build_task(self.task, self.config, on_progress=on_progress)
        self._finish("task", stage)

    def run_commands(
        self, display: DemoDisplay, commands: dict[str, tuple[str, list[str]]]
    ) -> None:
        """Run commands, two at a time, in order; those that are done are left out.

        Args:
            display: shown while they run.
            commands: stage name → (method whose run folder it works in, command with flags).

        Raises:
            StageFailedError: if one fails; the others are stopped first.
        """
        waiting = [name for name in commands if self.stages[name].state != "done"]
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < _MAX_PARALLEL:
                    name = waiting.pop(0)
                    running[name] = self._start(name, *commands[name])
                for name, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    self._end(name, process.returncode)
                display.refresh()
                time.sleep(_POLL_SECONDS)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()

    def _start(self, name: str, method: str, command: list[str]) -> "subprocess.Popen[bytes]":
        """Start one command with its log in the demo's folder."""
        stage = self.stages[name]
        run_folder = self.run_folder(method)
        stage.progress_file = _progress_file(run_folder, command)
        arguments = [command[0], str(self._run_file), *command[1:], *self._paths(method)]
        if command[0] == "train" and (run_folder / "metrics.jsonl").exists():
            arguments.append("--resume")
        log = self._log_file(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._begin(stage)
        with log.open("ab") as file:
            full = [sys.executable, "-m", "prefixrl_mcore.cli", *arguments]
            file.write(f"$ {shlex.join(full)}\n".encode())
            file.flush()
            return subprocess.Popen(
                full, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def _end(self, name: str, code: int) -> None:
        """Record the end of a command.

        Raises:
            StageFailedError: if it failed.
        """
        stage = self.stages[name]
        if code == 0:
            stage.refresh()
            self._finish(name, stage)
            return
        stage.state = "failed"
        log = self._log_file(name)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise StageFailedError(f"{stage.title} failed with exit code {code}; {log} ends:\n{tail}")

    def _log_file(self, name: str) -> Path:
        """Return the file that a command's output goes to."""
        return self.folder / "logs" / f"{name}.log"

    def _begin(self, stage: StageState) -> None:
        """Mark a stage as running."""
        stage.state, stage.started = "running", time.time()

    def _finish(self, name: str, stage: StageState) -> None:
        """Mark a stage as done, and remember it for the next start."""
        stage.state, stage.eta_seconds = "done", None
        stage.seconds = time.time() - stage.started
        self._seconds[name] = stage.seconds
        write_json_atomic(self._done_file, self._seconds)

    def _paths(self, method: str) -> list[str]:
        """Return the flags that place a run in the demo's folder."""
        folder = self.folder
        return [
            *("--run-folder", str(self.run_folder(method)), "--method", method),
            *("--model.path", str(folder / "base")),
            *("--data.problems", str(folder / "task" / "train.jsonl")),
            *("--data.held-out.held-out", str(folder / "task" / "held_out.jsonl")),
            *("--data.traces", str(folder / "prefixrl" / "traces")),
            *("--data.prefixes", str(folder / "prefixrl" / "prefixes")),
            *self._flags,
        ]


def _progress_file(run_folder: Path, command: Sequence[str]) -> Path:
    """Return where a command writes its progress."""
    if command[0] == "eval":
        return progress_file(run_folder, "base" if "base" in command else "latest")
    return run_folder / ("progress-collect.json" if command[0] == "collect" else "progress.json")


def _titles() -> dict[str, str]:
    """Return stage name → what the table calls it, in order."""
    titles = {
        "task": "base policy, hard problems",
        "collect": "collect traces",
        "prefixes": "cut prefixes",
    }
    titles |= {f"train-{method}": f"train {method}" for method in METHODS}
    titles |= {"eval-base": "evaluate base policy"}
    titles |= {f"eval-{method}": f"evaluate {method}" for method in METHODS}
    return titles


def run_demo(folder: Path, *, folder_of_configs: Path, fresh: bool, engine: str | None) -> int:
    """Run the demo in ``folder``, print where report and picture are; return the exit code.

    Args:
        folder: everything is written here; an interrupted demo continues.
        folder_of_configs: holds ``run.toml`` and ``task.toml``.
        fresh: delete the folder first.
        engine: rollout engine; None takes SGLang where it starts.
    """
    console = Console(stderr=True)
    start = time.time()
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    task_file, run_file = folder_of_configs / "task.toml", folder_of_configs / "run.toml"
    task = validate(TaskConfig, read_toml(task_file), where=str(task_file))
    _check_same_demo(folder, task, run_file)
    demo = Demo(folder, run_file=run_file, task=task, engine=engine)
    try:
        with DemoDisplay(console, demo.stages) as display:
            demo.make_task(display)
            for commands in _plan():
                demo.run_commands(display, commands)
    except StageFailedError as error:
        console.print(f"error: {error}", style="bold red", markup=False, highlight=False)
        return 1
    runs = [demo.run_folder(method) for method in METHODS]
    report = build_report(runs, folder / "report.html")
    summary = write_summary(runs, folder / "summary.json", seconds_per_stage=demo.seconds_per_stage)
    picture = plot_headline(runs, folder / "demo.png")
    for line in fallback_lines(runs):
        console.print(line, style="yellow", markup=False, highlight=False)
    console.print(f"\ndone in {clock(time.time() - start)}", highlight=False)
    paths = (
        f"summary: {summary.resolve()}\npicture: {picture.resolve()}\nreport:  {report.resolve()}"
    )
    Console().print(paths, highlight=False, soft_wrap=True)  # a path is to be copied
    return 0


def _plan() -> Sequence[dict[str, tuple[str, list[str]]]]:
    """Return the commands by phase; those of one phase may run side by side."""
    return (
        {"collect": ("prefixrl", ["collect"])},
        {"prefixes": ("prefixrl", ["prefixes"])},
        {f"train-{method}": (method, ["train"]) for method in METHODS}
        | {"eval-base": ("prefixrl", ["eval", "--checkpoint", "base"])},
        {f"eval-{method}": (method, ["eval"]) for method in METHODS},
    )


def _check_same_demo(folder: Path, task: TaskConfig, run_file: Path) -> None:
    """Remember the settings of a new folder; refuse a folder of other settings.

    Raises:
        ConfigError: naming the remedy.
    """
    file = folder / "demo.json"
    values = {"task": json.loads(task.model_dump_json()), "run": read_toml(run_file)}
    if not file.exists():
        write_json_atomic(file, values)
    elif json.loads(file.read_text()) != values:
        raise ConfigError(
            f"{folder}: holds a demo with other settings than {run_file.parent} has now; "
            "start with --fresh or choose another --folder"
        )
