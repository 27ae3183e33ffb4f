"""What a rollout task does when its server dies, or cannot be started again."""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.launch.slurm import rollout_task
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskFile
from prefixrl_mcore.launch.slurm.rank_environment import server_port
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.server import SGLangServer

ENVIRONMENT = {
    "SLURM_JOB_ID": "1234",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURMD_NODENAME": "node-b",
}
CONFIG = Path(__file__).parents[3] / "configs" / "demo" / "run.toml"

Serve = Callable[[Iterator[Exception | None]], int]
"""Runs a task with what comes of each start of its server: an error, or it serves and dies."""


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What is set when the task is told to end."""
    told = threading.Event()
    monkeypatch.setattr(rollout_task, "_told_to_end", lambda: told)
    monkeypatch.setattr(rollout_task, "_POLL_SECONDS", 0.05)
    return told


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: threading.Event) -> Serve:
    url = f"http://node-b:{server_port('1234', 0)}"
    server = SimpleNamespace(
        client=SimpleNamespace(url=url),
        is_alive=False,
        cause_of_death=lambda: "killed",
        log_tail=lambda: "end of its log",
        stop=lambda: None,
    )
    task = TaskFile(
        config=str(CONFIG),
        run_folder="r",
        working_directory="/",
        is_resumed=False,
        num_servers=1,
        gpus_per_server=0,
    )
    folder = JobFolder.make(tmp_path, "job")
    folder.server_file(0, 0).parent.mkdir(parents=True, exist_ok=True)

    def run(outcomes: Iterator[Exception | None]) -> int:
        def start(*_args: object, **_settings: object) -> Any:
            error = next(outcomes)
            if error is not None:
                raise error
            return server

        monkeypatch.setattr(SGLangServer, "start", start)
        return rollout_task.serve(folder, task, ENVIRONMENT)

    return run


def test_start_again_after_one_in_vain_comes_after_a_pause(
    serve: Serve, ending: threading.Event
) -> None:
    times: list[float] = []

    def outcomes() -> Iterator[Exception | None]:
        yield None
        times.append(time.monotonic())
        yield EngineError("died while it started")
        times.append(time.monotonic())
        ending.set()
        yield EngineError("no longer wanted")

    assert serve(outcomes()) == 0
    assert 0.5 < times[1] - times[0] < 9.0  # a second, from a moment before the first of them


def test_task_that_is_told_to_end_does_not_wait_for_the_end_of_a_pause(
    serve: Serve, ending: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixrl_mcore.rollout.sglang.restarts._PAUSES_SECONDS", (60.0,))
    timer = threading.Timer(0.3, ending.set)
    timer.start()
    started = time.monotonic()

    assert serve(iter([None, EngineError("died while it started")])) == 0
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "error",
    [EngineError("died while it started"), OSError(errno.ENOMEM, "Cannot allocate memory")],
)
def test_server_that_cannot_be_started_again_sends_the_job_back_into_the_queue(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    monkeypatch.setattr("prefixrl_mcore.rollout.sglang.restarts._PAUSES_SECONDS", (0.0,))

    assert serve(iter([None, error, error, error])) == exit_codes.TIME_LIMIT
    assert caplog.text.count(f"rollout server 0: {error}") == 3


def test_server_that_does_not_come_up_at_first_is_a_failure(serve: Serve) -> None:
    assert serve(iter([OSError(errno.ENOSPC, "No space left on device")])) == 1
