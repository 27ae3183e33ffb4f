"""FLOPs to reach an accuracy, against hand-made curves."""

import json
from pathlib import Path

import pytest

from prefixrl_mcore.report.headline import Reach, accuracy_points, compare, reference_index
from prefixrl_mcore.report.reader import RunRecord, read_runs

Curve = list[tuple[float, float]]


def _runs(folder: Path, curves: dict[str, Curve]) -> list[RunRecord]:
    """Return one run per method whose evaluations are (FLOPs, accuracy) pairs."""
    for method, curve in curves.items():
        run = folder / method
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"method": method}))
        lines = [
            {"step": i, "kind": "eval", "flops/total": flops, "eval/train/accuracy": value}
            for i, (flops, value) in enumerate(curve)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "metrics.jsonl").write_text(text)
    return read_runs([folder / method for method in curves])


def _at(runs: list[RunRecord], threshold: float) -> tuple[Reach, ...]:
    """Return the runs at one accuracy."""
    return next(c.reaches for c in compare(runs) if c.threshold == threshold)


def test_ratio_is_taken_at_the_first_evaluation_above_the_accuracy(tmp_path: Path) -> None:
    curves = {
        "rl": [(1e12, 0.0), (3e12, 0.1), (6e12, 0.31)],
        "prefixrl": [(1e12, 0.05), (2e12, 0.3), (3e12, 0.2), (4e12, 0.5)],
    }
    runs = _runs(tmp_path, curves)
    rl, prefixrl = _at(runs, 0.3)
    assert rl == Reach(flops=6e12, budget=6e12, ratio=3.0, ratio_kind="exact")
    assert prefixrl == Reach(flops=2e12, budget=4e12, ratio=None, ratio_kind="none")


def test_a_run_that_never_arrived_gives_a_lower_bound(tmp_path: Path) -> None:
    runs = _runs(tmp_path, {"prefixrl": [(2e12, 0.5)], "rl": [(1e12, 0.0), (5e12, 0.04)]})
    _, rl = _at(runs, 0.5)
    assert rl == Reach(flops=None, budget=5e12, ratio=2.5, ratio_kind="at_least")


def test_a_run_that_stopped_before_the_reference_arrived_tells_nothing(tmp_path: Path) -> None:
    runs = _runs(tmp_path, {"prefixrl": [(2e12, 0.5)], "rl": [(1e12, 0.2)]})
    _, rl = _at(runs, 0.5)
    assert rl == Reach(flops=None, budget=1e12, ratio=None, ratio_kind="none")


def test_no_ratio_where_the_reference_never_arrived(tmp_path: Path) -> None:
    runs = _runs(tmp_path, {"prefixrl": [(2e12, 0.1)], "rl": [(1e12, 0.4)]})
    prefixrl, rl = _at(runs, 0.4)
    assert (prefixrl.flops, rl.flops) == (None, 1e12)
    assert (prefixrl.ratio, rl.ratio) == (None, None)


def test_only_reached_accuracies_are_compared(tmp_path: Path) -> None:
    runs = _runs(tmp_path, {"prefixrl": [(2e12, 0.32)], "rl": [(1e12, 0.04)]})
    assert [c.threshold for c in compare(runs)] == [0.05, 0.1, 0.2, 0.3]
    assert compare(runs[1:]) == []


def test_evaluations_without_flops_cannot_be_compared(tmp_path: Path) -> None:
    runs = _runs(tmp_path, {"rl": [(1e12, 0.0)]})
    line = {"step": 9, "kind": "eval", "eval/train/accuracy": 0.9}
    with (tmp_path / "rl" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    runs = read_runs([tmp_path / "rl"])
    assert [p.accuracy for p in accuracy_points(runs[0], "train")] == [0.0, 0.9]
    assert compare(runs) == []


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        pytest.param({"rl": [(1.0, 0.1)], "sft_then_rl": [(1.0, 0.1)]}, 0, id="no PrefixRL"),
        pytest.param({"rl": [(1.0, 0.1)], "prefixrl": [(1.0, 0.1)]}, 1, id="PrefixRL"),
        pytest.param({"rl": [(1.0, 0.1)], "prefixrl": []}, 1, id="PrefixRL not evaluated"),
    ],
)
def test_the_reference_is_prefixrl(tmp_path: Path, curves: dict[str, Curve], expected: int) -> None:
    assert reference_index(_runs(tmp_path, curves)) == expected
