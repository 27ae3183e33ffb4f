"""Over-sampling, partial rollouts, dynamic sampling and overlap in whole runs, and their resume."""

import itertools
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prefixrl_mcore.accounting.parameters import count_parameters
from prefixrl_mcore.checkpoint.save_load import latest_checkpoint
from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.policy.nonfinite import NonFiniteError
from prefixrl_mcore.trainer.rollout_supply import OVERLAP_METRICS
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_run import TinyTask, metrics_of, without_clock

OVERSAMPLING = ("--rollout.schedule.oversampling", "1.5")
PARTIAL = (
    *OVERSAMPLING,
    *("--loss.importance", "truncated", "--rollout.schedule.partial"),
    *("--rollout.schedule.max-staleness", "2"),
)
DYNAMIC = ("--rollout.schedule.dynamic-sampling", "--rollout.schedule.max-rounds", "3")
OVERLAP = ("--overlap",)
ALL = (*OVERLAP, *PARTIAL, *DYNAMIC, "--rollout.schedule.max-staleness", "3")
NUM_STEPS = 4

Lines = list[dict[str, Any]]


def rollouts_of(run: Path, step: int) -> Lines:
    return pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet").to_pylist()


def steps_of(run: Path) -> Lines:
    """Return the steps' metrics without what depends on the machine's speed."""
    lines = without_clock(metrics_of(run, "train"))
    return [{name: line[name] for name in line if name not in OVERLAP_METRICS} for line in lines]


def assert_groups_are_aborted(run: Path, lines: Lines) -> None:
    for line in lines:
        assert line["rollout/num_begun_groups"] == 6.0  # 1.5 times 4
        assert line["rollout/num_aborted_groups"] == 2.0
    assert sum(line["rollout/discarded_tokens"] for line in lines) > 0
    assert {line["rollout/staleness_max"] for line in lines} == {0.0}


def assert_groups_are_carried(run: Path, lines: Lines) -> None:
    num_continued = 0
    for line in lines:
        rows = rollouts_of(run, line["step"])
        version = int(line["policy/version"] - 1 + line["policy/was_skipped"])
        spans = [span for row in rows if not row["is_dropped"] for span in row["version_spans"]]
        ages = [version - span["policy_version"] for span in spans]
        lengths = [span["num_tokens"] for span in spans]
        total = sum(age * length for age, length in zip(ages, lengths, strict=True))
        assert line["rollout/staleness_max"] == max(ages)
        assert line["rollout/staleness_mean"] == pytest.approx(total / sum(lengths))
        for row in rows:
            assert sum(span["num_tokens"] for span in row["version_spans"]) == len(
                row["completion_token_ids"]
            )
            assert len(row["rollout_logprobs"]) == len(row["completion_token_ids"]) <= 32
            num_continued += len(row["version_spans"]) > 1
    assert num_continued > 0
    assert max(line["rollout/staleness_max"] for line in lines) >= 1


def assert_groups_are_replaced(run: Path, lines: Lines) -> None:
    num_parameters = count_parameters(run / "base")
    flops = 0.0
    for line in lines:
        rows = rollouts_of(run, line["step"])
        dropped = [row for row in rows if row["is_dropped"]]
        assert len(rows) - len(dropped) == 16
        assert len(dropped) == 4 * line["rollout/num_dropped_groups"]
        assert {row["advantage"] for row in dropped} <= {0.0}
        parts = ("prompt_token_ids", "prefix_token_ids", "completion_token_ids")
        flops += 2 * num_parameters * sum(len(row[part]) for row in rows for part in parts)
        assert line["flops/sampling"] == pytest.approx(flops, rel=1e-12)
        rewards = [row["reward"] for row in rows]
        assert line["rollout/reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert sum(line["rollout/num_dropped_groups"] for line in lines) > 0


def assert_steps_are_one_update_old(run: Path, lines: Lines) -> None:
    # An update that was skipped has made nothing older; the first step has its own weights.
    assert lines[0]["rollout/staleness_max"] == 0.0
    for before, line in itertools.pairwise(lines):
        assert line["rollout/staleness_mean"] == 1.0 - before["policy/was_skipped"]
    for line in metrics_of(run, "train"):
        seconds, hidden = (line[name] for name in OVERLAP_METRICS)
        assert 0 <= hidden <= seconds
        assert line["time/verify_seconds"] == 0
    assert sum(line[OVERLAP_METRICS[1]] for line in metrics_of(run, "train")) > 0


@pytest.mark.parametrize(
    ("flags", "check"),
    [
        pytest.param(OVERSAMPLING, assert_groups_are_aborted, id="oversampling"),
        pytest.param(PARTIAL, assert_groups_are_carried, id="partial"),
        pytest.param(DYNAMIC, assert_groups_are_replaced, id="dynamic"),
        pytest.param(OVERLAP, assert_steps_are_one_update_old, id="overlap"),
        pytest.param(ALL, assert_groups_are_carried, id="all"),
    ],
)
@pytest.mark.slow
def test_a_resumed_run_equals_an_undisturbed_one_whatever_the_schedule(
    tiny_task: TinyTask,
    tmp_path: Path,
    flags: tuple[str, ...],
    check: Callable[[Path, Lines], None],
) -> None:
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    assert tiny_task.run("train", undisturbed, *flags) == 0
    (undisturbed / "base").symlink_to(tiny_task.folder / "base")
    check(undisturbed, steps_of(undisturbed))

    # A time limit stops it after a step, as a signal would.
    limit = ("--trainer.max-seconds", "1")
    assert tiny_task.run("train", resumed, *flags, *limit) == exit_codes.TIME_LIMIT
    assert len(metrics_of(resumed, "train")) == 1
    assert tiny_task.run("train --resume", resumed, *flags) == 0
    assert steps_of(resumed) == steps_of(undisturbed)
    evaluations = [without_clock(metrics_of(run, "eval")) for run in (resumed, undisturbed)]
    assert evaluations[0] == evaluations[1]
    for step in range(NUM_STEPS):
        assert rollouts_of(resumed, step) == rollouts_of(undisturbed, step)


def test_an_update_that_fails_beside_a_generation_is_dumped_and_ends_the_run(
    tiny_task: TinyTask, tmp_path: Path
) -> None:
    run = tmp_path / "overflowing"
    flags = (*OVERLAP, "--loss.entropy-coefficient", "3e38")
    with pytest.raises(NonFiniteError, match=r"step 0: .* loss is -?inf, made by rollout"):
        tiny_task.run("train", run, *flags)
    assert (run / "dumps" / "step-000000.json").exists()
    assert "rollouts" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_a_real_server_samples_during_the_update(tiny_task: TinyTask, tmp_path: Path) -> None:
    run = tmp_path / "sglang"
    server = ("--rollout.engine", "sglang", "--rollout.sglang.python", str(sglang_python()))
    assert tiny_task.run("train", run, *OVERLAP, *server) == 0
    assert_steps_are_one_update_old(run, steps_of(run))
    first, *_ = metrics_of(run, "train")
    assert first["loss/logprob_gap_max_nats"] < 1e-4  # its own weights; later ones are older


@pytest.mark.slow
def test_two_ranks_overlap_and_stop_at_a_signal(tiny_task: TinyTask, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    two_ranks = ("--policy.parallel.data-parallel-size", "2")
    flags = (*ALL[1:], "--rollout.schedule.overlap", *two_ranks)
    process = tiny_task.start("train", run, "--trainer.num-steps", "1000", *flags)
    deadline = time.monotonic() + 300
    while len(metrics_of(run, "train")) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    lines = metrics_of(run, "train")
    assert checkpoint.name == f"step-{len(lines):06d}"
    assert {line["rollout/staleness_max"] for line in lines[1:]} & {1.0, 2.0, 3.0}
    again = (*flags, "--trainer.num-steps", str(len(lines) + 2))
    process = tiny_task.start("train", run, "--resume", *again)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    after = metrics_of(run, "train")
    assert [line["step"] for line in after] == list(range(len(lines) + 2))
    assert after[: len(lines)] == lines
