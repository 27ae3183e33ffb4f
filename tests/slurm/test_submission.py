"""Several jobs submitted in one go by the real NeMo-Run, to a pretended sbatch."""

import os
import sys
from pathlib import Path

import pytest

from prefixrl_mcore.launch.slurm.job_folder import JobFolder, find_jobs
from prefixrl_mcore.launch.slurm.sites import load_site
from prefixrl_mcore.launch.slurm.states import SlurmError
from prefixrl_mcore.launch.slurm.submission import submit
from tests.slurm.conftest import LAUNCH_PYTHON
from tests.support.launched_jobs import colocated, prepare_program
from tests.support.processes import wait_until_gone

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not LAUNCH_PYTHON.exists(), reason="NeMo-Run: run make setup-launch"),
]

SBATCH = """#!/bin/bash
if grep -q -- --job-name=refused "${@: -1}"; then
    echo "sbatch: error: no more today" >&2
    exit 1
fi
env >"$SAID/inherited"
echo >>"$SAID/submitted"
if grep -q -- --job-name=vanishing "${@: -1}"; then
    rm -r "$(dirname "${@: -1}")"
fi
echo $((100 + $(wc -l <"$SAID/submitted")))
"""
COUNTED = """#!/bin/bash
echo >>"$SAID/processes"
exec {python} "$@"
"""


def _program(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put sbatch and scancel first on PATH; return where they keep what they were told."""
    programs = tmp_path / "programs"
    programs.mkdir()
    _program(programs / "sbatch", SBATCH)
    _program(programs / "scancel", '#!/bin/bash\necho "$@" >>"$SAID/cancelled"\n')
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SAID", str(tmp_path))
    return tmp_path


def _submit(folder: Path, *names: str) -> list[JobFolder]:
    """Submit jobs that wait for each other; return them."""
    python = _program(folder / "python", COUNTED.format(python=LAUNCH_PYTHON))
    site = load_site("ci-local").model_copy(
        update={"job_folder": folder / "jobs", "launch_python": python}
    )
    jobs: list[JobFolder] = []
    for name in names:
        after = jobs[-1] if jobs else None
        command = [sys.executable, "--version"]
        jobs.append(prepare_program(site, colocated(1, 1), command, name=name, after=after))
    submit(site, jobs)
    return jobs


@pytest.mark.slow
def test_all_jobs_of_a_launch_are_submitted_by_one_process_each_behind_the_one_before(
    pretended: Path,
) -> None:
    jobs = _submit(pretended, "first", "second", "third")
    assert [job.job_id for job in jobs] == ["101", "102", "103"]
    lines = [
        [line for line in job.script.read_text().splitlines() if "--dependency" in line]
        for job in jobs
    ]
    after = "#SBATCH --dependency=afterok:10"
    assert lines == [[], [f"{after}1"], [f"{after}2"]]
    for job in jobs:
        assert f"mkdir -p {job.logs}/start-$start" in job.script.read_text()
    assert (pretended / "processes").read_text() == "\n"


@pytest.mark.slow
def test_a_refused_job_takes_those_before_it_out_of_the_queue(pretended: Path) -> None:
    with pytest.raises(SlurmError, match=r"submission of refused-.* failed: sbatch: error: no mo"):
        _submit(pretended, "first", "second", "refused", "fourth")
    assert (pretended / "cancelled").read_text().split() == ["101", "102"]
    left = [job.path.name for job in find_jobs(pretended / "jobs")]
    assert [name.partition("-")[0] for name in left] == ["first", "second"]


@pytest.mark.slow
def test_a_job_that_is_lost_behind_its_submission_is_taken_out_of_the_queue(
    pretended: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _program(
        pretended / "programs" / "scancel",
        '#!/bin/bash\necho "$@" >>"$SAID/cancelled"\n'
        '[[ $1 != 101 ]] || { echo "too late" >&2; exit 1; }\n',
    )
    with pytest.raises(SlurmError, match="submission of vanishing"):
        _submit(pretended, "first", "vanishing", "third")
    assert (pretended / "cancelled").read_text().split() == ["101", "102"]
    assert "is still submitted: scancel 101: too late" in caplog.text


@pytest.mark.slow
def test_a_job_whose_number_cannot_be_kept_is_taken_out_of_the_queue(
    pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(JobFolder, "write_submitted", refuse)
    with pytest.raises(OSError, match="Disk quota exceeded"):
        _submit(pretended, "first")
    assert (pretended / "cancelled").read_text().split() == ["101"]


@pytest.mark.slow
def test_a_job_whose_submission_is_interrupted_is_taken_out_of_the_queue(
    pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ctrl-C after slurmctld has the job, and before sbatch has its number.
    _program(
        pretended / "programs" / "sbatch",
        '#!/bin/bash\necho >>"$SAID/submitted"\n[[ -e $SAID/told ]] || kill -INT "$LAUNCHER"\n'
        'touch "$SAID/told"\nsleep 1\necho $((100 + $(wc -l <"$SAID/submitted")))\n',
    )
    monkeypatch.setenv("LAUNCHER", str(os.getpid()))
    with pytest.raises(KeyboardInterrupt):
        _submit(pretended, "first")
    assert (pretended / "cancelled").read_text().split() == ["101"]


@pytest.mark.slow
def test_two_interrupts_end_a_submission_at_once(
    pretended: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _program(
        pretended / "programs" / "sbatch",
        '#!/bin/bash\necho $$ >"$SAID/pid"\nkill -INT "$LAUNCHER"\nsleep 1\n'
        'kill -INT "$LAUNCHER"\nsleep 600\n',
    )
    monkeypatch.setenv("LAUNCHER", str(os.getpid()))
    with pytest.raises(KeyboardInterrupt):
        _submit(pretended, "first")
    assert wait_until_gone([int((pretended / "pid").read_text())]) == []
    assert "`squeue --me` shows" in caplog.text


@pytest.mark.slow
def test_a_job_inherits_nothing_of_the_job_that_it_is_launched_in(
    pretended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": "3",
        "SLURM_EXPORT_ENV": "NONE",
        "SRUN_CPUS_PER_TASK": "1",
        "SBATCH_ACCOUNT": "another",
        "SBATCH_EXPORT_FILE": "file",
        "PMI_RANK": "0",
        "PMIX_RANK": "0",
        "PMI2_SIZE": "4",
        "PREFIXRL_TRAINER_HOSTS": "x",
        "PREFIXRL_JOB_END_UNIX_SECONDS": "1",
        "CUDA_VISIBLE_DEVICES": "3",
    }
    kept = {
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "SLURM_JWT": "t0ken",
        "SBATCH_EXPORT": "ALL",
        "WANDB_API_KEY": "k",
        "PREFIXRL_SGLANG_API_KEY": "the-users-own-k3y",
    }
    for name, value in {**others, **kept}.items():
        monkeypatch.setenv(name, value)
    _submit(pretended, "first")
    lines = (pretended / "inherited").read_text().splitlines()
    inherited = dict(line.split("=", 1) for line in lines if "=" in line)
    assert others.keys() & inherited.keys() == set()
    assert {name: inherited.get(name) for name in kept} == kept
