"""One local Slurm cluster for all tests of this folder."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "slurm" / "testing" / "cluster.py"
LAUNCH_PYTHON = ROOT / ".venv-launch" / "bin" / "python"


def run_cluster(command: str, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of the cluster tool."""
    return subprocess.run(
        [sys.executable, str(CLUSTER), command, "--dir", str(folder), *options],
        capture_output=True,
        text=True,
        check=False,
    )


def skip_unless_it_can_run(folder: Path, *options: str) -> None:
    """Skip the test where ``up`` would refuse the machine, and say why."""
    done = run_cluster("check", folder, *options)
    if done.returncode:
        pytest.skip(done.stderr.strip())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """Start four nodes with two pretended GPUs each; return the cluster's folder."""
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        skip_unless_it_can_run(folder)
        folder.chmod(0o755)
        done = run_cluster("up", folder, "--gpus", "2")
        assert done.returncode == 0, done.stderr  # and nothing is left of it
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SLURM_CONF", str(folder / "etc" / "slurm.conf"))
                yield folder
        finally:
            down = run_cluster("wipe", folder)
            assert down.returncode == 0, down.stderr


@pytest.fixture
def slurm(cluster: Path) -> Iterator[Path]:
    """Begin on idle nodes, and leave no job to the next test; return the cluster's folder."""
    deadline = time.monotonic() + 120
    while (states := _said("sinfo", "--Node", "--partition=batch", "--format=%t")) != ["idle"] * 4:
        assert time.monotonic() < deadline, f"the nodes are {states}"
        time.sleep(0.1)
    yield cluster
    for job in set(_said("squeue", "--format=%A")):  # of a test that failed
        subprocess.run(["scancel", job], check=False)


def _said(*command: str) -> list[str]:
    """Return the words that a command of Slurm prints."""
    done = subprocess.run([*command, "--noheader"], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture
def jobs(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let ``--site ci-local`` be the shipped profile with paths of its own; return the jobs."""
    shipped = (ROOT / "slurm" / "sites" / "ci-local.toml").read_text()
    folder = tmp_path / "jobs"
    own = f'job_folder = "{folder}"\nlaunch_python = "{LAUNCH_PYTHON}"\n'
    (tmp_path / "ci-local.toml").write_text(own + shipped)
    monkeypatch.setenv("PREFIXRL_SITES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/kernels")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    return folder
