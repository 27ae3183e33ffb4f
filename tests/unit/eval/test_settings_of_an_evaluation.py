"""What a repeated evaluation takes over from the one that was killed."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.eval.command import Plan, _evaluate_parts, _read_parts, _settings
from prefixrl_mcore.eval.parts import Part
from prefixrl_mcore.eval.runner import EvaluationResult
from prefixrl_mcore.records import PrefixedProblem, Problem
from tests.support.tiny_models import write_tiny_qwen3


def run_config(model: Path, **evaluation: Any) -> RunConfig:
    """Return the config of a run with the model."""
    return RunConfig.model_validate(
        {
            "run_folder": model.parent / "run",
            "model": {"path": model},
            "data": {"problems": model.parent / "train.jsonl"},
            "evaluation": evaluation,
        }
    )


def settings(model: Path, **evaluation: Any) -> dict[str, Any]:
    """Return the settings of an evaluation of the model."""
    return _settings(run_config(model, **evaluation), None)


def plan(*, text: str = "1 + 1", answer: str = "2", num_traces: int = 2) -> Plan:
    """Return a plan of problems p0, p1, ... without a prefix, and of prefixes of traces."""

    def start(index: int, prefix: tuple[int, ...] = ()) -> PrefixedProblem:
        return PrefixedProblem(
            prefixed_problem_id=f"p{index}#{prefix}",
            problem=Problem(problem_id=f"p{index}", text=text, answer=answer),
            prompt_token_ids=tuple(text.encode()),
            prefix_token_ids=prefix,
        )

    starts = {
        "set/train": [start(index) for index in range(2)],
        "unlock/0.50": [start(index, (8, index)) for index in range(num_traces)],
    }
    return [
        (Part(name=name, problems=[one.problem for one in some], num_samples=4), some)
        for name, some in starts.items()
    ]


def left(folder: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Return the file of an evaluation that was killed when ``plan()`` was done, and its parts."""
    config = run_config(folder / "model")
    config.run_folder.mkdir()
    result = EvaluationResult(num_correct=(1, 2), num_samples=4, completion_tokens=9)
    evaluator: Any = SimpleNamespace(evaluate=lambda *_, **__: result)
    out, parts = folder / "base.json", dict[str, dict[str, Any]]()
    _evaluate_parts(config, evaluator, plan(), parts, settings=settings, out=out, which="base")
    return out, json.loads(json.dumps(parts))


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        pytest.param({}, {"set/train", "unlock/0.50"}, id="nothing"),
        pytest.param({"text": "10 / 5"}, set(), id="problems"),
        pytest.param({"answer": "3"}, set(), id="answers"),
        pytest.param({"num_traces": 3}, {"set/train"}, id="more-traces"),
    ],
)
def test_results_of_other_problems_and_traces_are_not_taken_over(
    tmp_path: Path, changed: dict[str, Any], kept: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    out, parts = left(tmp_path, {"seed": 0})
    with caplog.at_level(logging.WARNING, logger="prefixrl_mcore"):
        found = _read_parts(out, {"seed": 0}, plan(**changed))
    assert found == {name: parts[name] for name in kept}
    dropped = [name for name in parts if name not in kept]
    assert (f"have changed): {', '.join(dropped)}" in caplog.text) == bool(dropped)


def test_results_of_other_settings_are_dropped_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_tiny_qwen3(tmp_path / "model")
    out, _ = left(tmp_path, settings(model))
    now = settings(model, temperature=0.5, unlock_fractions=(0.5,))
    assert _read_parts(out, now, plan()) == {}
    assert "(other temperature, unlock_fractions): set/train, unlock/0.50" in caplog.text


def test_settings_that_decide_no_result_lose_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_tiny_qwen3(tmp_path / "model")
    out, parts = left(tmp_path, settings(model))
    others = {"training_num_samples": 9, "every_steps": 7, "keep_seconds": 1, "pass_at": (2,)}
    assert _read_parts(out, settings(model, **others), plan()) == parts
    assert "not used" not in caplog.text


def test_results_of_the_same_weights_in_another_folder_are_taken_over(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model")
    out, parts = left(tmp_path, settings(model))
    moved = model.rename(tmp_path / "moved")
    assert _read_parts(out, settings(moved), plan()) == parts


def test_results_of_another_model_in_the_same_folder_are_not_taken_over(tmp_path: Path) -> None:
    model = tmp_path / "model"
    out, _ = left(tmp_path, settings(write_tiny_qwen3(model)))
    assert _read_parts(out, settings(write_tiny_qwen3(model, seed=1)), plan()) == {}
