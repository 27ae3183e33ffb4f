"""Following a job to its end: what it says, what Slurm says of it, and what went wrong.

NeMo-Run can wait for a job too, but needs sacct, takes a requeue for the end, and forgets the exit
code; so only what Slurm itself answers is asked here.
"""

import sys
import time
from codecs import IncrementalDecoder, getincrementaldecoder
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from prefixrl_mcore.launch.slurm.end_report import report_end
from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.states import JobState, job_state
from prefixrl_mcore.launch.slurm.waiting import JobWatch, WaitingLine

_POLL_SECONDS = 1.0
_POLLS_PER_QUESTION = 3


class LogReader:
    """Reads what was added to the logs of a job since the last time."""

    def __init__(self, folder: JobFolder, task: str, *, start: int | None = None) -> None:
        """Read the batch script's log, and one task's of every start, or of the given one."""
        self._folder = folder
        self._task = task
        self._start = start
        self._positions: dict[Path, int] = {}
        # One for each log: a letter of several bytes may be written in parts.
        self._decoders = defaultdict[Path, IncrementalDecoder](
            lambda: getincrementaldecoder("utf-8")("replace")
        )

    def write_new(self, out: TextIO) -> None:
        """Write what is new to ``out``; of a line that is not complete yet, what there is."""
        for file in (self._folder.batch_log, *self._task_logs()):
            position = self._positions.get(file, 0)
            try:
                with file.open("rb") as log:
                    log.seek(position)
                    added = log.read()
            except OSError:  # not there yet
                continue
            if added:
                self._positions[file] = position + len(added)
                out.write(self._decoders[file].decode(added))
                out.flush()

    def _task_logs(self) -> list[Path]:
        """Return where the task's logs are."""
        starts = self._folder.starts()
        if self._start is not None:
            starts = [self._folder.start_folder(self._start)]
        return [start / f"{self._task}.log" for start in starts]


def follow(
    folder: JobFolder,
    job_id: str,
    *,
    task: str | None = None,
    start: int | None = None,
    ask: Callable[[str], JobState] = job_state,
    sleep: Callable[[float], None] = time.sleep,
    out: TextIO | None = None,
) -> int:
    """Show logs and state of a job until it has ended; return 0 only if it completed.

    A job that goes back into the queue is followed on.

    Args:
        folder: of the job.
        job_id: Slurm's number.
        task: whose log is shown beside the batch script's; None is the job's first task.
        start: which start's log; None is every one's.
        ask: how its state is found.
        sleep: how to wait.
        out: where the logs are written; None is standard output.

    Returns:
        0, else the exit code of the batch script, 1 if it has none; 69 if Slurm is silent for long.
    """
    target = out or sys.stdout  # now, and not when this module was imported
    reader = LogReader(folder, task or folder.first_task, start=start)
    watch = JobWatch(job_id, folder, ask=ask)
    with WaitingLine() as line:
        while (end := watch.look()) is None:
            line.show(f"job {job_id}: {watch.waits_for}" if watch.waits_for else "")
            for _ in range(_POLLS_PER_QUESTION):
                reader.write_new(target)
                sleep(_POLL_SECONDS)
    reader.write_new(target)
    if end.is_known:
        folder.write_final(end)
        report_end(folder, job_id, end, sleep=sleep)
    return end.result
