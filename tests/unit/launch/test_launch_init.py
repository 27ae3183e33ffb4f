"""``launch --init``: the model is there, and in the config, before anything is submitted."""

from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.checkpoint.convert.offline import convert_from_hf
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.slurm import launch as launch_module
from prefixrl_mcore.launch.slurm import recipe
from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.launch import (
    LaunchOptions,
    begin_with_init,
    launch,
    provide_init,
    read_run,
)
from tests.support.policies import max_difference
from tests.support.tiny_models import write_tiny_qwen3
from tests.support.tiny_run import CONFIG
from tests.support.weights import weights_in


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "hf")


@pytest.fixture
def checkpoint(hf: Path, tmp_path: Path) -> Path:
    convert_from_hf(hf, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[JobFolder]:
    """Return what is submitted; nothing is."""
    jobs: list[JobFolder] = []

    def note(_: object, folders: list[JobFolder]) -> None:
        jobs.extend(folders)
        for folder in folders:
            folder.script.write_text("#!/bin/bash\n")

    for module in (launch_module, recipe):
        monkeypatch.setattr(module, "submit", note)
    return jobs


@pytest.fixture
def site(tmp_path: Path) -> str:
    file = tmp_path / "site.toml"
    file.write_text(
        f'gpus_per_node = 0\nranks_per_node = 1\njob_folder = "{tmp_path}/jobs"\n'
        'python = "/usr/bin/python3"\n'
    )
    return str(file)


def _settings(tmp_path: Path) -> list[str]:
    data = tmp_path / "data.jsonl"
    data.touch()
    files = (f"data.problems={data}", f"data.held_out.held-out={data}")
    tokens = ("rollout.max_total_tokens=64", "rollout.max_completion_tokens=32")
    return [f"run_folder={tmp_path}/run", "method=rl", *tokens, *files]


def _model_of(job: JobFolder) -> Path:
    return load_config(RunConfig, job.config, []).model.path


def test_a_checkpoint_is_made_into_the_runs_model_before_the_submission(
    tmp_path: Path, checkpoint: Path, site: str, submitted: list[JobFolder]
) -> None:
    settings, made = _settings(tmp_path), tmp_path / "run" / "model"
    dry = LaunchOptions(init=checkpoint, dry_run=True)
    assert launch(CONFIG, settings, site, dry) == 0
    assert _model_of(submitted[-1]) == made  # as it will be
    assert not made.exists()
    how = LaunchOptions(init=checkpoint, detach=True)
    assert launch(CONFIG, settings, site, how) == 0
    assert _model_of(submitted[-1]) == made
    assert max_difference(weights_in(made), weights_in(tmp_path / "hf")) == 0.0
    weights = next(made.glob("*.safetensors")).stat()
    assert launch(CONFIG, settings, site, how) == 0  # as with --resume
    assert next(made.glob("*.safetensors")).stat() == weights


def test_all_runs_of_a_sweep_and_all_stages_of_a_recipe_begin_with_one_model(
    tmp_path: Path, checkpoint: Path, site: str, submitted: list[JobFolder]
) -> None:
    settings, made = _settings(tmp_path), tmp_path / "run" / "model"
    how = LaunchOptions(init=checkpoint, detach=True)
    assert recipe.launch_sweep(CONFIG, settings, site, how, ["seed=1,2"]) == 0
    assert recipe.launch_recipe(CONFIG, settings, site, how) == 0
    assert [_model_of(job) for job in submitted] == [made] * (2 + 5)
    assert [folder.name for folder in tmp_path.glob("run*")] == ["run"]


def test_a_hugging_face_folder_is_used_as_it_is(tmp_path: Path, hf: Path, site: str) -> None:
    _, config = read_run(CONFIG, _settings(tmp_path), site)
    begun, how = begin_with_init(config, [], LaunchOptions(init=hf)), LaunchOptions(init=hf)
    assert begun.model.path == hf
    provide_init(begun, how)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("init", "more", "expected"),
    [
        pytest.param("nowhere", [], "nowhere", id="not-there"),
        pytest.param("hf", ["model.path=x"], "say the same thing", id="said-twice"),
    ],
)
def test_a_model_that_cannot_be_taken_is_refused_before_anything_is_written(
    tmp_path: Path, hf: Path, site: str, submitted: list[JobFolder], dry_run: bool, init: str,
    more: list[str], expected: str,
) -> None:  # fmt: skip
    how: dict[str, Any] = {"init": tmp_path / init, "dry_run": dry_run}
    with pytest.raises(ValueError, match=expected) as refused:
        launch(CONFIG, [*_settings(tmp_path), *more], site, LaunchOptions(**how))
    assert isinstance(refused.value, ConfigError) == bool(more)
    assert submitted == []
    assert not (tmp_path / "jobs").exists()


def test_nothing_is_converted_for_a_run_that_does_not_fit_or_names_its_models(
    tmp_path: Path, checkpoint: Path, site: str, submitted: list[JobFolder]
) -> None:
    settings = _settings(tmp_path)
    how = LaunchOptions(init=checkpoint)
    with pytest.raises(ConfigError, match="--nodes"):
        launch(CONFIG, settings, site, LaunchOptions(init=checkpoint, nodes=3))
    with pytest.raises(ConfigError, match="one of them"):
        recipe.launch_sweep(CONFIG, settings, site, how, ["model.path=a,b"])
    unfit = [*settings, "policy.parallel.tensor_parallel_size=3"]
    for begin in (launch, recipe.launch_recipe):
        with pytest.raises(ConfigError, match="tensor_parallel_size"):
            begin(CONFIG, unfit, site, how)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        recipe.launch_sweep(CONFIG, unfit, site, how, ["seed=1,2"])
    assert submitted == []
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "jobs").glob("*")) == []
