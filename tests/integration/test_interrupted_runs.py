"""Whole runs that are stopped in the middle of a generation or an evaluation, and their resume."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prefixrl_mcore.checkpoint.run_checkpoints import latest_checkpoint, read_trainer_state
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from tests.support.server_loads import computed_context_tokens
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_run import TinyTask, course_of, metrics_of, without_clock
from tests.support.waiting import beside, is_inside

pytestmark = pytest.mark.slow

SLOW_SAMPLING = (
    # One completion after the other: a signal at the first leaves most of them.
    *("--rollout.transformers.max-batch-size", "1", "--batch.group-size", "8"),
    *("--trainer.num-steps", "2", "--checkpoint.every-steps", "100"),
    *("--evaluation.every-steps", "100", "--evaluation.max-problems", "4"),
    *("--evaluation.prefix-bins", "0.0", "0.5"),
)
STOPPED = 128 + signal.SIGUSR1
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(tiny_task: TinyTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert tiny_task.run("train", run, *SLOW_SAMPLING) == 0
    return run


def problems_of(run: Path, step: int) -> list[str]:
    rows = pq.read_table(run / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
    return [row["prefixed_problem_id"] for row in rows]


def stopped_in(
    tiny_task: TinyTask,
    run: Path,
    *flags: str,
    after_steps: int,
    is_there: Callable[[], bool] = lambda: is_inside("_next_logits"),
) -> int:
    """Train in this process, and signal it once it is there after so many steps.

    Returns:
        The exit code.
    """

    def strike(is_over: threading.Event) -> None:
        while not is_over.wait(0.002):
            if len(metrics_of(run, "train")) == after_steps and is_there():
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    with beside(strike):
        return tiny_task.run("train", run, *flags)


def assert_is_interrupted_once(run: Path, expected: Lines, *, step: int) -> None:
    """One generation, of ``step``, was thrown away before all of it was sampled."""
    lines = metrics_of(run, "train")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, undisturbed in zip(lines, expected, strict=True):
        is_after = line["step"] >= step
        assert line["flops/num_interrupted_generations"] == is_after
        assert line["flops/total"] - line["flops/interrupted"] == pytest.approx(
            undisturbed["flops/total"], rel=1e-12
        )
        thrown_away = line["tokens/charged"] - undisturbed["tokens/charged"]
        assert (thrown_away > 0) == is_after
        of_step = expected[step]["flops/sampling"] - expected[step - 1]["flops/sampling"]
        assert line["flops/interrupted"] < of_step


def test_a_generation_is_interrupted_and_sampled_again_exactly(
    tiny_task: TinyTask, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code = stopped_in(tiny_task, run, *SLOW_SAMPLING, after_steps=1)
    assert code == STOPPED
    assert len(metrics_of(run, "train")) == 1
    expected = metrics_of(undisturbed, "train")
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-000001"
    assert tiny_task.run("train --resume", run, *SLOW_SAMPLING) == 0
    for kind in ("train", "eval"):
        assert course_of(run, kind) == course_of(undisturbed, kind)
    assert_is_interrupted_once(run, expected, step=1)


def test_the_last_evaluation_is_interrupted_and_made_up_for_once(
    tiny_task: TinyTask, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code = stopped_in(tiny_task, run, *SLOW_SAMPLING, after_steps=2)
    assert code == STOPPED
    assert [line["step"] for line in metrics_of(run, "eval")] == [0]
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-000002"
    assert read_trainer_state(checkpoint).extra_state["is_evaluated"] is False
    for _ in range(2):
        assert tiny_task.run("train --resume", run, *SLOW_SAMPLING) == 0
        for kind in ("train", "eval"):  # an evaluation is not charged
            lines = [without_clock(metrics_of(folder, kind)) for folder in (run, undisturbed)]
            assert lines[0] == lines[1]


def test_a_generation_beside_an_update_is_interrupted_and_begun_with_the_saved_weights(
    tiny_task: TinyTask, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = (*SLOW_SAMPLING, "--overlap", "--trainer.num-steps", "3")
    code = stopped_in(tiny_task, run, *flags, after_steps=1)
    assert code == STOPPED
    assert len(metrics_of(run, "train")) == 1
    checkpoint = latest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "step-000001"
    assert read_trainer_state(checkpoint).extra_state["rollouts"]["ready"] is None
    assert tiny_task.run("train --resume", run, *flags) == 0

    lines = metrics_of(run, "train")
    assert [line["step"] for line in lines] == [0, 1, 2]
    # Step 1 would have been sampled from the weights before; those are no more.
    assert [line["rollout/staleness_max"] for line in lines] == [0.0, 0.0, 1.0]
    assert [line["flops/num_interrupted_generations"] for line in lines] == [0.0, 1.0, 1.0]
    for step in range(2):
        assert problems_of(run, step) == problems_of(undisturbed, step)


def test_requests_on_a_real_server_are_aborted_and_sampled_again_exactly(
    tiny_task: TinyTask, tmp_path: Path
) -> None:
    runs = undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    with ExitStack() as stack:
        # One server for all three starts of the trainer; each brings its own weights.
        config = SGLangConfig(python=sglang_python(), deterministic=True)
        engine = SGLangEngine(
            tiny_task.folder / "base",
            config,
            logits_dtype="float32",
            max_total_tokens=64,
            logs_folder=tmp_path / "logs",
        )
        stack.callback(engine.close)
        (server,) = engine.servers
        flags = (
            *("--rollout.engine", "sglang", "--rollout.sglang.deterministic"),
            *("--rollout.sglang.python", str(sglang_python())),
            *("--rollout.sglang.urls", server.client.url),
            *("--batch.group-size", "24", "--trainer.num-steps", "2"),
            *("--evaluation.max-problems", "1", "--evaluation.every-steps", "100"),
            *("--evaluation.prefix-bins", "0.0", "0.5"),
        )
        assert tiny_task.run("train", undisturbed, *flags) == 0
        computed: list[int] = []

        def has_gone_on() -> bool:
            if is_inside("next_answer"):
                computed.append(computed_context_tokens(server.client.url))
            return bool(computed) and computed[-1] > computed[0]

        code = stopped_in(tiny_task, run, *flags, after_steps=1, is_there=has_gone_on)
        assert code == STOPPED
        expected = metrics_of(undisturbed, "train")
        assert tiny_task.run("train --resume", run, *flags) == 0
    for kind in ("train", "eval"):
        assert course_of(run, kind) == course_of(undisturbed, kind)
    assert_is_interrupted_once(run, expected, step=1)
    for step in range(2):
        mine, others = (problems_of(folder, step) for folder in runs)
        assert mine == others
