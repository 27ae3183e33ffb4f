"""Whole runs that lose a server: the only one for good, and one of two while it samples."""

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from prefixrl_mcore.rollout.sglang.batch import Batch
from prefixrl_mcore.rollout.sglang.member import Member
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_run import TinyTask, metrics_of

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
    output = process.communicate(timeout=300)[0]

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


def kill_one_that_samples(run: Path, monkeypatch: pytest.MonkeyPatch, killed: list[str]) -> None:
    """Have a server of this process killed as soon as it was asked, once a step is done."""
    send = Batch._send

    def send_and_kill(batch: Batch, index: int, member: Member | None) -> None:
        send(batch, index, member)
        is_in_the_middle = 1 <= len(batch._done) <= 8 and len(metrics_of(run, "train")) >= 1
        if is_in_the_middle and not killed and member is batch.pool.members[0]:
            assert member.server is not None
            os.killpg(member.server.supervisor_pid, signal.SIGKILL)
            killed.append(member.name)

    monkeypatch.setattr(Batch, "_send", send_and_kill)


def test_one_of_two_servers_is_killed_while_it_samples_beside_an_update(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    killed: list[str] = []
    kill_one_that_samples(run, monkeypatch, killed)
    flags = (
        *("--overlap", "--rollout.engine", "sglang", "--rollout.sglang.num-servers", "2"),
        *("--rollout.sglang.python", str(sglang_python())),
        # One request at a time: a generation has eight rounds.
        *("--rollout.sglang.max-samples-per-server", "4", "--batch.prompts-per-step", "16"),
        *("--evaluation.every-steps", "1000", "--evaluation.max-problems", "1"),
        *("--checkpoint.every-steps", "1000"),
    )
    assert tiny_task.run("train", run, *flags) == 0
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
