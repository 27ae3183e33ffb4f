"""``prefixrl jobs``: the jobs that were launched into a folder."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.launch.slurm.end_report import report_end
from prefixrl_mcore.launch.slurm.follow import follow
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, find_job, find_jobs
from prefixrl_mcore.launch.slurm.states import JobState, cancel_job, job_state, job_states
from prefixrl_mcore.launch.slurm.waiting import in_words

_REQUEUE_SECONDS = 3.0
"""After which a job that goes back into the queue does not look like one that has ended."""


def list_jobs(jobs: Path) -> None:
    """Print one line per job, the newest last.

    Raises:
        ConfigError: if there is no such folder.
    """
    if not jobs.is_dir():
        raise ConfigError(
            f"{jobs}: no job was launched into this folder. Jobs lie in job_folder of their site: "
            "say --site SITE, or --jobs FOLDER"
        )
    table = Table(title=escape(f"jobs of {jobs}"))
    for column in ("job", "folder", "state", "restarts", "nodes"):
        table.add_column(column)
    found = find_jobs(jobs)
    user_id = os.getuid()
    is_shared = any(job.path.stat().st_uid != user_id for job in found)
    states = job_states([_id_of(job) for job in found], user_id=None if is_shared else user_id)
    for job in found:
        state = _or_final(job, states[_id_of(job)])
        told = state.state + (f" ({state.reason})" if state.reason else "")
        table.add_row(_id_of(job), job.path.name, told, str(state.num_restarts), state.nodes)
    Console().print(table, highlight=False)


def show_status(jobs: Path, which: str, *, sleep: Callable[[float], None] = time.sleep) -> int:
    """Print the state of a job, and why it failed if it did; return what ``launch`` would.

    A job that has not ended gives 0; one of which Slurm says nothing, and whose end nobody saw, 69.
    """
    job = find_job(jobs, which)
    state = _state_of(job)
    if state.has_ended and state != job.final_state:
        sleep(_REQUEUE_SECONDS)
        state = _state_of(job)
        if state.has_ended:
            job.write_final(state)
    if state.has_ended:
        report_end(job, _id_of(job), state, sleep=sleep)
        return state.result
    said = in_words(state)
    if not state.is_known:
        said += f": Slurm does not answer, or has forgotten the job; its logs are in {job.logs}"
    Console().print(f"job {_id_of(job)} ({job.path.name}): {said}", highlight=False, markup=False)
    return 0 if state.is_known else state.result


def show_logs(
    jobs: Path, which: str, *, task: str | None, start: int | None, is_followed: bool
) -> int:
    """Write the log of a task to standard output; with ``is_followed`` until the job ends.

    Args:
        jobs: folder of the jobs.
        which: job, by number or name.
        task: None is the job's first; ``batch`` is the batch script.
        start: None is the last; followed, all.
        is_followed: go on until the job ends, with what the batch script says.

    Raises:
        ConfigError: if there is no such log.
    """
    job = find_job(jobs, which)
    if is_followed:
        # Of a job that Slurm has forgotten, nothing else would be waited for.
        return follow(job, _id_of(job), task=task, start=start, ask=lambda _: _state_of(job))
    file = _log_file(job, task or job.first_task, start)
    if not file.exists():
        known = sorted(log.relative_to(job.logs).as_posix() for log in job.logs.rglob("*.log"))
        raise ConfigError(f"{file}: does not exist; there are: {', '.join(known) or 'no logs yet'}")
    sys.stdout.write(file.read_text(errors="replace"))
    return 0


def cancel(jobs: Path, which: str) -> None:
    """Cancel a job; the trainer saves first if Slurm leaves it the time."""
    job = find_job(jobs, which)
    cancel_job(_id_of(job))
    Console().print(f"job {_id_of(job)} ({job.path.name}) is told to end", highlight=False)


def _log_file(job: JobFolder, task: str, start: int | None) -> Path:
    """Return the log of the batch script, or of a task's last or given start."""
    if task == "batch":
        return job.batch_log
    starts = job.starts()
    if start is None and starts:
        return starts[-1] / f"{task}.log"
    return job.start_folder(start or 0) / f"{task}.log"


def _state_of(job: JobFolder) -> JobState:
    """Return the state of a job."""
    return _or_final(job, job_state(_id_of(job)))


def _or_final(job: JobFolder, state: JobState) -> JobState:
    """Return how a job ended that Slurm has forgotten, if somebody saw it; else its state."""
    return state if state.is_known else job.final_state or state


def _id_of(job: JobFolder) -> str:
    """Return Slurm's number of a submitted job."""
    assert job.job_id is not None, f"{job.path} was never submitted"
    return job.job_id
