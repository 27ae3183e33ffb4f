"""Site profiles: those that are shipped load, and faults are named."""

import json
from pathlib import Path

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.launch.slurm.sites import find_site, load_site

SITES = Path(__file__).parents[3] / "slurm" / "sites"


@pytest.mark.parametrize("file", sorted(SITES.glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_profiles_load_by_name(file: Path) -> None:
    assert find_site(file.stem) == file
    assert load_site(file.stem).job_folder != Path()


def test_shipped_profiles_are_there() -> None:
    assert {"ci-local", "bare-metal", "pyxis"} <= {file.stem for file in SITES.glob("*.toml")}


def _site(folder: Path, text: str) -> str:
    (folder / "my.toml").write_text(text)
    return str(folder / "my.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("gpus_per_nod = 8", "did you mean 'gpus_per_node'?", id="unknown"),
        pytest.param(
            "gpus_per_node = 8\n[requeue]\nmax_restart = 3",
            "requeue.max_restart: unknown key; did you mean 'max_restarts'?",
            id="unknown in a section",
        ),
        pytest.param("gpus_per_node = 0", "ranks_per_node is required", id="cpu without ranks"),
        pytest.param(
            "gpus_per_node = 4\nranks_per_node = 8", "must not exceed gpus_per_node = 4", id="ranks"
        ),
        pytest.param("gpus_per_node = 4\ntime = '4h'", "hours:minutes:seconds", id="time"),
        pytest.param(
            "gpus_per_node = 4\n[sbatch]\nmem = '1G'",
            "sbatch.mem: has a setting of its own, memory",
            id="sbatch option with a setting",
        ),
        pytest.param(
            "gpus_per_node = 4\n[sbatch]\ndep = 'afterok:1'",
            "sbatch.dep: short for dependency, which is the launcher's: the stages of a recipe",
            id="launcher's option in short",
        ),
        pytest.param(
            "gpus_per_node = 4\n[requeue]\nexit_codes = [75, 77]",
            "requeue.exit_codes: 77 is the pre-check's",
            id="the pre-check's exit code",
        ),
        pytest.param(
            "gpus_per_node = 4\n[requeue]\nexit_codes = [0]",
            "requeue.exit_codes: 0 is no exit code of a failure",
            id="success requeued",
        ),
        pytest.param(
            "gpus_per_node = 4\ntime = '00:04:00'\n[requeue]\nsignal_seconds = 180",
            "signal_seconds = 180 must be less than time = 00:04:00 (240 s) by more than 60 s",
            id="signal at the start",
        ),
        pytest.param(
            "gpus_per_node = 4\nsetup_lines = ['source /opt/nemo_run/env']",
            "setup_lines: contains /nemo_run, which NeMo-Run replaces",
            id="setup line that NeMo-Run rewrites",
        ),
        pytest.param(
            "gpus_per_node = 4\npython = '/opt/nemo_run_env/bin/python'",
            "python: contains /nemo_run",
            id="interpreter that NeMo-Run rewrites",
        ),
        pytest.param(
            "gpus_per_node = 4\nsetup_lines = ['a\\nb']".replace("'", '"'), "one line", id="lines"
        ),
    ],
)
def test_a_fault_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_site(_site(tmp_path, text))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "option",
    [
        *("dependency", "kill-on-invalid-dep", "array", "nodes", "ntasks", "job-name", "open-mode"),
        *("error", "chdir", "no-requeue", "no-kill", "export", "gpus", "gpus-per-task", "wait"),
        *("kill_on_invalid_dep", "ntasks_per_gpu", "exp"),
    ],
)
def test_options_of_the_launcher_are_refused_with_the_reason(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=f"sbatch.{option}: .*is the launcher's: .*"):
        load_site(_site(tmp_path, f"gpus_per_node = 4\nsbatch = {{ {option} = 'x' }}"))


def test_other_options_of_sbatch_are_taken(tmp_path: Path) -> None:
    text = "sbatch = { exclude = 'n7', wait-all-nodes = '1', mem-bind = 'local', nice = true }"
    assert len(load_site(_site(tmp_path, f"gpus_per_node = 4\n{text}")).sbatch) == 4


def test_the_latest_signal_is_taken(tmp_path: Path) -> None:
    text = "gpus_per_node = 4\ntime = '{}'\n[requeue]\nsignal_seconds = {}"
    hours = load_site(_site(tmp_path, text.format("120:00:00", 431_939)))
    assert hours.requeue.signal_seconds == 5 * 86400 - 61
    text = text.format("1-00:04:01", "{}")
    assert load_site(_site(tmp_path, text.format(86400 + 180))).requeue.signal_seconds == 86580
    with pytest.raises(ConfigError, match="86641 s"):
        load_site(_site(tmp_path, text.format(86400 + 181)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("container = { image = 'a', environment = ['WANDB_API_KEY=s3cr3t'] }", "entry 0 is not"),
        ("setup_lines = ['export WANDB_API_KEY=s3cr3t']", "setup_lines: gives WANDB_API_KEY a"),
        ("setup_lines = ['export A=1 hf_token=\"s3cr3t\"']", "setup_lines: gives hf_token a"),
        (
            "srun_args = ['--export=ALL,AWS_SECRET_ACCESS_KEY=s3cr3t']",
            "gives AWS_SECRET_ACCESS_KEY",
        ),
        ("setup_lines = ['AWS_ACCESS_KEY_ID=s3cr3t']", "gives AWS_ACCESS_KEY_ID a"),
        ("setup_lines = ['export DB_PASSWD=s3cr3t GH_PAT=$A']", "gives DB_PASSWD a"),
        ("setup_lines = ['export GITHUB_PAT=s3cr3t']", "gives GITHUB_PAT a"),
        ("sbatch = { comment = 'PASSWORD=s3cr3t' }", "sbatch.comment: gives PASSWORD a value"),
    ],
)
def test_secrets_in_a_profile_are_refused_and_not_repeated(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_site(_site(tmp_path, f"gpus_per_node = 4\n{text}"))
    assert message in str(refused.value)
    assert "s3cr3t" not in str(refused.value)


def test_secrets_that_come_from_elsewhere_are_taken(tmp_path: Path) -> None:
    lines = [
        *("export HF_TOKEN=$(cat ~/.token)", 'export WANDB_API_KEY="$KEY"', "export HF_TOKEN="),
        *("export TOKENIZERS_PARALLELISM=1 MONKEY=1", "source ~/.secrets"),
        *("export MAX_TOKENS=4096 PATH=/a:$PATH PREFIXRL_MAX_TOKENS='1'", "export KEY_FILE=k"),
    ]
    site = load_site(_site(tmp_path, f"gpus_per_node = 4\nsetup_lines = {json.dumps(lines)}"))
    assert list(site.setup_lines) == lines


def test_own_profiles_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ci-local.toml").write_text("gpus_per_node = 3")
    monkeypatch.setenv("PREFIXRL_SITES", str(tmp_path))
    assert load_site("ci-local").gpus_per_node == 3
    assert find_site("bare-metal") == SITES / "bare-metal.toml"


def test_an_unknown_profile_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="known are bare-metal, ci-local"):
        load_site("ci-lokal")
