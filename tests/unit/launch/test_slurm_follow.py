"""Following a job: through a requeue, to the exit code, with the cause of a failure."""

import io
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.launch.slurm import job_folder, waiting
from prefixrl_mcore.launch.slurm import jobs as jobs_module
from prefixrl_mcore.launch.slurm.end_report import report_end
from prefixrl_mcore.launch.slurm.follow import LogReader, follow
from prefixrl_mcore.launch.slurm.job_folder import (
    JobFolder,
    TaskEnd,
    TaskFile,
    find_job,
    find_jobs,
)
from prefixrl_mcore.launch.slurm.jobs import list_jobs, show_logs, show_status
from prefixrl_mcore.launch.slurm.states import JobState
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.observability.stall_report import Beat


def _job(tmp_path: Path) -> JobFolder:
    job = JobFolder.make(tmp_path, "job")
    _write(job, "trainer", tmp_path / "work")
    job.write_submitted("7")
    job.batch_log.touch()
    return job


def _write(job: JobFolder, role: str, work: Path) -> None:
    """Write a job's file: of a first step of ``role``, launched from ``work``."""
    task = TaskFile(
        config="c",
        run_folder="run",
        working_directory=str(work),
        is_resumed=False,
        num_servers=0,
        gpus_per_server=0,
    )
    job.write(task, {"tasks": [{"role": role}]})


def _follow(job: JobFolder, *states: JobState) -> tuple[int, str]:
    """Follow a job whose states are these, one after the other."""
    told: Iterator[JobState] = iter(states)
    out = io.StringIO()
    result = follow(job, "7", ask=lambda _: next(told), sleep=lambda _: None, out=out)
    assert next(told, None) is None  # not given up before the last
    return result, out.getvalue()


RUNNING = JobState(state="RUNNING", nodes="n1")
FAILED = JobState(state="FAILED", exit_code=3)


def test_a_job_that_passes_through_an_ended_state_into_the_queue_is_followed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = _job(tmp_path)
    pending = JobState(state="PENDING", reason="BeginTime", num_restarts=1)
    done = JobState(state="COMPLETED", num_restarts=1)
    with caplog.at_level(logging.INFO, logger="prefixrl_mcore"):
        assert _follow(job, RUNNING, RUNNING, FAILED, pending, RUNNING, done, done)[0] == 0
    assert "job 7: PENDING (BeginTime) after 1 restart(s)" in caplog.text
    assert caplog.text.count("job 7: RUNNING on n1") == 2  # told when it changes


def test_slurm_may_be_silent_for_ten_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each question takes three minutes, in which Slurm does not answer.
    clock = itertools.count(0, 180)
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    silent = JobState(state="UNKNOWN")
    assert _follow(_job(tmp_path), RUNNING, *[silent] * 3, FAILED, FAILED)[0] == 3
    assert _follow(_job(tmp_path), RUNNING, *[silent] * 4)[0] == 69


def test_the_task_that_failed_first_is_shown_with_its_last_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = _job(tmp_path)
    for start, task, code, seconds in (
        (0, "trainer-3", 9, 1.0),  # an earlier start
        (1, "trainer-0", 143, 30.0),
        (1, "trainer-1", 0, 10.0),
        (1, "trainer-2", 3, 20.0),
    ):
        end = TaskEnd(task=task, node=f"node-{task[-1]}", exit_code=code, unix_seconds=seconds)
        job.write_end(start, end)
    lines = "\n".join(f"line {number}" for number in range(1, 31))
    (job.starts()[1] / "trainer-2.log").write_text(lines)
    job.batch_log.write_text("hello\nsrun: error: node-9: task 9: Out Of Memory\n")
    assert _follow(job, FAILED, FAILED)[0] == 3
    assert "trainer-2 on node-2 was the first to report, exit code 3:\nline 11\n" in caplog.text
    assert "line 30" in caplog.text
    assert "line 10\n" not in caplog.text
    assert "errors:\nsrun: error: node-9: task 9: Out Of Memory\n" in caplog.text


def _write_beat(folder: Path, rank: int, *, phase: str, seconds: float) -> None:
    """Write a rank's heartbeat."""
    beat = Beat(
        rank=rank, host=f"node-{rank}", pid=1, stage=0, step="step 3", phase=phase, num_changes=1,
        num_beats=0, seconds=0.0, time=seconds, answers=0,
    )  # fmt: skip
    write_json_atomic(folder / f"rank-{rank:05d}.json", asdict(beat))


def test_a_failure_names_the_phase_the_ranks_without_a_word_and_the_watchdogs_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, beats = _job(tmp_path), tmp_path / "work" / "run" / "heartbeats"
    beats.mkdir(parents=True)
    (beats / "stall-00001.txt").write_text("of an earlier start")
    os.utime(beats / "stall-00001.txt", (1.0, 1.0))
    job.write_begin(0)
    now = time.time()
    (beats / "stall-00002.txt").write_text("stall: rank 1 late")
    os.utime(beats / "stall-00002.txt", (now, now))  # the kernel's own clock is behind this one
    for rank, age in ((0, 0.0), (1, 0.0), (2, 3600.0)):
        _write_beat(beats, rank, phase=f"phase-{rank}", seconds=now - age)
        (job.starts()[0] / f"trainer-{rank}.log").write_text(f"of {rank}")
    end = TaskEnd(task="trainer-0", node="node-0", exit_code=1, unix_seconds=now)
    job.write_end(0, end)
    assert _follow(job, FAILED, FAILED)[0] == 3
    said = caplog.text
    seen = "last seen in phase phase-{} of step 3"
    assert f"trainer-0 on node-0 was the first to report, exit code 1, {seen.format(0)}:\n" in said
    first = f"trainer-1 on node-1 was killed, or its node is lost, {seen.format(1)}:\nof 1\n"
    assert said.index(first) < said.index("trainer-0 on node-0")  # it cannot say so itself
    assert (
        "trainer-2 was killed, or its node is lost:\nof 2\n" in said
    )  # its heartbeat is an hour old
    assert f"their stacks, and who was late: {beats / 'stall-00002.txt'}" in said
    assert "stall-00001" not in said


def test_a_killed_task_leaves_the_batch_scripts_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = _job(tmp_path)
    job.batch_log.write_text("slurmstepd: error: Detected 1 oom-kill event(s)\n")
    assert _follow(job, *[JobState(state="OUT_OF_MEMORY", exit_code=253)] * 2)[0] == 253
    assert "Detected 1 oom-kill event(s)" in caplog.text


def test_what_the_batch_script_says_of_its_last_start_is_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = _job(tmp_path)
    end = TaskEnd(task="trainer-0", node="node-0", exit_code=138, unix_seconds=0.0)
    job.write_end(0, end)
    (job.logs / "start-1").mkdir()
    job.batch_log.write_text(
        "prefixrl: job 7, start 0, on n1\nprefixrl: error: of the first start\n"
        "prefixrl: job 7, start 1, on n1\nprefixrl: error: started too often\n"
    )
    failed = JobState(state="FAILED", exit_code=78, num_restarts=1)
    assert _follow(job, failed, failed)[0] == 78
    assert "job 7: started too often\n" in caplog.text
    assert "of the first start" not in caplog.text
    assert "trainer-0" not in caplog.text
    assert "no task says why" not in caplog.text


def test_what_is_added_to_the_logs_is_written_once_and_in_order_of_the_starts(
    tmp_path: Path,
) -> None:
    job = _job(tmp_path)
    for start in (2, 10):
        (job.logs / f"start-{start}").mkdir()
        (job.logs / f"start-{start}" / "trainer-0.log").write_text(f"start {start}\n")
    reader, out = LogReader(job, "trainer-0"), io.StringIO()
    reader.write_new(out)
    job.batch_log.write_text("batch\n")
    with (job.logs / "start-10" / "trainer-0.log").open("a") as log:
        log.write("more\n")
    reader.write_new(out)
    reader.write_new(out)
    assert out.getvalue() == "start 2\nstart 10\nbatch\nmore\n"


def _begin(job: JobFolder, num_tasks: int) -> None:
    """Let the tasks of a start begin, with a line of each in its log."""
    job.write_begin(0)
    for rank in range(num_tasks):
        (job.starts()[0] / f"trainer-{rank}.log").write_text(f"of {rank}")


def _end(job: JobFolder, rank: int, exit_code: int) -> None:
    end = TaskEnd(task=f"trainer-{rank}", node="n", exit_code=exit_code, unix_seconds=1.0)
    job.write_end(0, end)


def _shown_late(
    waits: list[float], number: int, show: Callable[[], object]
) -> Callable[[float], None]:
    """Return a sleep that notes in ``waits`` for how long, and shows something at its n-th call."""

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == number:
            show()

    return sleep


def test_what_a_shared_file_system_shows_late_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, waits = _job(tmp_path), list[float]()
    _begin(job, 2)
    _end(job, 0, 1)
    sleep = _shown_late(waits, 5, lambda: _end(job, 1, 3))
    report_end(job, "7", JobState(state="CANCELLED"), sleep=sleep)
    assert waits == []  # Slurm kills those that do not end
    assert "trainer-1 was killed, or its node is lost\n" in caplog.text  # no cause: without lines
    caplog.clear()
    report_end(job, "7", FAILED, sleep=sleep)
    assert sum(waits) == 10
    assert "was killed" not in caplog.text


@pytest.mark.parametrize("is_log_late", [False, True], ids=["folder-of-the-start", "log"])
def test_logs_of_a_job_that_failed_soon_are_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_log_late: bool
) -> None:
    job, waits = _job(tmp_path), list[float]()
    log = "prefixrl: job 7, start 0, on n1\n"
    if is_log_late:
        job.batch_log.unlink()
    else:
        job.batch_log.write_text(log)

    def show() -> None:
        job.batch_log.write_text(log)
        _begin(job, 1)
        _end(job, 0, 2)

    report_end(job, "7", FAILED, sleep=_shown_late(waits, 3, show))
    assert sum(waits) == 6
    assert "trainer-0 on n was the first to report, exit code 2:\nof 0\n" in caplog.text


def test_a_job_that_failed_long_ago_without_a_log_is_not_waited_for(tmp_path: Path) -> None:
    job, waits = _job(tmp_path), list[float]()
    job.batch_log.unlink()
    job.write_final(FAILED)
    report_end(job, "7", FAILED, sleep=waits.append)
    assert sum(waits) == 60
    waits.clear()
    long_ago = time.time() - 90
    os.utime(job.final, (long_ago, long_ago))
    report_end(job, "7", FAILED, sleep=waits.append)
    assert waits == []


def test_a_task_that_says_nothing_is_waited_for_a_minute_unless_srun_says_that_it_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, waits = _job(tmp_path), list[float]()
    _begin(job, 4)
    _end(job, 0, 1)
    job.batch_log.write_text("srun: error: n1: tasks 1-3: Exited with exit code 9\n")
    report_end(job, "7", FAILED, sleep=waits.append)
    assert sum(waits) == 60
    waits.clear()
    long_ago = time.time() - 90
    os.utime(job.batch_log, (long_ago, long_ago))
    report_end(job, "7", FAILED, sleep=waits.append)
    assert waits == []
    job.batch_log.write_text(
        "srun: error: n1: tasks 1,3: Killed\nsrun: error: n2: task 2: Killed\n"
    )
    report_end(job, "7", FAILED, sleep=waits.append)
    assert waits == []


def test_a_killed_rollout_task_is_not_the_trainer_task_of_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, waits = _job(tmp_path), list[float]()
    _begin(job, 2)
    _end(job, 1, 1)
    job.batch_log.write_text(
        "srun-rollout: error: n1: task 0: Killed\nsrun: First task exited 120s ago\n"
        "srun: error: n1: task 0: Killed\n"
    )
    report_end(job, "7", FAILED, sleep=waits.append)
    # The trainer's was ended behind the one that failed; of the servers' everybody may read.
    assert "trainer-0 was killed, or its node is lost:" not in caplog.text
    assert "Slurm's own errors:\nsrun-rollout: error: n1: task 0: Killed\n" in caplog.text
    assert waits == []
    job.batch_log.write_text("srun-rollout: error: n1: task 0: Killed\n")
    caplog.clear()
    report_end(job, "7", FAILED, sleep=_shown_late(waits, 3, lambda: _end(job, 0, 3)))
    assert sum(waits) == 6  # shown late: not killed
    assert "trainer-0 was killed" not in caplog.text


def test_a_task_that_srun_ended_behind_the_others_is_not_the_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = _job(tmp_path)
    _begin(job, 3)
    _end(job, 0, 1)
    job.batch_log.write_text(
        "srun: error: n2: task 2: Out Of Memory\nsrun: First task exited 120s ago\n"
        "srun: error: n1: task 1: Killed\n"
    )
    report_end(job, "7", FAILED, sleep=lambda _: None)
    order = ["trainer-2 was killed", "trainer-0 on n was the first to report", "trainer-1 was kil"]
    places = [caplog.text.index(words) for words in order]
    assert places == sorted(places)
    assert "trainer-1 was killed, or its node is lost:" not in caplog.text  # without its lines
    assert "trainer-2 was killed, or its node is lost:\nof 2\n" in caplog.text


def test_a_rank_that_its_watchdog_ended_was_not_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job, waits = _job(tmp_path), list[float]()
    _begin(job, 2)
    job.batch_log.write_text(
        "srun: error: n1: task 0: Exited with exit code 76\nsrun: First task exited 120s ago\n"
        "srun: error: n1: task 1: Killed\n"
    )
    report_end(job, "7", JobState(state="FAILED", exit_code=76), sleep=waits.append)
    assert waits == []
    assert "trainer-0 ended because ranks hung:\nof 0\n" in caplog.text
    assert "trainer-1 was killed, or its node is lost\n" in caplog.text


def test_a_letter_that_is_written_in_parts_is_shown_whole(tmp_path: Path) -> None:
    job, out = _job(tmp_path), io.StringIO()
    reader = LogReader(job, "trainer-0")
    for part in ("\N{SNOWMAN}".encode()[:2], "\N{SNOWMAN}!".encode()[2:]):
        with job.batch_log.open("ab") as log:
            log.write(part)
        reader.write_new(out)
    assert out.getvalue() == "\N{SNOWMAN}!"


@pytest.mark.parametrize(
    ("task", "start", "shown"),
    [
        pytest.param(None, None, "batch eval-0.0 eval-0.1 ", id="first-task"),
        pytest.param("eval-1", None, "batch eval-1.0 eval-1.1 ", id="task"),
        pytest.param("eval-1", 1, "batch eval-1.1 ", id="start"),
        pytest.param("batch", None, "batch ", id="batch"),
    ],
)
def test_the_log_that_is_asked_for_is_followed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str | None,
    start: int | None,
    shown: str,
) -> None:
    job = _job(tmp_path)
    _write(job, "eval", tmp_path)
    job.batch_log.write_text("batch ")
    for number in (0, 1):
        job.start_folder(number).mkdir()
        for name in ("eval-0", "eval-1"):
            (job.start_folder(number) / f"{name}.log").write_text(f"{name}.{number} ")
    monkeypatch.setattr(jobs_module, "job_state", lambda _: JobState(state="COMPLETED"))
    monkeypatch.setattr(jobs_module, "follow", partial(follow, sleep=lambda _: None))
    assert show_logs(tmp_path, "7", task=task, start=start, is_followed=True) == 0
    assert capsys.readouterr().out == shown


def test_the_status_of_a_job_that_slurm_has_forgotten_is_how_somebody_saw_it_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _job(tmp_path)
    unknown = JobState(state="UNKNOWN")

    def status(*states: JobState) -> int:
        told = iter(states)
        monkeypatch.setattr(jobs_module, "job_state", lambda _: next(told))
        return show_status(tmp_path, "7", sleep=lambda _: None)

    assert status(unknown) == 69
    assert "UNKNOWN: Slurm does not answer, or has forgotten the job" in " ".join(
        capsys.readouterr().out.split()
    )
    assert status(RUNNING) == 0
    assert status(FAILED, JobState(state="PENDING")) == 0  # on its way back into the queue
    assert status(unknown) == 69
    assert status(FAILED, FAILED) == 3
    assert status(unknown) == 3
    monkeypatch.setattr(jobs_module, "job_states", lambda ids, **_: dict.fromkeys(ids, unknown))
    list_jobs(tmp_path)
    assert "FAILED" in capsys.readouterr().out


def test_the_log_of_a_job_that_slurm_has_forgotten_is_not_followed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = _job(tmp_path)
    job.batch_log.write_text("what it said\n")
    job.write_final(JobState(state="COMPLETED"))
    questions = itertools.count()

    def ask(_: str) -> JobState:
        assert next(questions) < 5
        return JobState(state="UNKNOWN")

    monkeypatch.setattr(jobs_module, "job_state", ask)
    follow_quickly = partial(follow, sleep=lambda _: None)
    monkeypatch.setattr(jobs_module, "follow", follow_quickly)
    assert show_logs(tmp_path, "7", task=None, start=None, is_followed=True) == 0
    assert capsys.readouterr().out == "what it said\n"


def test_who_follows_a_job_keeps_how_it_ended(tmp_path: Path) -> None:
    job = _job(tmp_path)
    assert _follow(job, RUNNING, FAILED, FAILED)[0] == 3
    assert job.final_state == FAILED


def test_a_job_whose_end_cannot_be_kept_is_reported_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = _job(tmp_path)
    job.batch_log.write_text("prefixrl: error: the disk is full\n")

    def refuse(*_: object) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(job_folder, "write_json_atomic", refuse)
    assert _follow(job, RUNNING, FAILED, FAILED)[0] == 3
    assert "final.json: cannot be written: Disk quota exceeded" in caplog.text
    assert "job 7: the disk is full" in caplog.text


def test_jobs_are_found_by_number_name_and_beginning(tmp_path: Path) -> None:
    first, second = JobFolder.make(tmp_path, "run-a"), JobFolder.make(tmp_path, "run-b")
    never = JobFolder.make(tmp_path, "dry")
    first.write_submitted("7")
    second.write_submitted("8")
    os.utime(first.path / "submitted.json", (1.0, 1.0))  # not in one tick of the kernel's clock
    assert {job.path for job in find_jobs(tmp_path)} == {first.path, second.path}
    first.write_final(FAILED)
    assert [job.job_id for job in find_jobs(tmp_path)] == ["7", "8"]  # as they were submitted
    assert find_job(tmp_path, "8").path == second.path
    assert find_job(tmp_path, "run-a").path == first.path
    with pytest.raises(ConfigError, match=r"run: several jobs of .*; they are: "):
        find_job(tmp_path, "run")
    with pytest.raises(ConfigError, match=r"dry-.*: no job of .*; known: "):
        find_job(tmp_path, never.path.name)
