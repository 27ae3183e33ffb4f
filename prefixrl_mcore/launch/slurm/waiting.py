"""A job in the queue: what it waits for, and the end of a wait that has none."""

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console

from prefixrl_mcore.launch.slurm.job_folder import JobFolder
from prefixrl_mcore.launch.slurm.states import JobState, SlurmError, cancel_job, job_state

logger = logging.getLogger(__name__)

_NEVER = "BadConstraints"
"""Slurm's reason for a job that it will not start, though all nodes were in service and free."""

_NEVER_QUESTIONS = 20
"""Questions in a row with this answer, about a minute, after which it is believed."""

_LOST_SECONDS = 600.0
"""How long Slurm may leave questions unanswered."""

_REASONS = {
    "Priority": "jobs of higher priority are ahead of it",
    "Resources": "it waits for nodes to become free",
    "Dependency": "it waits for the job before it",
    "BeginTime": "Slurm holds a requeued job back for a while, two minutes by default",
    "ReqNodeNotAvail": "it waits for nodes that are down, drained or reserved",
    "Nodes_required_for_job": "it waits for nodes that are down, drained or reserved",
    "BadConstraints": "no nodes that it may have are what it asks for",
    "JobHeld": "it is held, until somebody releases it (scontrol release)",
    "launch_failed_requeued_held": "a node could not start it; scontrol release tries again",
    "Partition": "its partition is down, or does not take so many nodes or so long",
    "QOS": "a limit of its QOS is reached",
    "Assoc": "a limit of its account or user is reached",
    "Reservation": "it waits for its reservation",
}
"""What beginnings of Slurm's reasons mean."""


def in_words(state: JobState) -> str:
    """Return a state, and of a job in the queue what it waits for."""
    if state.state != "PENDING":
        return str(state)
    meaning = next((words for name, words in _REASONS.items() if state.reason.startswith(name)), "")
    excluded = f"; it may not have {state.excluded}" if state.excluded else ""
    return str(state) + (f": {meaning}" if meaning else "") + excluded


class QueuedJob:
    """Cancels one job that can never start without the bad nodes that its pre-checks left out.

    One that waits for nodes that are down or drained, which come back, is left alone, as is one
    that left out no node: it waits for whom it was told to wait for.
    """

    def __init__(
        self, job_id: str, folder: JobFolder, *, cancel: Callable[[str], None] = cancel_job
    ) -> None:
        """Watch job ``job_id`` of ``folder``; ``cancel`` is how Slurm is told."""
        self._job_id = job_id
        self._folder = folder
        self._cancel = cancel
        self._num_never = 0

    def see(self, state: JobState) -> None:
        """Take the answer to a question into account; a job that Slurm does not cancel waits on."""
        is_never = state.state == "PENDING" and state.reason.startswith(_NEVER)
        self._num_never = self._num_never + 1 if is_never else 0
        if self._num_never != _NEVER_QUESTIONS:
            return
        bad = self._folder.bad_nodes()
        if not bad:
            return
        logger.error(
            "job %s is cancelled: without the bad nodes %s no nodes that it may have are what it "
            "asks for (%d nodes of partition %s), in service or not; have the nodes repaired, or "
            "ask for fewer, and launch the run again",
            *(self._job_id, ",".join(bad), state.num_nodes, state.partition),
        )
        try:
            self._cancel(self._job_id)
        except SlurmError as error:
            logger.error("job %s waits on: %s", self._job_id, error)


class JobWatch:
    """Asks for the state of one job, says what changed, and knows the end from a requeue."""

    def __init__(
        self,
        job_id: str,
        folder: JobFolder,
        *,
        name: str | None = None,
        ask: Callable[[str], JobState] = job_state,
    ) -> None:
        """Watch job ``job_id``.

        Args:
            job_id: Slurm's number.
            folder: of the job.
            name: what the log calls it besides.
            ask: how its state is found.
        """
        self._job_id = job_id
        self._prefix = "" if name is None else f"{name}: "
        self._ask = ask
        self._queued = QueuedJob(job_id, folder)
        self._shown = ""
        self._last_answer = time.monotonic()
        self._has_ended = False
        self.waits_for = ""
        """What the job waits for, as long as it does."""

    def look(self) -> JobState | None:
        """Ask once; return how the job ended, or UNKNOWN once Slurm is silent for long."""
        state = self._ask(self._job_id)
        if not state.is_known:
            if time.monotonic() - self._last_answer < _LOST_SECONDS:
                return None
            logger.error(
                "%sjob %s: Slurm has not answered for %.0f minutes; it may still run",
                *(self._prefix, self._job_id, _LOST_SECONDS / 60),
            )
            return state
        self._last_answer = time.monotonic()
        text = in_words(state)
        if text != self._shown:
            self._shown = text
            logger.info("%sjob %s: %s", self._prefix, self._job_id, text)
        self.waits_for = text if state.state == "PENDING" else ""
        self._queued.see(state)
        is_end = state.has_ended and self._has_ended  # twice: a requeue passes through such states
        self._has_ended = state.has_ended
        return state if is_end else None


class WaitingLine:
    """One line at the bottom of the terminal as long as a job waits; nothing elsewhere."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._status = Console(stderr=True).status("")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._status.stop()

    def show(self, text: str) -> None:
        """Show a text, or nothing if it is empty."""
        if not text:
            self._status.stop()
        elif self._status.console.is_terminal:
            self._status.update(text.replace("[", "\\["))
            self._status.start()
