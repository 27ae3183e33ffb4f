"""A run folder belongs to one config; continuing it may change where and how long, not what."""

import json
from pathlib import Path

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.data import DataConfig
from prefixrl_mcore.config.policy import ModelConfig
from prefixrl_mcore.config.run import RunConfig, TrainerConfig
from prefixrl_mcore.observability.run_folder import RunFolder


def _config(folder: Path, **changes: object) -> RunConfig:
    base = RunConfig(
        run_folder=folder,
        model=ModelConfig(path=Path("m")),
        data=DataConfig(problems=Path("p.jsonl")),
    )
    return base.model_copy(update=changes)


def test_the_saved_config_reads_back_equal(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(_config(tmp_path / "run"))
    assert folder.read_config() == _config(tmp_path / "run")


def test_environment_has_versions_and_python(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(_config(tmp_path))
    environment = json.loads(folder.environment_file.read_text())
    assert environment["packages"]["torch"].startswith("2.11")
    assert environment["python"].startswith("3.12")


def test_another_config_is_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(_config(tmp_path))
    before = folder.config_file.read_text()
    with pytest.raises(ConfigError, match=r"seed: 0 there, 1 now"):
        folder.claim(_config(tmp_path, seed=1))
    assert folder.config_file.read_text() == before


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").check(_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_config_names_its_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.config_file.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        folder.check(_config(tmp_path))


def test_a_setting_added_later_does_not_lock_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(_config(tmp_path))
    values = json.loads(folder.config_file.read_text())
    del values["sft"]["keep"]
    folder.config_file.write_text(json.dumps(values))
    folder.check(_config(tmp_path))


def test_length_may_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim(_config(tmp_path))
    folder.claim(_config(tmp_path, trainer=TrainerConfig(num_steps=7)))
    assert folder.read_config().trainer.num_steps == 7


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        RunFolder(tmp_path).read_config()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "run").claim(_config(tmp_path / "run"))


def test_stage_seconds_add_up_over_starts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.add_stage_seconds("train", 1.5)
    folder.add_stage_seconds("train", 2.0)
    assert json.loads(folder.stages_file.read_text()) == {"train": 3.5}
