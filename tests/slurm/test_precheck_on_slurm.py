"""Nodes that fail the pre-check, on real Slurm: named, left out, and the job ends on others."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.layout import JobLayout
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.states import job_state
from tests.slurm.conftest import LAUNCH_PYTHON
from tests.support.launched_jobs import colocated, end_of, submit_program

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"),
]


@contextmanager
def _another_folder(cluster: Path, node: str, folder: Path, other: Path) -> Iterator[None]:
    """Let ``folder`` be ``other`` for all that Slurm starts on a node."""
    daemons = json.loads((cluster / "pids.json").read_text())
    pid = next(daemon["pid"] for daemon in daemons if daemon["name"] == f"slurmd-{node}")
    inside = ["nsenter", f"--mount=/proc/{pid}/ns/mnt"]
    folder.mkdir(exist_ok=True)
    other.mkdir()
    subprocess.run([*inside, "mount", "--bind", str(other), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "umount", "--lazy", str(folder)], check=True)


def test_a_node_whose_folder_is_not_shared_is_left_out_and_the_job_ends_on_others(
    slurm: Path, jobs: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    command = ["bash", "-c", f"hostname >>{ran}"]
    with _another_folder(slurm, "n2", jobs, tmp_path / "other"):
        job, job_id = submit_program(colocated(2, 1), command)
        result, said = end_of(job)
    assert result == 0, said
    assert "bad node n2: job_folder is not shared" in said
    assert "back into the queue, without n2" in said
    others = sorted(ran.read_text().split())
    assert len(others) == 2
    assert set(others) <= {"n1", "n3", "n4"}
    assert job_state(job_id).num_restarts == 1
    first, second = (json.loads((s / "precheck.json").read_text()) for s in job.starts())
    assert (first["outcome"], list(first["bad"])) == ("exclude", ["n2"])
    assert (second["outcome"], sorted(second["findings"])) == ("go", others)
    asked = ["scontrol", "--oneliner", "show", "job", job_id]
    told = subprocess.run(asked, capture_output=True, text=True, check=True, env={**os.environ})
    assert "ExcNodeList=n2" in told.stdout


def test_a_bad_rollout_node_is_left_out_of_a_heterogeneous_job(
    slurm: Path, jobs: Path, tmp_path: Path
) -> None:
    layout = JobLayout(
        shape="heterogeneous",
        trainer_nodes=1,
        ranks_per_node=1,
        rollout_nodes=1,
        servers_per_node=1,
        rollout_gpus_per_node=0,
    )
    own = load_site("ci-local").model_dump() | {"rollout_nodes": {"partition": "preemptible"}}
    site = SiteConfig.model_validate(own)
    ran = tmp_path / "ran"
    begin = f"echo $SLURMD_NODENAME >>{ran}"
    # The first task's end ends the other, which may begin later.
    until_both = f"{begin}; until (($(wc -l <{ran}) == 2)); do sleep 0.1; done"
    tasks = [["bash", "-c", until_both], ["bash", "-c", f"{begin}; sleep 600"]]
    with _another_folder(slurm, "n2", jobs, tmp_path / "other"):
        job, job_id = submit_program(layout, *tasks, site=site)
        result, said = end_of(job)
    assert result == 0, said
    assert "bad node n2: job_folder is not shared" in said
    assert job_state(job_id).num_restarts == 1
    nodes = ran.read_text().split()
    assert len(set(nodes)) == 2
    assert set(nodes) <= {"n1", "n3", "n4"}
    verdicts = [json.loads((s / "precheck.json").read_text()) for s in job.starts()]
    assert [verdict["outcome"] for verdict in verdicts] == ["exclude", "go"]
    assert sorted(verdicts[1]["findings"]) == sorted(nodes)


def test_a_node_that_is_half_a_minute_slower_than_the_others_is_waited_for(
    jobs: Path, tmp_path: Path
) -> None:
    slow = tmp_path / "python"
    slow.write_text(
        f'#!/bin/bash\n[[ $SLURMD_NODENAME != n2 ]] || sleep 40\nexec {sys.executable} "$@"\n'
    )
    slow.chmod(0o755)
    site = load_site("ci-local").model_copy(update={"python": slow})
    job, job_id = submit_program(colocated(3, 1), ["sleep", "0"], site=site)
    result, said = end_of(job)
    assert result == 0, said
    assert job_state(job_id).num_restarts == 0
    report = json.loads((job.starts()[0] / "precheck.json").read_text())
    assert (report["outcome"], sorted(report["findings"])) == ("go", ["n1", "n2", "n3"])


def test_a_job_that_would_wait_for_ever_for_nodes_ends_and_names_those_that_it_left_out(
    slurm: Path, jobs: Path, tmp_path: Path
) -> None:
    with _another_folder(slurm, "n2", jobs, tmp_path / "other"):
        job, job_id = submit_program(colocated(4, 1), ["sleep", "0"])
        result, said = end_of(job)
    assert result == 78, said
    assert (
        "prefixrl: error: without the bad nodes n2 the partition batch has 3 nodes, the job needs 4"
    ) in said
    assert job_state(job_id).num_restarts == 0
