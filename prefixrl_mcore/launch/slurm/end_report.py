"""How a job ended: the reason in the batch script's words, who was killed, who reported first."""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.launch.slurm.job_folder import JobFolder, TaskEnd
from prefixrl_mcore.launch.slurm.last_signs import LastSigns, last_signs
from prefixrl_mcore.launch.slurm.states import JobState

logger = logging.getLogger(__name__)

_TAIL_LINES = 20
_SHOWN_TAILS = 3

_LATE_SECONDS = 60
"""How late a shared file system may show what a node has written: NFS keeps what it knows of a
folder so long."""

_POLL_SECONDS = 2.0

_SLURM_ERRORS = ("srun: error:", "srun-rollout: error:", "slurmstepd: error:")
_OWN_ERROR = "prefixrl: error: "
_START = re.compile(r"prefixrl: job \d+, start (\d+),")
"""Begin lines of the batch script: why it ended a job, and the first one of each start."""

_ENDED_FROM_OUTSIDE = ("CANCELLED", "TIMEOUT", "DEADLINE", "PREEMPTED", "NODE_FAIL")
"""States in which Slurm has killed the tasks that did not end when they were told to."""

_ENDED = re.compile(r"srun: error: \S+: tasks? ([\d,-]+): (.*)")
"""Of the trainer's step: that of the rollout tasks has an srun of another name."""

_EXITED = "Exited with exit code "
_STALLED = f"{_EXITED}{exit_codes.STALLED}"
"""Of a task that ends so, its watchdog does: it cannot say how it ended, either."""

_TIDYING = re.compile("srun: (First task exited|Job step aborted|Terminating StepId)")
"""srun kills what is left of a step, after ``--wait`` or because it was told to."""


def report_end(
    folder: JobFolder,
    job_id: str,
    state: JobState,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Log how a job ended; of a failed one who was killed, who reported first, their last lines.

    Args:
        folder: of the job.
        job_id: Slurm's number.
        state: in which it ended.
        sleep: how to wait for a shared file system, a minute at most.
    """
    if state.result == 0:
        logger.info("job %s: completed; logs are in %s", job_id, folder.logs)
        return
    logger.error("job %s: %s; logs are in %s", job_id, state, folder.logs)
    if state.state not in _ENDED_FROM_OUTSIDE:
        _await_ends(folder, sleep)
    batch = _batch(folder)
    why = [line.removeprefix(_OWN_ERROR) for line in batch if line.startswith(_OWN_ERROR)]
    for line in why:
        logger.error("job %s: %s", job_id, line)
    signs, failure = last_signs(folder), folder.first_failure()
    killed = _killed_first(batch, signs, state)
    if failure is not None or killed:
        # Of tasks that cannot say so themselves: killed, out of memory, a lost node.
        told = [line for line in batch if line.startswith(_SLURM_ERRORS)]
        logger.error("Slurm's own errors:\n%s", "\n".join(told[-_TAIL_LINES:]) or "(none)")
        _report_tasks(folder, signs, killed, failure, _ends_by_task(batch))
    elif not why:
        what = "no task says why: killed, or never started; the batch script said"
        logger.error("%s:\n%s", what, _tail(batch))
    for line in signs.lines([task for task in signs.silent if task not in killed[:_SHOWN_TAILS]]):
        logger.error("%s", line)


def _report_tasks(
    folder: JobFolder,
    signs: LastSigns,
    killed: list[str],
    failure: TaskEnd | None,
    ends: dict[str, str],
) -> None:
    """Show the last lines of the tasks that may be the cause, the killed ones first.

    A task in a collective with a killed one fails, and says so; the killed one cannot.
    """
    last = folder.starts()[-1]
    for task in killed[:_SHOWN_TAILS]:
        has_stalled = ends.get(task.rpartition("-")[2]) == _STALLED
        word = signs.word_of(task, *(["ended because ranks hung"] if has_stalled else []))
        logger.error("%s:\n%s", word, _tail(_lines(last / f"{task}.log")))
    if failure is not None:
        logger.error(
            "%s on %s was the first to report, exit code %d%s:\n%s",
            *(failure.task, failure.node, failure.exit_code, signs.place_of(failure.task)),
            _tail(_lines(last / f"{failure.task}.log")),
        )


def _await_ends(folder: JobFolder, sleep: Callable[[float], None]) -> None:
    """Wait until each trainer task has said how it ended, or srun that it was killed.

    And for the logs themselves, of a job that failed soon. Not of one that has ended long ago.
    """
    for count in range(int(_LATE_SECONDS / _POLL_SECONDS)):
        silent = {task.rpartition("-")[2] for task in last_signs(folder).silent}
        ends = _ends_by_task(_batch(folder))
        told = {n for n, how in ends.items() if how == _STALLED or not how.startswith(_EXITED)}
        if (_is_seen(folder) and silent <= told) or _is_old(folder):
            return
        if not count:
            what = f"{len(silent)} tasks to say how they ended" if silent else "the job's logs"
            logger.info("waiting a minute at most for %s", what)
        sleep(_POLL_SECONDS)


def _is_seen(folder: JobFolder) -> bool:
    """Return whether the batch script's log is here, and the folder of the start in it."""
    if not folder.batch_log.exists():
        return False
    start = _START.match(next(iter(_batch(folder)), ""))
    return start is None or folder.start_folder(int(start[1])).exists()


def _is_old(folder: JobFolder) -> bool:
    """Return whether every node has seen by now what was written at the job's end."""
    for file in (folder.batch_log, folder.final):
        if file.exists():
            return time.time() - file.stat().st_mtime > _LATE_SECONDS
    return False


def _killed_first(batch: list[str], signs: LastSigns, state: JobState) -> list[str]:
    """Return the tasks without a word that nobody has ended: their end may be the job's cause."""
    if state.state in _ENDED_FROM_OUTSIDE:
        return []
    tidying = [index for index, line in enumerate(batch) if _TIDYING.match(line)]
    if not tidying:
        return signs.silent
    before = _ends_by_task(batch[: tidying[0]])
    return [task for task in signs.silent if task.rpartition("-")[2] in before]


def _ends_by_task(batch: list[str]) -> dict[str, str]:
    """Return how trainer tasks ended, by number, from ``...: n1: tasks 0,2-3: Killed``."""
    ends: dict[str, str] = {}
    for line in batch:
        if found := _ENDED.match(line):
            for part in found[1].split(","):
                first, _, last = part.partition("-")
                for number in range(int(first), int(last or first) + 1):
                    ends.setdefault(str(number), found[2])
    return ends


def _batch(folder: JobFolder) -> list[str]:
    """Return what the batch script has said since the job was started for the last time."""
    batch = _lines(folder.batch_log)
    starts = [index for index, line in enumerate(batch) if _START.match(line)]
    return batch[starts[-1] :] if starts else batch


def _lines(file: Path) -> list[str]:
    """Return the lines of a log; none if there is no log."""
    return file.read_text(errors="replace").splitlines() if file.exists() else []


def _tail(lines: list[str]) -> str:
    """Return the last lines."""
    return "\n".join(lines[-_TAIL_LINES:]) or "(nothing)"
