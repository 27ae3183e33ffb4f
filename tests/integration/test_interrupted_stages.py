"""Evaluations and collections that are killed in the middle, and what their next start does."""

import contextlib
import json
import logging
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.data.trace_schema import AttemptRecord, TraceRecord
from prefixrl_mcore.data.traces import TraceStore
from tests.support.tiny_run import TinyTask

pytestmark = pytest.mark.slow

ONE_BY_ONE = ("--rollout.transformers.max-batch-size", "1")  # so that a kill finds some done
EVALUATION = (
    *ONE_BY_ONE,
    *("--evaluation.num-samples", "8", "--evaluation.train-set-num-samples", "8"),
    *("--evaluation.keep-seconds", "0"),
    *("--evaluation.prefix-bins", "0.0", "0.5", "--evaluation.unlock-fractions", "0.5"),
)
COLLECTION = (*ONE_BY_ONE, "--collect.tries-per-round", "4", "--collect.max-tries", "10")


def killed_when_begun(
    tiny_task: TinyTask, command: str, run: Path, flags: tuple[str, ...], *, file: Path, number: int
) -> int:
    """Run a command in a process, and signal it when it has written some lines of a file.

    Args:
        tiny_task: the task.
        command: the command.
        run: its run folder.
        flags: settings.
        file: appears while the command works; if it has lines, three of them are waited for.
        number: the signal.

    Returns:
        The exit code.
    """
    process = tiny_task.start(command, run, *flags)
    try:
        deadline = time.monotonic() + 300
        while not has_begun(file):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
        return process.returncode
    finally:
        process.kill()


def has_begun(file: Path) -> bool:
    """Return whether a folder is there, or a file with three lines."""
    if file.is_file():
        with contextlib.suppress(FileNotFoundError):  # of a part that is finished meanwhile
            return file.read_bytes().count(b"\n") >= 3
    return file.is_dir()


@pytest.fixture(scope="module")
def evaluated(tiny_task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of an evaluation that nobody disturbed."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    assert tiny_task.run("eval --checkpoint base", run, *EVALUATION) == 0
    return json.loads((run / "eval" / "base.json").read_text())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGUSR1, 138)], ids=["kill", "usr1"]
)
def test_an_evaluation_goes_on_inside_the_part(
    tiny_task: TinyTask,
    evaluated: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    number: int,
    code: int,
) -> None:
    run = tmp_path / "run"
    part = run / "eval" / "base.part.jsonl"
    flags = ("--checkpoint", "base", *EVALUATION)
    assert killed_when_begun(tiny_task, "eval", run, flags, file=part, number=number) == code
    left = part.read_bytes()
    assert left.endswith(b"\n")
    num_done = left.count(b"\n") - 1  # the first line says of what they are
    assert 2 <= num_done <= 8
    label = json.loads(left.split(b"\n")[0])["part"]
    progress = json.loads((run / "progress-eval-base.json").read_text())
    assert progress["total"] == 2 * 8 * 8 + 3 * 8 * 2  # two sets; two bins and one fraction
    if number == signal.SIGKILL:
        part.write_bytes(left + b'{"index": 7, "num_')  # as a kill within a write leaves it
    else:
        assert progress["completed"] >= 8 * (num_done - 1)  # shown after it is on disk
        assert progress["waiting_for"] == "stopped"

    with caplog.at_level(logging.INFO, logger="prefixrl_mcore"):
        assert tiny_task.run("eval --checkpoint base", run, *EVALUATION) == 0
    assert f"continuing part {label}, {num_done} of 8 problems are done" in caplog.text
    assert ("half-written" in caplog.text) == (number == signal.SIGKILL)
    assert json.loads((run / "eval" / "base.json").read_text()) == evaluated
    assert not part.exists()
    progress = json.loads((run / "progress-eval-base.json").read_text())
    assert progress["completed"] == progress["total"]


Found = tuple[dict[str, AttemptRecord], dict[str, TraceRecord]]


def found_in(traces: Path) -> Found:
    """Return what was spent on each problem and its trace, without seconds."""
    store = TraceStore.open(traces)
    attempts = {one.problem_id: replace(one, seconds=0.0) for one in store.attempts()}
    return attempts, {one.problem_id: replace(one, seconds=0.0) for one in store.traces()}


@pytest.fixture(scope="module")
def collected(tiny_task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What a collection finds that nobody disturbed."""
    folder = tmp_path_factory.mktemp("collected")
    flags = (*COLLECTION, "--data.traces", str(folder / "traces"))
    assert tiny_task.run("collect", folder / "run", *flags) == 0
    assert len(list((folder / "traces").glob("part-*"))) <= 3  # one for each round, of 4, 4, 2
    return found_in(folder / "traces")


def test_a_collection_goes_on_inside_the_round(
    tiny_task: TinyTask, collected: Found, tmp_path: Path
) -> None:
    run, traces = tmp_path / "run", tmp_path / "traces"
    flags = (*COLLECTION, "--data.traces", str(traces), "--collect.keep-seconds", "0")
    third = traces / "part-000002"
    code = killed_when_begun(tiny_task, "collect", run, flags, file=third, number=signal.SIGTERM)
    assert code == 143
    attempts, _ = found_in(traces)
    assert 3 <= len(attempts) < 8  # in the first round
    assert {attempt.num_tries for attempt in attempts.values()} == {4}
    assert tiny_task.run("collect", run, *flags) == 0
    assert found_in(traces) == collected  # tries and FLOPs, too: nothing is charged twice
    attempts, traces_found = collected
    assert {one.num_tries for one in attempts.values() if not one.is_solved} <= {10}
    assert len(traces_found) == sum(one.is_solved for one in attempts.values()) >= 1
