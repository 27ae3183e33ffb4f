"""A job in the queue: what is said of it, and when it is given up."""

import logging

import pytest

from prefixrl_mcore.launch.slurm.states import JobState, parse_scontrol
from prefixrl_mcore.launch.slurm.waiting import QueuedJob, in_words

QUEUED = JobState(
    state="PENDING", reason="BadConstraints", partition="batch", num_nodes=3, excluded="n[2-3]"
)
MINUTE = 20
"""Questions, three seconds apart."""


def _cancelled(states: list[JobState], in_service: list[set[str]]) -> list[str]:
    """Return what is cancelled while a job goes through states, with these nodes in service."""
    told: list[str] = []
    answers = iter(in_service)
    job = QueuedJob(
        "7",
        in_service=lambda partition: next(answers) if partition == "batch" else {"wrong"},
        names=lambda short: {"n[2-3]": ["n2", "n3"]}[short],
        cancel=told.append,
    )
    for state in states:
        job.see(state)
    return told


def test_a_job_that_finds_too_few_nodes_for_a_minute_is_cancelled_once_and_the_nodes_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    few = [{"n1", "n3", "n4"}] * 30
    assert _cancelled([QUEUED] * (MINUTE - 1), few) == []
    assert "cancelled" not in caplog.text
    with caplog.at_level(logging.ERROR):
        assert _cancelled([QUEUED] * (MINUTE + 5), few) == ["7"]
    assert (
        "job 7 is cancelled: without the bad nodes n[2-3] the partition batch has 2 nodes that "
        "are in service, the job needs 3"
    ) in caplog.text


@pytest.mark.parametrize(
    ("state", "in_service"),
    [
        pytest.param(QUEUED, [{"n1", "n2", "n4", "n5"}] * 30, id="enough"),
        pytest.param(QUEUED, [set[str]()] * 30, id="silent"),
        pytest.param(QUEUED, [{"n1"}, {"n1", "n4", "n5"}] * 15, id="now-and-then"),
        pytest.param(JobState(state="PENDING", num_nodes=3), [{"n1"}] * 30, id="none-excluded"),
        pytest.param(JobState(state="RUNNING", excluded="n[2-3]"), [{"n1"}] * 30, id="running"),
    ],
)
def test_a_job_that_may_still_start_is_left_alone(
    state: JobState, in_service: list[set[str]]
) -> None:
    assert _cancelled([state] * 30, in_service) == []


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
