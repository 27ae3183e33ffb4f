"""One local Slurm cluster for all tests of this folder."""

import os
import shutil
import subprocess
import sys
import tempfile
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


def missing_for_slurm() -> str | None:
    """Return why no local cluster can run here; None if one can."""
    if os.geteuid() != 0:
        return "the local Slurm cluster needs root"
    programs = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not installed: run slurm/testing/install.sh"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "this machine has no network namespaces"
    return None


@pytest.fixture(scope="session")
def slurm() -> Iterator[Path]:
    """Start four nodes with two pretended GPUs each; return the cluster's folder."""
    reason = missing_for_slurm()
    if reason is not None:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    done = run_cluster("up", folder, "--gpus", "2")
    assert done.returncode == 0, done.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "etc" / "slurm.conf")
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
        down = run_cluster("wipe", folder)
        assert down.returncode == 0, down.stderr


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
