"""Every rank's phase on the shared run folder, and stacks of all ranks when one makes no progress.

A thread of each rank looks at the rank's phase every few seconds, writes it to
``RUN/heartbeats/rank-<n>.json``, and when it has lasted too long asks all ranks for their stacks
by a file, ``stall-request.json``. Each rank's thread answers with ``rank-<n>.stacks``, and the
lowest rank that answers writes the report. So the training step pays nothing but an attribute per
phase, no collective is needed when ranks hang in one, no signal has to reach another node, and a
rank that is late finds itself when all others merely wait.

A thread cannot run while a call holds Python's global lock for good; for that case a timer of
``faulthandler``, which needs no lock, is armed at each look, and writes the same stacks.
"""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Self, get_args

from prefixrl_mcore.config.operations import STALL_EXIT_CODE, StallConfig
from prefixrl_mcore.observability.atomic import write_json_atomic, write_text_atomic
from prefixrl_mcore.observability.phases import Phase, Phases, PhaseState
from prefixrl_mcore.observability.stall_report import Beat, RankReport, main_frames, render

logger = logging.getLogger(__name__)

_LONGEST_PERIOD_SECONDS = 5.0
_PERIODS_PER_LIMIT = 5.0
_PERIODS_TO_ANSWER = 4.0
_REQUEST = "stall-request.json"


class Heartbeat:
    """Publishes this rank's phase and takes part in finding stalls; a context manager."""

    def __init__(
        self, folder: Path, *, rank: int, world_size: int, phases: Phases, config: StallConfig
    ) -> None:
        """Describe this rank; nothing is written before the context is entered.

        Args:
            folder: ``RUN/heartbeats``, seen by all ranks.
            rank: this rank.
            world_size: ranks in all.
            phases: where this rank is.
            config: limits, and what to do.
        """
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._phases = phases
        self._config = config
        self._limits = {phase: config.limit_of(phase) for phase in get_args(Phase)}
        known = (limit for limit in self._limits.values() if limit is not None)
        self._shortest = min(known, default=float("inf"))
        self._period = min(_LONGEST_PERIOD_SECONDS, self._shortest / _PERIODS_PER_LIMIT)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._stacks: IO[str] | None = None
        self._handled = ""
        self._reported: PhaseState | None = None
        self._num_reports = 0

    def __enter__(self) -> Self:
        """Begin to publish."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._file("stacks").open("a+", encoding="utf-8")
        self._begin_stacks()
        self._handled = self._read_request()  # what is there now is of an earlier start
        self._write(self._phases.state)
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop publishing; the last heartbeat stays."""
        self._end.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._open_stacks.close()

    def _run(self) -> None:
        """Look every period, until the context is left."""
        while not self._end.wait(self._period):
            try:
                self._look()
            except OSError as error:  # the storage; watching must not end the run
                logger.warning("heartbeat of rank %d: %s", self._rank, error)

    def _look(self) -> None:
        """Publish, ask for stacks if this rank makes no progress, answer if any rank asks."""
        state = self._phases.state
        self._tell_of_recovery(state)
        self._write(state)
        self._arm()
        request = self._read_request()
        if request == self._handled and self._is_stalled(state):
            request = self._ask()
        if request != self._handled:
            self._answer(request, state)

    def _is_stalled(self, state: PhaseState) -> bool:
        """Whether the phase has lasted too long: its limit, then twice, four times the limit."""
        limit = self._limits[state.phase]
        if limit is None:
            return False
        if self._reported is not None and self._reported.since == state.since:
            limit *= 2.0**self._num_reports
        return time.monotonic() - state.since > limit

    def _arm(self) -> None:
        """Let faulthandler write the stacks if this thread gets no turn for the shortest limit."""
        if self._shortest < float("inf"):
            faulthandler.dump_traceback_later(self._shortest + self._period, file=self._open_stacks)

    def _ask(self) -> str:
        """Ask all ranks for their stacks; return the request."""
        request = f"{self._rank}-{time.time_ns()}"
        write_json_atomic(self._folder / _REQUEST, {"request": request}, durable=False)
        return request

    def _read_request(self) -> str:
        """Return the last request; empty when there was none."""
        try:
            return json.loads((self._folder / _REQUEST).read_text(encoding="utf-8"))["request"]
        except FileNotFoundError:
            return ""

    def _answer(self, request: str, state: PhaseState) -> None:
        """Write stacks, have the lowest rank that can report them, and do what is configured."""
        self._handled = request
        self._num_reports = self._num_reports + 1 if self._reported == state else 1
        self._reported = state
        self._write_stacks()
        self._write(state, answers=request)
        report = self._folder / f"stall-{request}.txt"
        if self._rank == 0 or not self._is_reported(report, request):
            self._report(report, request)
        # Ranks that stalled together may all have asked: one report is enough.
        self._handled = self._read_request()
        if self._config.action == "stop":
            logging.shutdown()
            os._exit(STALL_EXIT_CODE)  # the main thread may never return from where it is

    def _is_reported(self, report: Path, request: str) -> bool:
        """Wait for the report of a lower rank; return False if this is the lowest that answers."""
        deadline = time.monotonic() + 3 * _PERIODS_TO_ANSWER * self._period
        while time.monotonic() < deadline and not self._end.is_set():
            if report.exists():
                return True
            self._end.wait(self._period / 4)
        return any(self._has_answered(rank, request) for rank in range(self._rank))

    def _report(self, path: Path, request: str) -> None:
        """Wait a while for all answers, then log and write the report."""
        deadline = time.monotonic() + _PERIODS_TO_ANSWER * self._period
        ranks = range(self._world_size)
        while time.monotonic() < deadline and not self._end.is_set():
            if all(self._has_answered(rank, request) for rank in ranks):
                break
            self._end.wait(self._period / 4)
        reports = [self._read_rank(rank, request) for rank in ranks]
        text = render(reports, limits=self._limits, folder=str(self._folder))
        write_text_atomic(path, text + "\n")
        logger.error("%s", text)
        if self._config.action == "stop":
            logger.error("trainer.stall.action is stop: ending all ranks; start with --resume")

    def _read_rank(self, rank: int, request: str) -> RankReport:
        """Return what is known of a rank."""
        try:
            stacks = self._file("stacks", rank).read_text(encoding="utf-8")
        except FileNotFoundError:
            stacks = ""
        beat = self._read_beat(rank)
        return RankReport(
            rank=rank,
            beat=beat,
            silent_seconds=0.0 if beat is None else time.time() - beat.time,
            has_answered=self._has_answered(rank, request),
            frames=main_frames(stacks),
        )

    def _has_answered(self, rank: int, request: str) -> bool:
        """Whether a rank has written its stacks for this request, or for one of the same stall.

        Ranks that find the stall at the same moment may each ask.
        """
        beat = self._read_beat(rank)
        if beat is None or not beat.answers:
            return False
        apart = abs(_time_of(beat.answers) - _time_of(request))
        return apart < 2 * _PERIODS_TO_ANSWER * self._period

    def _read_beat(self, rank: int) -> Beat | None:
        """Return a rank's last heartbeat; None when there is none."""
        try:
            return Beat(**json.loads(self._file("json", rank).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def _write(self, state: PhaseState, *, answers: str = "") -> None:
        """Publish this rank's heartbeat."""
        beat = Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=state.step,
            phase=state.phase,
            num_beats=state.num_beats,
            seconds=time.monotonic() - state.since,
            time=time.time(),
            answers=answers,
        )
        write_json_atomic(self._file("json"), asdict(beat), durable=False)

    def _write_stacks(self) -> None:
        """Replace this rank's stacks by the present ones of all threads."""
        faulthandler.dump_traceback(file=self._begin_stacks(), all_threads=True)

    def _begin_stacks(self) -> IO[str]:
        """Empty the file of stacks, say in it which thread is the main one, and return it."""
        stacks = self._open_stacks
        stacks.truncate(0)
        stacks.write(f"main thread 0x{threading.main_thread().ident:016x}\n")
        stacks.flush()
        return stacks

    @property
    def _open_stacks(self) -> IO[str]:
        """This rank's file of stacks."""
        assert self._stacks is not None, "the context is entered"
        return self._stacks

    def _tell_of_recovery(self, state: PhaseState) -> None:
        """Log once that a rank that was in a report goes on."""
        reported = self._reported
        if reported is None or reported.since == state.since:
            return
        self._reported, self._num_reports = None, 0
        logger.warning(
            "rank %d goes on after %.0f s without progress in %s",
            *(self._rank, state.since - reported.since, reported.phase),
        )

    def _file(self, suffix: str, rank: int | None = None) -> Path:
        """Return a file of a rank, this one when not said otherwise."""
        return self._folder / f"rank-{self._rank if rank is None else rank:05d}.{suffix}"


def _time_of(request: str) -> float:
    """Return when a request was made, unix seconds."""
    return int(request.rpartition("-")[2]) / 1e9
