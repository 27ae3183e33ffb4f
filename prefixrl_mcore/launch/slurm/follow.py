"""Following a job to its end: what it says, what Slurm says of it, and what went wrong.

NeMo-Run can wait for a job too, but needs sacct, takes a requeue for the end, and forgets the exit
code; so only what Slurm itself answers is asked here.
"""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.last_signs import last_signs
from prefixrl_mcore.launch.slurm.states import JobState, job_state
from prefixrl_mcore.launch.slurm.waiting import JobWatch, WaitingLine

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_POLLS_PER_QUESTION = 3
_TAIL_LINES = 20

_SLURM_ERRORS = ("srun: error:", "slurmstepd: error:")
_OWN_ERROR = "prefixrl: error: "
_START = "prefixrl: job "
"""Begin lines of the batch script: why it ended a job, and the first one of each start."""


class LogReader:
    """Reads what was added to the logs of a job since the last time."""

    def __init__(self, folder: JobFolder, task: str = "trainer-0") -> None:
        """Read the batch script's log, and one task's of every start."""
        self._folder = folder
        self._task = task
        self._positions: dict[Path, int] = {}

    def write_new(self, out: TextIO) -> None:
        """Write what is new to ``out``; of a line that is not complete yet, what there is."""
        tasks = [start / f"{self._task}.log" for start in self._folder.starts()]
        for file in (self._folder.batch_log, *tasks):
            position = self._positions.get(file, 0)
            try:
                with file.open("rb") as log:
                    log.seek(position)
                    added = log.read()
            except OSError:  # not there yet
                continue
            if added:
                self._positions[file] = position + len(added)
                out.write(added.decode(errors="replace"))
                out.flush()


def follow(
    folder: JobFolder,
    job_id: str,
    *,
    ask: Callable[[str], JobState] = job_state,
    sleep: Callable[[float], None] = time.sleep,
    out: TextIO | None = None,
) -> int:
    """Show logs and state of a job until it has ended; return 0 only if it completed.

    A job that goes back into the queue is followed on.

    Args:
        folder: of the job.
        job_id: Slurm's number.
        ask: how its state is found.
        sleep: how to wait.
        out: where the logs are written; None is standard output.

    Returns:
        0, else the exit code of the batch script, 1 if it has none.
    """
    target = out or sys.stdout  # now, and not when this module was imported
    reader, watch = LogReader(folder), JobWatch(job_id, ask=ask)
    with WaitingLine() as line:
        while (end := watch.look()) is None:
            line.show(f"job {job_id}: {watch.waits_for}" if watch.waits_for else "")
            for _ in range(_POLLS_PER_QUESTION):
                reader.write_new(target)
                sleep(_POLL_SECONDS)
    reader.write_new(target)
    if end.is_known:
        report_end(folder, job_id, end)
    return end.result


def report_end(folder: JobFolder, job_id: str, state: JobState) -> None:
    """Log how a job ended; of a failed one which task failed first, where, its last lines."""
    if state.result == 0:
        logger.info("job %s: completed; logs are in %s", job_id, folder.logs)
        return
    logger.error("job %s: %s; logs are in %s", job_id, state, folder.logs)
    batch = _of_last_start(_lines(folder.batch_log))
    why = [line.removeprefix(_OWN_ERROR) for line in batch if line.startswith(_OWN_ERROR)]
    for line in why:
        logger.error("job %s: %s", job_id, line)
    signs, failure = last_signs(folder), folder.first_failure()
    if failure is None and why:
        return
    if failure is None:
        what, lines = "no task says why: killed, or never started; the batch script said", batch
    else:
        where = f"{failure.task} on {failure.node}"
        what = f"{where} failed first, exit code {failure.exit_code}{signs.place_of(failure.task)}"
        lines = _lines(folder.starts()[-1] / f"{failure.task}.log")
        # Of tasks that cannot say so themselves: killed, out of memory, a lost node.
        told = [line for line in batch if line.startswith(_SLURM_ERRORS)]
        logger.error("Slurm's own errors:\n%s", "\n".join(told[-_TAIL_LINES:]) or "(none)")
    logger.error("%s:\n%s", what, "\n".join(lines[-_TAIL_LINES:]) or "(nothing)")
    for line in signs.lines():
        logger.error("%s", line)


def _of_last_start(batch: list[str]) -> list[str]:
    """Return what the batch script has said since the job was started for the last time."""
    starts = [index for index, line in enumerate(batch) if line.startswith(_START)]
    return batch[starts[-1] :] if starts else batch


def _lines(file: Path) -> list[str]:
    """Return the lines of a log; none if there is no log."""
    return file.read_text(errors="replace").splitlines() if file.exists() else []
