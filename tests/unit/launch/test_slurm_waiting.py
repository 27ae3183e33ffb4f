"""A job in the queue: what is said of it, and when it is given up."""

import logging
from pathlib import Path

import pytest

from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.states import JobState, SlurmError, parse_scontrol
from prefixrl_mcore.launch.slurm.waiting import QueuedJob, in_words

NEVER = JobState(
    state="PENDING", reason="BadConstraints", partition="batch", num_nodes=3, excluded="n[2-3,7]"
)
DRAINED = JobState(
    state="PENDING", reason="ReqNodeNotAvail,_UnavailableNodes:n4", num_nodes=3, excluded="n2"
)
MINUTE = 20
"""Questions, three seconds apart."""


def _job(tmp_path: Path, *bad: str) -> JobFolder:
    """Return a job whose starts left out these nodes."""
    job = JobFolder(tmp_path / "job")
    for start, names in enumerate(bad):
        job.start_folder(start).mkdir(parents=True)
        (job.start_folder(start) / "precheck.bad").write_text(names)
    return job


def _cancelled(job: JobFolder, states: list[JobState]) -> list[str]:
    """Return what is cancelled while a job goes through states."""
    told: list[str] = []
    queued = QueuedJob("7", job, cancel=told.append)
    for state in states:
        queued.see(state)
    return told


def test_a_job_that_can_never_start_without_its_bad_nodes_is_cancelled_once_and_they_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = _job(tmp_path, "n2,n3\n", "n3\n")
    assert _cancelled(job, [NEVER] * (MINUTE - 1)) == []
    assert "cancelled" not in caplog.text
    with caplog.at_level(logging.ERROR):
        assert _cancelled(job, [NEVER] * (MINUTE + 5)) == ["7"]
    assert "job 7 is cancelled: without the bad nodes n2,n3 no nodes that" in caplog.text
    assert "(3 nodes of partition batch)" in caplog.text


@pytest.mark.parametrize(
    ("bad", "states"),
    [
        pytest.param(["n2"], [DRAINED] * 500, id="nodes-that-come-back"),
        pytest.param(["n2"], [NEVER, DRAINED] * 30, id="now-and-then"),
        pytest.param([], [NEVER] * 500, id="excluded-by-its-site"),
        pytest.param(["n2"], [JobState(state="RUNNING", excluded="n2")] * 30, id="running"),
    ],
)
def test_a_job_that_may_still_start_is_left_alone(
    tmp_path: Path, bad: list[str], states: list[JobState]
) -> None:
    assert _cancelled(_job(tmp_path, *bad), states) == []


def test_a_job_that_slurm_does_not_cancel_waits_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(job_id: str) -> None:
        raise SlurmError(f"scancel {job_id}: not now")

    queued = QueuedJob("7", _job(tmp_path, "n2"), cancel=refuse)
    for _ in range(MINUTE + 5):
        queued.see(NEVER)
    assert caplog.text.count("job 7 waits on: scancel 7: not now") == 1


def test_a_job_that_waits_says_for_what() -> None:
    said = (
        "JobId=7 JobState=PENDING Reason=Resources Restarts=1 ExitCode=0:0 Partition=batch "
        "ReqNodeList=(null) ExcNodeList=n2 NodeList= NumNodes=2-2 NumCPUs=2"
    )
    state = parse_scontrol(said)
    assert (state.partition, state.num_nodes, state.excluded) == ("batch", 2, "n2")
    assert in_words(state) == (
        "PENDING (Resources) after 1 restart(s): it waits for nodes to become free; it may not "
        "have n2"
    )
    limit = JobState(state="PENDING", reason="QOSMaxNodePerUserLimit")
    assert in_words(limit) == "PENDING (QOSMaxNodePerUserLimit): a limit of its QOS is reached"
    held = ("JobHeldAdmin", "JobHeldUser", "launch_failed_requeued_held")
    assert ["scontrol release" in in_words(JobState(state="PENDING", reason=r)) for r in held] == [
        True
    ] * 3
    assert in_words(JobState(state="PENDING", reason="Prolog")) == "PENDING (Prolog)"
    running = JobState(state="RUNNING", nodes="n1", excluded="n2")
    assert in_words(running) == "RUNNING on n1"
