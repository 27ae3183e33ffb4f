"""Whole runs that lose a server: the only one for good, and one of two while it samples."""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from prefixrl_mcore.rollout.sglang.batch import Batch
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_run import TinyTask, metrics_of
from tests.support.waiting import beside

pytestmark = pytest.mark.slow


def test_run_that_lost_its_only_server_saves_its_step_and_resumes(
    tiny_task: TinyTask, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = (
        *("--rollout.engine", "sglang", "--rollout.sglang.python", str(sglang_python())),
        *("--rollout.sglang.max-restarts", "0", "--checkpoint.every-steps", "1000"),
        *("--evaluation.every-steps", "1000"),
    )
    process = tiny_task.start("train", run, *flags, "--trainer.num-steps", "1000")
    deadline = time.monotonic() + 300
    while len(metrics_of(run, "train")) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that ends by itself
            if "launcher/serve.py" in " ".join(child.cmdline()):
                child.kill()
    output = process.communicate(timeout=120)[0]

    assert process.returncode == 1, output
    assert output.count("1 of 1 servers are dead") == 1, output
    lines = metrics_of(run, "train")
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step-{len(lines):06d}"

    num_steps = str(len(lines) + 1)
    process = tiny_task.start("train", run, "--resume", *flags, "--trainer.num-steps", num_steps)
    output = process.communicate(timeout=300)[0]

    assert process.returncode == 0, output
    after = metrics_of(run, "train")
    assert after[: len(lines)] == lines
    assert [line["step"] for line in after] == list(range(len(lines) + 1))


def kill_one_that_samples(run: Path, killed: list[str], is_over: threading.Event) -> None:
    """Kill a server of this process in the middle of a generation, once a step is done."""
    while not is_over.wait(0.005):
        batch = batch_under_way() if len(metrics_of(run, "train")) == 1 else None
        if batch is None or not 1 <= len(batch._done) <= 8:
            continue
        member = batch.pool.members[0]
        started = [ticket.sent for ticket in batch._in_flight.tickets if ticket.member is member]
        if not started or time.monotonic() - min(started) > 0.02:
            continue  # only one that has just been sent is surely not answered yet
        assert member.server is not None
        os.killpg(member.server.supervisor_pid, signal.SIGKILL)
        killed.append(member.name)
        return


def batch_under_way() -> Batch | None:
    """Return the batch that a thread of this process is sampling."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is Batch.run.__code__:
                return frame.f_locals["self"]
            frame = frame.f_back
    return None


def test_one_of_two_servers_is_killed_while_it_samples_beside_an_update(
    tiny_task: TinyTask, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed: list[str] = []
    flags = (
        *("--overlap", "--rollout.engine", "sglang", "--rollout.sglang.num-servers", "2"),
        *("--rollout.sglang.python", str(sglang_python())),
        # One request at a time: a generation has eight rounds.
        *("--rollout.sglang.max-samples-per-server", "4", "--batch.prompts-per-step", "16"),
        *("--evaluation.every-steps", "1000", "--evaluation.max-problems", "1"),
        *("--checkpoint.every-steps", "1000"),
    )
    with beside(partial(kill_one_that_samples, run, killed)):
        code = tiny_task.run("train", run, *flags)

    assert code == 0
    assert killed == ["server 0"]
    lines = metrics_of(run, "train")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert sum(line["engine/num_server_deaths"] for line in lines) == 1
    assert sum(line["engine/num_reissued_requests"] for line in lines) >= 1
    # The first step has its own weights; an update that was skipped has made nothing older.
    assert lines[0]["rollout/staleness_max"] == 0.0
    for before, line in itertools.pairwise(lines):
        stale = 1.0 - before["policy/was_skipped"]
        assert line["rollout/staleness_mean"] == line["rollout/staleness_max"] == stale
    for step in range(4):
        rows = pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
        assert len(rows) == 16 * 4
        assert all(row["completion_token_ids"] for row in rows)
