"""Site profiles: those that are shipped load, and faults are named."""

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
            "gpus_per_node = 4\nsetup_lines = ['a\\nb']".replace("'", '"'), "one line", id="lines"
        ),
    ],
)
def test_a_fault_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_site(_site(tmp_path, text))
    assert message in str(refused.value)


def test_own_profiles_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ci-local.toml").write_text("gpus_per_node = 3")
    monkeypatch.setenv("PREFIXRL_SITES", str(tmp_path))
    assert load_site("ci-local").gpus_per_node == 3
    assert find_site("bare-metal") == SITES / "bare-metal.toml"


def test_an_unknown_profile_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="known are bare-metal, ci-local"):
        load_site("ci-lokal")
