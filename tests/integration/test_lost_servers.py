"""A whole run that loses its only server for good."""

import contextlib
import time
from pathlib import Path

import psutil
import pytest

from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_run import TinyTask, metrics_of


@pytest.mark.slow
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
