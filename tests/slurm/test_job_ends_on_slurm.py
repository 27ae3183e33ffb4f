"""What befalls a job on real Slurm, and what it ends as."""

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest

from prefixrl_mcore.config.site import SiteConfig
from prefixrl_mcore.launch.slurm.follow import follow
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.states import job_state
from prefixrl_mcore.launch.slurm.submission import submit
from tests.slurm.conftest import LAUNCH_PYTHON
from tests.support.launched_jobs import colocated, prepare_program, submit_program, wait_for
from tests.support.tiny_run import CONFIG

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"),
]


def test_a_job_that_runs_out_of_memory_says_so(
    jobs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = tmp_path / "ci-local.toml"
    site.write_text(site.read_text().replace('memory = "4000"', 'memory = "100"'))
    command = [sys.executable, "-c", "print(len(bytearray(400 * 2**20)))"]
    job, job_id = submit_program(colocated(1, 1), command)
    assert follow(job, job_id, out=io.StringIO()) == 1
    assert "n1: task 0: Out Of Memory" in caplog.text


def test_a_kill_for_memory_that_the_run_outlives_does_not_decide_how_the_job_ends(
    jobs: Path, tmp_path: Path
) -> None:
    site = tmp_path / "ci-local.toml"
    site.write_text(site.read_text().replace('memory = "4000"', 'memory = "100"'))
    command = [sys.executable, "-m", "tests.support.outlives_kill_for_memory", "JOB_FOLDER"]
    job, job_id = submit_program(colocated(1, 1), command)
    assert follow(job, job_id, out=io.StringIO()) == 0
    said = job.batch_log.read_text()
    # Of both starts; what the tasks said themselves counts.
    assert said.count("n1: task 0: Out Of Memory") == 2
    assert f"start 0 of job {job_id} ended with exit code 75" in said
    assert f"start 1 of job {job_id} ended with exit code 0" in said
    state = job_state(job_id)
    assert (state.state, state.num_restarts) == ("COMPLETED", 1)


def test_a_job_that_a_better_one_displaces_is_signalled_and_runs_again(
    jobs: Path, tmp_path: Path
) -> None:
    site = tmp_path / "ci-local.toml"
    site.write_text(site.read_text().replace('"batch"', '"preemptible"'))
    ready = tmp_path / "ready"
    program = (
        "if ((SLURM_RESTART_COUNT)); then exit 0; fi; "
        f'trap "exit 138" USR1; touch {ready}; sleep 600 & wait'
    )
    job, job_id = submit_program(colocated(4, 1), ["bash", "-c", program])
    wait_for(ready.exists)
    better = ["srun", "--partition=batch", "--nodes=4", "--exclusive", "hostname"]
    displacing = subprocess.run(better, capture_output=True, text=True, check=True, timeout=180)
    assert sorted(displacing.stdout.split()) == ["n1", "n2", "n3", "n4"]
    assert follow(job, job_id, out=io.StringIO()) == 0
    assert job_state(job_id).num_restarts == 1
    assert "start 0 of job" in job.batch_log.read_text()
    assert "ended with exit code 138" in job.batch_log.read_text()


def test_a_job_that_slurm_requeues_more_often_than_it_may_ends_and_says_so(
    jobs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = tmp_path / "ci-local.toml"
    site.write_text(site.read_text().replace("max_restarts = 3", "max_restarts = 0"))
    ran = tmp_path / "ran"
    job, job_id = submit_program(colocated(1, 1), ["bash", "-c", f"echo >>{ran}; sleep 600"])
    wait_for(ran.exists)
    subprocess.run(["scontrol", "requeue", job_id], check=True)
    assert follow(job, job_id, out=io.StringIO()) == 78
    assert job_state(job_id).num_restarts == 1
    assert "started more often than requeue.max_restarts = 0 of the site allows" in caplog.text
    assert ran.read_text() == "\n"  # once


def test_a_job_that_is_told_to_end_by_sigterm_in_the_grace_saves_and_runs_again(
    jobs: Path, tmp_path: Path
) -> None:
    # Without a signal of its own, a job gets that of most clusters: SIGTERM, to its tasks alone.
    own = {"partition": "preemptible", "requeue": {"max_restarts": 3, "signal_seconds": None}}
    site = SiteConfig.model_validate(load_site("ci-local").model_dump() | own)
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    trainer = (
        "logs=$1/logs/start-${SLURM_RESTART_COUNT:-0}; "
        # Saving takes longer than servers would to end; they must be there until it is done.
        f'trap "sleep 3; [[ -e $logs/rollout-0.end.json ]] || touch {saved}; exit 143" TERM; '
        "while [[ ! -e $logs/rollout-0.server.json ]]; do sleep 0.1; done; "
        f"touch {ready}; "
        "((SLURM_RESTART_COUNT)) || { sleep 600 & wait; }"
    )
    rollout = [sys.executable, "-m", "prefixrl_mcore.launch.slurm.task", "JOB_FOLDER", "rollout"]
    job = prepare_program(
        site,
        dataclasses.replace(colocated(1, 1), servers_per_node=1),
        ["bash", "-c", trainer, "trainer", "JOB_FOLDER"],
        rollout,
        config=str(CONFIG),
    )
    submit(site, [job])
    assert job.job_id is not None
    wait_for(ready.exists)
    node = job_state(job.job_id).nodes
    better = ["srun", "--partition=batch", f"--nodelist={node}", "--exclusive", "true"]
    subprocess.run(better, check=True, timeout=180)
    assert follow(job, job.job_id, out=io.StringIO()) == 0
    assert saved.exists()
    assert job_state(job.job_id).num_restarts == 1
    said = job.batch_log.read_text()
    assert f"start 0 of job {job.job_id} ended with exit code 143" in said
    assert "back into the queue, preempted, to go on from what is saved" in said
    for start in (0, 1):
        end = job.read_end(start, "rollout-0")
        assert end is not None
        assert end.exit_code == 0  # told to end, not killed
