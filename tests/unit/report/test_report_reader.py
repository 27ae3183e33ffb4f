"""A run folder becomes records; what is absent or damaged is said, never a crash."""

import json
from pathlib import Path

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.report.reader import read_run, read_runs
from tests.support.fake_run import COLLECT_FLOPS, SFT_FLOPS, write_fake_run


def test_everything_of_a_finished_run_is_read(tmp_path: Path) -> None:
    run = read_run(write_fake_run(tmp_path / "run", num_steps=20))
    assert (run.label, run.method) == ("prefixrl", "prefixrl")
    assert run.config["batch.group_size"] == 8
    assert run.environment["packages.torch"] == "2.11.0"
    assert [line.step for line in run.train] == list(range(20))
    assert [line.step for line in run.evals] == [0, 10, 20]
    assert run.held_out == ("heldout",)
    assert [e.step for e in run.evaluations] == [0, 20]
    assert sorted(run.evaluations[0].sets) == ["heldout", "train"]
    assert sorted(run.evaluations[0].sets["train"].pass_at_k) == [1, 8, 16, 32, 64]
    assert [p.low for p in run.evaluations[1].unlock] == [f / 10 for f in range(10)]
    assert run.stage_seconds == {"collect": 57.2, "train": 18.0}
    assert run.notices == ()


def test_collection_counts_failed_tries(tmp_path: Path) -> None:
    collection = read_run(write_fake_run(tmp_path / "run", num_steps=1)).collection
    assert collection is not None
    assert (collection.num_problems, collection.num_solved) == (64, 60)
    assert collection.tries_unsolved == (2500, 2500, 2500, 2500)
    assert collection.num_tries == sum(collection.tries_solved) + 10_000
    assert collection.flops == pytest.approx(COLLECT_FLOPS, rel=1e-9)  # a sum of 64 shares


def test_charges_are_the_latest_ones(tmp_path: Path) -> None:
    run = read_run(write_fake_run(tmp_path / "run", method="sft_then_rl", num_steps=5))
    assert run.charged("collect") == COLLECT_FLOPS
    assert run.charged("sft") == SFT_FLOPS
    assert run.charged("total") == run.train[-1].values["flops/total"]
    assert run.charged("nothing") == 0.0


def test_null_and_non_finite_values_are_absent(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        '{"step": 0, "kind": "train", "time": 1, "a/b": null, "a/c": 1.5}',
        '{"step": 1, "kind": "train", "time": 2, "a/b": NaN, "a/c": Infinity}',
        '{"step": 2, "kind": "train", "time": null, "a/b": 2, "a/c": "text"}',
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(folder)
    assert run.series("a/b") == ([2], [2.0])
    assert run.series("a/c") == ([0], [1.5])
    assert run.label == "run"  # no config: the folder names it


def test_half_written_and_repeated_lines_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        '{"step": 0, "kind": "train", "a/b": 1}',
        '{"step": 0, "kind": "train", "a/b": 2}',
        '{"step": 1, "kind": "other", "a/b": 3}',
        '{"kind": "train"}',
        "[]",
        '{"step": 2, "kind": "tra',
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(folder)
    assert run.series("a/b") == ([0], [2.0])
    assert [notice.split(": ")[1][:2] for notice in run.notices] == ["3 ", "1 ", "1 "]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=5)
    (folder / "environment.json").write_text("{")
    (folder / "stages.json").write_text("[1]")
    (folder / "eval" / "step-000000.json").write_text('{"is_complete": false, "parts": {}}')
    (folder / "eval" / "other.json").write_text('{"sets": {}}')
    (folder / "traces" / "store.json").write_text("{}")
    run = read_run(folder)
    text = " | ".join(run.notices)
    for part in ("environment.json", "stages.json", "not finished", "other.json", "store.json"):
        assert part in text
    assert [e.step for e in run.evaluations] == [5]
    assert run.collection is None


def test_traces_are_looked_for_where_the_config_says(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=1)
    other = tmp_path / "elsewhere"
    (folder / "traces").rename(other)
    config = json.loads((folder / "config.json").read_text())
    config["data"]["traces"] = str(other)
    (folder / "config.json").write_text(json.dumps(config))
    collection = read_run(folder).collection
    assert collection is not None
    assert collection.folder == other


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="at least one"):
        read_runs([])


def test_the_same_folder_twice_is_refused(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=0)
    with pytest.raises(ConfigError, match="given twice"):
        read_runs([folder, tmp_path / "x" / ".." / "run"])


def test_runs_of_one_method_are_told_apart(tmp_path: Path) -> None:
    folders = [
        write_fake_run(tmp_path / "a" / "seed0", num_steps=0),
        write_fake_run(tmp_path / "a" / "seed1", num_steps=0),
        write_fake_run(tmp_path / "b" / "seed1", num_steps=0),
        write_fake_run(tmp_path / "c", method="rl", num_steps=0),
    ]
    labels = [run.label for run in read_runs(folders)]
    assert labels[0] == "prefixrl (seed0)"
    assert labels[3] == "rl"
    assert len(set(labels)) == 4


def test_several_held_out_sets_keep_the_order_of_the_config(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=0)
    config = json.loads((folder / "config.json").read_text())
    config["data"]["held_out"] = {"zeta": "z.jsonl", "alpha": "a.jsonl", "unused": "u.jsonl"}
    (folder / "config.json").write_text(json.dumps(config))
    line = {"step": 0, "kind": "eval", "eval/alpha/accuracy": 0.1, "eval/zeta/accuracy": 0.2}
    line |= {"eval/train/accuracy": 0.3, "eval/bins/0.00-0.00/accuracy": 0.4}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_run(folder).held_out == ("zeta", "alpha")
