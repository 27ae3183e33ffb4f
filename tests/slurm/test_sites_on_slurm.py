"""What site profiles and clusters do to a job, asked of a real Slurm."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.layout import JobLayout
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.states import cancel_job
from tests.slurm.conftest import LAUNCH_PYTHON, ROOT
from tests.support.launched_jobs import colocated, end_of, submit_program

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"),
]


def _site(**more: object) -> SiteConfig:
    return SiteConfig.model_validate(load_site("ci-local").model_dump() | more)


def _component(number: str, index: int) -> dict[str, str]:
    """Return what Slurm says of one component of a heterogeneous job."""
    asked = ["scontrol", "--oneliner", "show", "job", f"{number}+{index}"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\S+?)=(\S+)", told))


def _set_features(features: str) -> None:
    """Let the first node have features."""
    told = [f"AvailableFeatures={features}", f"ActiveFeatures={features}"]
    subprocess.run(["scontrol", "update", "NodeName=n1", *told], check=True)


def test_the_components_of_a_heterogeneous_job_get_what_their_own_nodes_must_have(
    jobs: Path,
) -> None:
    layout = JobLayout(
        shape="heterogeneous",
        trainer_nodes=1,
        ranks_per_node=1,
        rollout_nodes=1,
        servers_per_node=1,
        rollout_gpus_per_node=2,
    )
    own = {"partition": "preemptible", "gpus_per_node": 2, "cpus_per_task": 2, "memory": "500"}
    site = _site(cpus_per_task=1, constraint="trainers", sbatch={"hold": True}, rollout_nodes=own)
    command = [sys.executable, "--version"]
    _set_features("trainers")
    try:
        _, number = submit_program(layout, command, command, site=site)
        first, second = (_component(number, index) for index in range(2))
        cancel_job(number)
    finally:
        _set_features("")
    assert (first["Partition"], second["Partition"]) == ("batch", "preemptible")
    assert (first["Features"], second["Features"]) == ("trainers", "(null)")
    assert (first["CPUs/Task"], second["CPUs/Task"]) == ("1", "2")
    assert (first["MinMemoryNode"], second["MinMemoryNode"]) == ("4000M", "500M")
    assert "TresPerNode" not in first
    assert second["TresPerNode"].endswith("gpu:2")


def test_tasks_get_what_the_script_exports_where_jobs_inherit_nothing(
    jobs: Path, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    lines = [f"export PYTHONPATH={ROOT}:{ROOT}/kernels SLURM_CONF={slurm}/etc/slurm.conf"]
    said = tmp_path / "said"
    command = ["bash", "-c", f"echo $PREFIXRL_TRAINER_HOSTS ${{#PREFIXRL_SGLANG_API_KEY}} >{said}"]
    job, _ = submit_program(colocated(1, 1), command, site=_site(setup_lines=lines))
    result, log = end_of(job)
    assert result == 0, log
    assert said.read_text().split() == ["n1", "64"]


def test_a_task_has_the_cpus_that_it_was_promised(jobs: Path, tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = ["bash", "-c", f"echo $SLURM_CPUS_PER_TASK $SLURM_CPU_BIND_TYPE >{said}"]
    job, _ = submit_program(colocated(1, 1), command, site=_site(cpus_per_task=2))
    result, log = end_of(job)
    assert result == 0, log
    assert said.read_text().split() == ["2", "none"]
