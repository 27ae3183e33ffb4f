"""What a newcomer to a cluster gets wrong, and is told before anything is submitted."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.load import load_config, with_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm import launch, recipe
from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.launch import LaunchOptions
from prefixrl_mcore.launch.slurm.sites import load_site
from tests.support.recipe_layouts import RECIPES, recipe_file
from tests.support.released_configs import write_shape

QWEN3_4B, _, QWEN3_32B, _ = (recipe_file(one) for one in RECIPES)

SITE = """
gpus_per_node = 8
job_folder = "{folder}/jobs"
python = "/usr/bin/python3"
"""


@pytest.fixture
def site(tmp_path: Path) -> str:
    """Return a site whose jobs go into a temporary folder."""
    file = tmp_path / "my-site.toml"
    file.write_text(SITE.format(folder=tmp_path))
    return str(file)


def _refusal(file: Path, site: str, *settings: str, **how: Any) -> str:
    """Return why a run is refused."""
    my_site, config = launch.read_run(file, settings, site)
    with pytest.raises(ConfigError) as refused:
        launch.prepare_run(config, my_site, LaunchOptions(**how))
    return str(refused.value)


def _warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


@pytest.mark.parametrize("path", ["~/jobs", "$HOME/jobs", "/shared/${USER}"])
def test_paths_of_a_site_are_written_out(path: str) -> None:
    values = {"gpus_per_node": 8, "job_folder": path}
    expected = (
        f"job_folder: must be written out: neither ~ nor $VARIABLES are replaced, got {path!r}"
    )
    with pytest.raises(ConfigError, match=re.escape(expected)):
        validate(SiteConfig, values, where="my-site.toml")


def test_text_without_quotes_is_shown_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "my-site.toml"
    file.write_text("gpus_per_node = 8\naccount = my-account\n")
    expected = r"not valid TOML: .*line 2.*'account = my-account' \(text stands in quotes\)"
    with pytest.raises(ConfigError, match=expected):
        load_site(str(file))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("srun_args", "--mpi=pmix", "srun_args: must be a list, [...], got '--mpi=pmix'"),
        ("memory", 0, "memory: must be text, in quotes, got 0"),
        ("gpu_requests", "gres", "gpu_requests: unknown key; did you mean 'gpu_request'?"),
    ],
)
def test_a_value_of_another_kind_is_told_in_words_of_toml(
    key: str, value: object, expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        validate(SiteConfig, {"gpus_per_node": 8, key: value}, where="my-site.toml")


def test_a_flag_is_not_a_setting() -> None:
    with pytest.raises(ConfigError, match=r"'--dryrun': no such option; settings have no dashes"):
        with_settings({}, ["--dryrun"])


def test_a_site_file_that_is_not_there_is_the_sites_fault() -> None:
    with pytest.raises(ConfigError, match=r"--site other\.toml: there is no such file in /"):
        load_site("other.toml")


def test_servers_of_a_split_job_are_counted_by_its_nodes(site: str) -> None:
    message = _refusal(QWEN3_4B, site, shape="split")
    assert "leave out rollout.sglang.num_servers = 4 and rollout.colocated = true" in message
    message = _refusal(QWEN3_32B, site, shape="split")
    assert message.endswith("leave out rollout.colocated = true")


def test_rollout_nodes_without_a_shape_are_refused(site: str) -> None:
    message = _refusal(QWEN3_32B, site, rollout_nodes=2)
    assert "needs --shape split or heterogeneous, got colocated: there every node gen" in message


def test_a_forgotten_shape_is_refused(site: str) -> None:
    message = _refusal(QWEN3_32B, site, "rollout.colocated=false")
    assert "8 trainer ranks + 1 servers x TP 8 = 16 GPUs" in message
    assert "set rollout.colocated = true" in message
    assert "prefixrl launch --shape split" in message


@pytest.mark.parametrize(
    ("settings", "num_servers"),
    [
        pytest.param([], 1, id="one is a node"),
        pytest.param(["rollout.sglang.tensor_parallel_size=4"], 2, id="of several nodes"),
        pytest.param(["rollout.sglang.tensor_parallel_size=3"], 2, id="a remainder"),
        pytest.param(
            ["rollout.sglang.tensor_parallel_size=4", "rollout.engine=transformers"],
            1,
            id="no server",
        ),
    ],
)
def test_a_stage_without_training_fills_its_node_with_servers(
    site: str, settings: list[str], num_servers: int
) -> None:
    my_site, config = launch.read_run(QWEN3_32B, settings, site)
    for stage in ("collect", "eval"):
        folder = launch.prepare_run(config, my_site, LaunchOptions(dry_run=True), stage=stage)
        assert load_config(RunConfig, folder.config, []).rollout.sglang.num_servers == num_servers
        assert folder.read_task().num_servers == 0  # the stage itself starts them
    no_gpus = my_site.model_copy(update={"gpus_per_node": 0})
    folder = launch.prepare_run(config, no_gpus, LaunchOptions(dry_run=True), stage="prefixes")
    assert load_config(RunConfig, folder.config, []).rollout.sglang.num_servers == 1


def test_a_server_larger_than_the_node_of_a_stage_is_refused(site: str) -> None:
    my_site, config = launch.read_run(QWEN3_32B, [], site)
    small = my_site.model_copy(update={"gpus_per_node": 4})
    with pytest.raises(ConfigError, match=r"1 servers x TP 8 = 8 GPUs, but the node .* has 4"):
        launch.prepare_run(config, small, LaunchOptions(), stage="collect")


def test_gpus_of_one_node_that_do_not_sample_are_told(
    site: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = f"model.path={write_shape(RECIPES[0].release, tmp_path)}"
    _refusal(QWEN3_4B, site, model, "rollout.sglang.num_servers=1")
    assert "2 of 8 GPUs sample: rollout.sglang.num_servers = 1 x TP 2" in _warnings(caplog)


def test_a_colocated_run_of_whole_nodes_has_no_warning(
    site: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = f"model.path={write_shape(RECIPES[0].release, tmp_path)}"
    message = _refusal(QWEN3_4B, site, model)
    assert _warnings(caplog) == ""
    assert message.startswith("not there: data/hard_problems.jsonl, data/aime25.jsonl")
    assert (
        "runs/qwen3_4b/prefixes, runs/qwen3_4b/traces; traces and prefixes are made by" in message
    )


def test_missing_data_is_a_warning_of_a_dry_run_and_of_no_later_stage(
    site: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    my_site, config = launch.read_run(QWEN3_4B, [], site)
    launch.prepare_run(config, my_site, LaunchOptions(dry_run=True))
    assert "not there: data/hard_problems.jsonl" in _warnings(caplog)
    (tmp_path / "problems.jsonl").write_text("")
    own = [f"data.problems={tmp_path}/problems.jsonl", "data.held_out={}"]
    my_site, config = launch.read_run(QWEN3_4B, own, site)
    caplog.clear()
    before = launch.prepare_run(config, my_site, LaunchOptions(), stage="collect")
    launch.prepare_run(config, my_site, LaunchOptions(dry_run=True), after=before)
    assert "not there:" not in _warnings(caplog)


def test_an_interpreter_that_is_not_here_is_told(
    site: str, caplog: pytest.LogCaptureFixture
) -> None:
    Path(site).write_text(Path(site).read_text().replace("/usr/bin/python3", "/else/python"))
    my_site, config = launch.read_run(QWEN3_4B, [], site)
    launch.prepare_run(config, my_site, LaunchOptions(dry_run=True))
    assert "python of the site /else/python is not here; nodes must have it" in _warnings(caplog)


def test_runs_of_a_sweep_read_the_traces_of_the_run_that_they_vary(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[RunConfig] = []

    def note(config: RunConfig, *_: object) -> JobFolder:
        configs.append(config)
        return JobFolder(Path("/nowhere"))

    monkeypatch.setattr(recipe, "prepare_run", note)
    monkeypatch.setattr(recipe, "submit", lambda *_: None)
    how = LaunchOptions(detach=True)
    assert recipe.launch_sweep(QWEN3_4B, [], site, how, ["seed=1,2"]) == 0
    assert [str(c.run_folder) for c in configs] == [f"runs/qwen3_4b-seed-{i}" for i in (1, 2)]
    assert {str(c.traces_folder) for c in configs} == {"runs/qwen3_4b/traces"}
    assert {str(c.prefixes_folder) for c in configs} == {"runs/qwen3_4b/prefixes"}
    own = ["data.prefixes=elsewhere"]
    configs.clear()
    recipe.launch_sweep(QWEN3_4B, own, site, how, ["seed=1,2"])
    assert {str(c.prefixes_folder) for c in configs} == {"elsewhere"}


def test_a_sweep_over_run_folders_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--sweep run_folder=a,b: each run has a folder"):
        recipe.sweep_points(["run_folder=a,b"])


def test_jobs_are_found_by_their_site(
    site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["jobs", "list", "--site", site]) == 2
    assert f"{tmp_path}/jobs: no job was launched into this folder" in capsys.readouterr().err
    (tmp_path / "jobs").mkdir()
    assert main(["jobs", "list", "--site", site]) == 0
    assert main(["jobs", "status", "12", "--site", site]) == 2
    error = capsys.readouterr().err
    assert f"12: no job of {tmp_path}/jobs; known: none" in error
    assert "say --site SITE, or --jobs FOLDER" in error
