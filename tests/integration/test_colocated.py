"""An engine that sleeps during the updates changes no number of a run."""

from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.rollout.transformers_engine import TransformersEngine
from tests.support.tiny_run import TinyTask, metrics_of, without_clock


@pytest.mark.slow
def test_colocated_run_takes_the_steps_of_one_that_is_not(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("sample", "sleep", "wake", "load_weights"):
        original = getattr(TransformersEngine, name)

        def noted(
            *arguments: object, _name: str = name, _original: Any = original, **options: object
        ) -> object:
            calls.append(_name)
            return _original(*arguments, **options)

        monkeypatch.setattr(TransformersEngine, name, noted)
    options = ("--trainer.num-steps", "2")
    assert tiny_task.run("train", tmp_path / "apart", *options) == 0
    assert not {"sleep", "wake"} & set(calls)
    calls.clear()

    colocated = ("--rollout.colocated", "--trainer.dry-run-step", "True")
    assert tiny_task.run("train", tmp_path / "together", *options, *colocated) == 0

    for kind in ("train", "eval"):
        together = without_clock(metrics_of(tmp_path / "together", kind))
        assert together == without_clock(metrics_of(tmp_path / "apart", kind))
        assert together
    changes = [call for call in calls if call != "sample"]
    # The dry-run step and two updates; after each, an evaluation or a step wakes it.
    assert changes == ["sleep", "wake", "load_weights"] * 3
    assert calls[-1] == "sample"
