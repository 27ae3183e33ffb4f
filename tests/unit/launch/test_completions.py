"""What a run samples at most: the stages take their numbers from where ``check`` counts them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.run import EvaluationConfig, RunConfig
from prefixrl_mcore.data.problem_sets import read_evaluation_sets
from prefixrl_mcore.eval.in_training import evaluate_in_training
from prefixrl_mcore.eval.parts import Part, most_completions, parts_of_checkpoint
from prefixrl_mcore.eval.runner import EvaluationResult
from prefixrl_mcore.launch.completions import Completions, completions_text, count_completions
from prefixrl_mcore.records import Problem

FIRST_RUN = Path(__file__).parents[3] / "docs" / "first_run.md"


def problems(name: str, count: int) -> list[Problem]:
    return [Problem(problem_id=f"{name}-{i}", text=f"{name} {i}", answer="1") for i in range(count)]


SETS = {"train": problems("train", 1000), "aime": problems("aime", 30)}


def run_config(folder: Path = Path("x"), **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_folder": folder / "run",
            "model": {"path": folder},
            "data": {"problems": folder / "train.jsonl", "held_out": {"aime": folder / "a.jsonl"}},
            **sections,
        }
    )


def test_the_stages_of_the_paper() -> None:
    config = run_config(evaluation={"every_steps": 25})
    assert count_completions(config, SETS) == Completions(
        training=400 * 128 * 8,
        num_evaluations=17,  # after 0, 25, ... 400 steps
        evaluation=1030 * 4 + 6 * 1000,
        checkpoint=1000 * 8 + 30 * 256 + 6 * 1000 * 8 + 10 * 1000 * 8,
        collection=1000 * 2500,
    )


def test_a_baseline_without_traces_collects_nothing() -> None:
    assert count_completions(run_config(method="rl"), SETS).collection == 0
    assert count_completions(run_config(method="sft_then_rl"), SETS).collection == 2_500_000


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, 1024),
        ({"oversampling": 1.1}, 141 * 8),
        ({"dynamic_sampling": True, "max_rounds": 3}, 3 * 1024),
        ({"dynamic_sampling": True, "oversampling": 1.5}, 4 * 192 * 8),
    ],
)
def test_a_schedule_begins_more(schedule: dict[str, Any], expected: int) -> None:
    config = run_config(rollout={"schedule": schedule})
    assert config.most_completions_per_step == expected


@pytest.mark.parametrize(
    ("num_steps", "every_steps", "expected"),
    [(4, 2, [0, 2, 4]), (5, 2, [0, 2, 4, 5]), (1, 9, [0, 1])],
)
def test_the_first_and_the_last_step_are_evaluated(
    num_steps: int, every_steps: int, expected: list[int]
) -> None:
    evaluation = EvaluationConfig(every_steps=every_steps)
    steps = [s for s in range(num_steps + 1) if evaluation.is_due(s) or s == num_steps]
    assert steps == expected
    assert evaluation.num_in_training(num_steps) == len(expected)


class Recording:
    """An evaluator that only counts."""

    def __init__(self) -> None:
        self.asked: dict[str, int] = {}

    def starts(self, part: Part, *, label: str) -> list[Problem]:
        return list(part.problems)

    def evaluate(self, starts: list[Problem], *, num_samples: int, label: str) -> EvaluationResult:
        self.asked[label] = len(starts) * num_samples
        return EvaluationResult(
            num_correct=(0,) * len(starts), num_samples=num_samples, completion_tokens=7
        )


@pytest.mark.parametrize("max_problems", [None, 10])
def test_an_evaluation_in_training_samples_what_is_counted(max_problems: int | None) -> None:
    config = run_config(evaluation={"max_problems": max_problems, "training_num_samples": 3})
    evaluator = Recording()
    values = evaluate_in_training(evaluator, SETS, config.evaluation, label="eval/5")  # type: ignore[arg-type]
    assert sum(evaluator.asked.values()) == count_completions(config, SETS).evaluation
    of_each = 10 if max_problems else 1000
    assert evaluator.asked["eval/5/train"] == 3 * of_each
    assert evaluator.asked["eval/5/bins/0.20-0.40"] == of_each
    assert values["eval/train/all_negative_fraction"] == 1.0
    assert values["eval/aime/completion_tokens_mean"] == 7 / evaluator.asked["eval/5/aime"]
    assert "eval/bins/0.20-0.40/accuracy" in values
    assert "eval/bins/0.20-0.40/accuracy_stderr" not in values


def test_the_parts_of_an_evaluated_checkpoint() -> None:
    evaluation = EvaluationConfig(
        num_samples=4,
        train_set_num_samples=5,
        unlock_num_samples=8,
        max_problems=2,
        prefix_bins=(0.0, 0.5),
        unlock_fractions=(0.25,),
    )
    parts = parts_of_checkpoint(evaluation, SETS)
    assert [(part.name, len(part.problems), part.num_samples) for part in parts] == [
        ("set/train", 2, 5),
        ("set/aime", 2, 4),
        ("bin/0.00-0.00", 2, 4),
        ("bin/0.00-0.50", 2, 4),
        ("unlock/0.25", 2, 4),
    ]
    assert most_completions(parts) == 42


def write_problems(path: Path, count: int) -> None:
    lines = [json.dumps({"problem": f"{path.stem} {i}", "answer": "1"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")


def test_check_counts_when_the_problem_files_are_there(tmp_path: Path) -> None:
    config = run_config(tmp_path, evaluation={"every_steps": 25})
    training = "training 409,600 = 400 steps x 1,024"
    write_problems(tmp_path / "train.jsonl", 10)
    assert completions_text(config).splitlines() == [
        training,
        "evaluation and collection: known when the problem files are there; collection 2,500 a "
        "problem",
    ]
    write_problems(tmp_path / "a.jsonl", 3)
    assert completions_text(config).splitlines() == [
        training,
        "evaluation in training 1,904 = 17 x 112",
        "prefixrl eval 2,128 for each checkpoint",
        "collection 25,000 = 10 problems x 2,500 tries; a solved problem has no more of them",
    ]
    assert len(read_evaluation_sets(config)["aime"]) == 3


def test_screening_as_the_page_has_it_keeps_the_unsolved_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", FIRST_RUN.read_text(), re.MULTILINE | re.DOTALL)
    results = tmp_path / "runs" / "screen" / "eval"
    results.mkdir(parents=True)
    (tmp_path / "data").mkdir()
    parts = {"set/train": {"num_correct": [0, 3, 0], "num_samples": 512}}
    (results / "base.json").write_text(json.dumps({"parts": parts}))
    (tmp_path / "data" / "all.jsonl").write_text('{"a": 1}\n\n{"b": 2}\n{"c": 3}\n')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, FIRST_RUN, "exec"), {})
    assert (tmp_path / "data" / "problems.jsonl").read_text() == '{"a": 1}\n{"c": 3}\n'
