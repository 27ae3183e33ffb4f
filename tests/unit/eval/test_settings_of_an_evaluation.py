"""What a repeated evaluation takes over from the one that was killed."""

import json
from pathlib import Path

import pytest

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.problem_sets import read_evaluation_sets
from prefixrl_mcore.eval.command import _read_parts, _settings

PARTS = {"set/olympiad": {"num_correct": [1], "num_samples": 4}}


def write_problem(path: Path, text: str) -> Path:
    path.write_text(json.dumps({"id": path.stem, "problem": text, "answer": "2"}) + "\n")
    return path


def parts_taken_over(folder: Path, held_out: Path) -> object:
    """Return what an evaluation of the folder's run with this held-out set finds done."""
    config = RunConfig.model_validate(
        {
            "run_folder": folder / "run",
            "model": {"path": folder / "model"},
            "data": {
                "problems": folder / "train.jsonl",
                "id_field": "id",
                "text_field": "problem",
                "answer_field": "answer",
                "held_out": {"olympiad": held_out},
            },
        }
    )
    settings = _settings(config, None, read_evaluation_sets(config))
    out = folder / "eval.json"
    parts = _read_parts(out, settings)
    out.write_text(json.dumps({"is_complete": False, "settings": settings, "parts": PARTS}))
    return parts


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param(None, PARTS, id="nothing"),
        pytest.param("held.jsonl", {}, id="held-out set"),
        pytest.param("train.jsonl", {}, id="training set"),
    ],
)
def test_results_of_other_problems_are_not_taken_over(
    tmp_path: Path, changed: str | None, expected: object
) -> None:
    write_problem(tmp_path / "train.jsonl", "1 + 1")
    held_out = write_problem(tmp_path / "held.jsonl", "4 - 2")
    assert parts_taken_over(tmp_path, held_out) == {}
    if changed is not None:
        write_problem(tmp_path / changed, "10 / 5")
    assert parts_taken_over(tmp_path, held_out) == expected


def test_results_of_the_same_problems_in_another_file_are_taken_over(tmp_path: Path) -> None:
    write_problem(tmp_path / "train.jsonl", "1 + 1")
    held_out = write_problem(tmp_path / "held.jsonl", "4 - 2")
    assert parts_taken_over(tmp_path, held_out) == {}
    assert parts_taken_over(tmp_path, held_out.rename(tmp_path / "moved.jsonl")) == PARTS
    other = tmp_path / "other.jsonl"
    other.write_text((tmp_path / "moved.jsonl").read_text().replace("4 - 2", "10 / 5"))
    assert parts_taken_over(tmp_path, other) == {}
