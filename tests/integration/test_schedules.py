"""Over-sampling, partial rollouts, dynamic sampling and overlap in whole runs, and their resume."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from prefixrl_mcore.config.run import TIME_LIMIT_EXIT_CODE
from tests.support.tiny_run import TinyTask, metrics_of, without_clock

OVERSAMPLING = ("--rollout.schedule.oversampling", "1.5")
TRUNCATED = ("--loss.importance", "truncated")
PARTIAL = (
    *OVERSAMPLING,
    *TRUNCATED,
    *("--rollout.schedule.partial", "--rollout.schedule.max-staleness", "2"),
)
DYNAMIC = (*("--rollout.schedule.dynamic-sampling", "--rollout.schedule.max-rounds", "3"),)
OVERLAP = (
    *TRUNCATED,
    *("--rollout.schedule.overlap", "--rollout.schedule.max-staleness", "1"),
)
ALL = (
    *("--rollout.schedule.overlap", "--rollout.schedule.max-staleness", "3"),
    "--rollout.schedule.partial",
    *(*OVERSAMPLING, *DYNAMIC, *TRUNCATED),
)
NUM_STEPS = 4
TIMES = ("rollout/generation_seconds", "rollout/hidden_seconds")


def rollouts_of(run: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet").to_pylist()


def state_of(run: Path) -> dict[str, Any]:
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    (file,) = [path for path in checkpoint.glob("*.json") if '"source"' in path.read_text()]
    return json.loads(file.read_text())


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the steps' metrics without what depends on the machine's speed."""
    lines = without_clock(metrics_of(run, "train"))
    return [{name: line[name] for name in line if name not in TIMES} for line in lines]


def assert_resumed_equals_undisturbed(
    tiny_task: TinyTask, undisturbed: Path, resumed: Path, *flags: str
) -> None:
    # A time limit stops it after a step, as a signal would.
    stopped = tiny_task.run("train", resumed, *flags, "--trainer.max-seconds", "1")
    assert stopped == TIME_LIMIT_EXIT_CODE
    assert len(metrics_of(resumed, "train")) == 1
    assert tiny_task.run("train --resume", resumed, *flags) == 0
    assert steps_of(resumed) == steps_of(undisturbed)
    assert without_clock(metrics_of(resumed, "eval")) == without_clock(
        metrics_of(undisturbed, "eval")
    )
    for step in range(NUM_STEPS):
        assert rollouts_of(resumed, step) == rollouts_of(undisturbed, step)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(OVERSAMPLING, id="oversampling"),
        pytest.param(PARTIAL, id="partial"),
        pytest.param(DYNAMIC, id="dynamic"),
        pytest.param(OVERLAP, id="overlap"),
        pytest.param(ALL, id="all", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_undisturbed_one_whatever_the_schedule(
    tiny_task: TinyTask, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    undisturbed = tmp_path / "undisturbed"
    assert tiny_task.run("train", undisturbed, *flags) == 0
    assert_resumed_equals_undisturbed(tiny_task, undisturbed, tmp_path / "resumed", *flags)
