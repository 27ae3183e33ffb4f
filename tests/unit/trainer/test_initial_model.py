"""``--init``: ``RUN/model`` is made once, and believed only if it says what it was made of."""

import shutil
from pathlib import Path

import pytest

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf
from prefixrl_mcore.cli import main
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.trainer import collect as collect_module
from prefixrl_mcore.trainer.initial_model import provide_initial_model, with_shape_of
from tests.support.policies import max_difference
from tests.support.tiny_models import write_tiny_qwen3
from tests.support.tiny_run import CONFIG
from tests.support.weights import weights_in

ORIGIN = ".made-of.json"


@pytest.fixture
def init(tmp_path: Path) -> Path:
    convert_from_hf(write_tiny_qwen3(tmp_path / "hf"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def collected(tmp_path: Path, init: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Return the configs that ``prefixrl collect --init`` hands on; none if it refuses."""
    configs: list[RunConfig] = []
    monkeypatch.setattr(collect_module, "collect", configs.append)
    run = str(tmp_path / "run")
    main(["collect", str(CONFIG), "--init", str(init), "--run-folder", run])
    return configs


def test_the_first_command_makes_the_model_and_later_ones_need_no_checkpoint(
    tmp_path: Path, init: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "run" / "model"
    (config,) = collected(tmp_path, init, monkeypatch)
    assert config.model.path == made
    assert max_difference(weights_in(made), weights_in(tmp_path / "hf")) == 0.0
    shutil.rmtree(init)
    (again,) = collected(tmp_path, init, monkeypatch)
    assert again == config
    assert with_shape_of(config, init).model.path == made
    assert collected(tmp_path, tmp_path / "elsewhere", monkeypatch) == []


def test_a_run_gives_its_latest_checkpoint_although_it_has_a_config_of_its_own(
    tmp_path: Path, init: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tmp_path / "before"
    (before / "checkpoints").mkdir(parents=True)
    init.rename(before / "checkpoints" / "step-000003")
    (before / "config.json").write_text('{"method": "rl"}')
    (config,) = collected(tmp_path, before, monkeypatch)
    assert config.model.path == tmp_path / "run" / "model"
    assert max_difference(weights_in(config.model.path), weights_in(tmp_path / "hf")) == 0.0
    shape_of = with_shape_of(config, before).model.path
    assert shape_of == before / "checkpoints" / "step-000003" / "hf"


@pytest.mark.parametrize("content", [None, "[]", "{", '{"x": 1}'])
def test_a_model_that_does_not_say_what_it_was_made_of_is_refused(
    tmp_path: Path, init: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = collected(tmp_path, init, monkeypatch)
    origin = config.model.path / ORIGIN
    origin.unlink()
    if content is not None:
        origin.write_text(content)
    with pytest.raises(ValueError, match=r"\.made-of\.json.*so that it is made again"):
        provide_initial_model(config, init)
