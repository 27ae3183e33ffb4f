"""metrics.jsonl: explicit steps, resume without doubles, W&B offline."""

import json
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import MetricsConfig, WandbConfig
from prefixrl_mcore.observability import metrics
from prefixrl_mcore.observability.metrics import MetricsWriter, check_packages, truncate_metrics
from prefixrl_mcore.observability.run_folder import RunFolder
from tests.support.wandb_records import offline_runs


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(folder: RunFolder, num_steps: int, *, num_steps_done: int = 0) -> None:
    writer = MetricsWriter(folder, MetricsConfig(), num_steps_done=num_steps_done)
    for step in range(num_steps_done, num_steps):
        writer.write("train", step, {"rollout/reward_mean": step / 10})
        writer.write("eval", step + 1, {"eval/train/accuracy": step / 10})
    writer.close()


def test_each_line_carries_step_kind_and_values(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _write(folder, 1)
    train, evaluation = _lines(folder.metrics_file)
    assert (train["step"], train["kind"], train["rollout/reward_mean"]) == (0, "train", 0.0)
    assert (evaluation["step"], evaluation["kind"]) == (1, "eval")


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _write(folder, 5)
    _write(folder, 5, num_steps_done=3)
    steps = [(line["kind"], line["step"]) for line in _lines(folder.metrics_file)]
    assert len(steps) == len(set(steps)) == 10
    assert steps[:6] == [
        (kind, step)
        for pair in ((("train", s), ("eval", s + 1)) for s in range(3))
        for kind, step in pair
    ]


def test_times_outside_of_steps_belong_to_a_policy_version(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder, MetricsConfig(), num_steps_done=0)
    for step in (0, 2, 3):
        writer.write("outside", step, {"time/eval_seconds": 1.0})
    writer.close()
    truncate_metrics(folder.metrics_file, 2)
    assert [line["step"] for line in _lines(folder.metrics_file)] == [0, 2]


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _write(folder, 2)
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 2, "ki')
    truncate_metrics(folder.metrics_file, 2)
    assert [line["step"] for line in _lines(folder.metrics_file)] == [0, 1, 1, 2]


def test_a_run_that_begins_anew_keeps_finished_sft_epochs_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    _write(folder, 2)
    writer = MetricsWriter(folder, MetricsConfig(), num_steps_done=None)
    assert _lines(folder.metrics_file) == []
    for epoch in (1, 2, 3):
        writer.write("sft", epoch, {"loss/validation_nats": 1.0 / epoch})
    writer.drop_sft_beyond(2)
    writer.write("eval", 0, {"eval/train/accuracy": 0.0})
    writer.close()
    assert [(line["kind"], line["step"]) for line in _lines(folder.metrics_file)] == [
        ("sft", 1),
        ("sft", 2),
        ("eval", 0),
    ]


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder, MetricsConfig(), num_steps_done=0)
    writer.write("train", 0, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    writer.close()
    (line,) = _lines(folder.metrics_file)
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.0)


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = MetricsWriter(folder, MetricsConfig(tensorboard=True), num_steps_done=0)
    writer.write("train", 0, {"a": 1.0})
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_all_starts_of_a_run_are_one_wandb_run_with_rows_in_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder(tmp_path)
    folder.config_file.write_text("{}")
    config = MetricsConfig(wandb=WandbConfig())
    for steps in ((0, 1, 2), (2, 3)):  # the second begins at the checkpoint after step 1
        writer = MetricsWriter(folder, config, num_steps_done=steps[0])
        for step in steps:
            writer.write("train", step, {"a": step / 2})
        writer.write_rollouts(10, [{"completion_text": "x", "reward": 1.0}])
        writer.close()
    starts = offline_runs(tmp_path)
    assert [run_id for run_id, _ in starts] == [writer.wandb_id] * 2
    rows = [row for _, rows in starts for row in rows]
    assert [row["_step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows] == [0, 1, 2, 10, 2, 3, 10]
    assert [row["a"] for row in rows if "a" in row] == [0.0, 0.5, 1.0, 1.0, 1.5]


def test_a_run_that_is_killed_while_wandb_starts_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    ids: list[str] = []

    def killed(**options: object) -> None:
        ids.append(str(options["id"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(wandb, "init", killed)
    folder = RunFolder(tmp_path)
    folder.config_file.write_text("{}")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            MetricsWriter(folder, MetricsConfig(wandb=WandbConfig()), num_steps_done=0)
    assert ids[0] == ids[1]


def test_a_missing_package_is_named_before_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "_is_installed", lambda package: package != "wandb")
    config = tmp_path / "run.toml"
    config.write_text(
        f'run_folder = "{tmp_path}/run"\n[model]\npath = "m"\n[data]\nproblems = "p"\n'
        "[policy.parallel]\ntensor_model_parallel_size = 2\n[metrics]\nwandb = {}\n"
    )
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert "error: metrics.wandb is set, and wandb is not installed in" in said
    assert "pip install wandb, or leave metrics.wandb out" in said
    assert not (tmp_path / "run").exists()
    check_packages(MetricsConfig(tensorboard=True))  # that one is there
    monkeypatch.setattr(metrics, "_is_installed", lambda package: package == "wandb")
    with pytest.raises(ConfigError, match=r"^metrics\.tensorboard is set, and tensorboard is not"):
        check_packages(MetricsConfig(tensorboard=True))
    check_packages(MetricsConfig())


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes_of_wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not metrics._is_installed("notes_of_wandb")
    assert not metrics._is_installed("no_such_package")
    assert metrics._is_installed("wandb")
