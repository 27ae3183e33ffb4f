"""Every rank's phase on the shared run folder, and stacks of all ranks when one makes no progress.

A thread of each rank looks at the rank's phase every few seconds, writes it to
``RUN/heartbeats/rank-<n>.json``, and when it has lasted too long asks all ranks for their stacks
by a file, ``stall-<number>.request``. Each rank's thread answers with ``rank-<n>.stacks``, and the
lowest rank that answers writes the report, ``stall-<number>.txt``. So the training step pays
nothing but an attribute per phase, no collective is needed when ranks hang in one, no signal has to
reach another node, no decision rests on two clocks, and a rank that is late finds itself when all
others merely wait.

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
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self, get_args

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.operations import StallConfig
from prefixrl_mcore.observability.atomic import write_json_atomic, write_text_atomic
from prefixrl_mcore.observability.phases import Phase, Phases, PhaseState
from prefixrl_mcore.observability.stall_report import Beat, RankReport, main_frames, render

logger = logging.getLogger(__name__)

_LONGEST_PERIOD_SECONDS = 5.0
_PERIODS_PER_LIMIT = 5.0
_REQUEST = "stall-{:05d}.request"
_REPORT = "stall-{:05d}.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """A request that this rank has answered and that is not reported yet."""

    request: int
    """Its number."""

    state: PhaseState
    """Where the rank was: its stacks are of this moment."""

    since: float
    """Monotonic seconds of the answer."""


def last_request(folder: Path) -> int:
    """Return the number of the last request for stacks in a folder of heartbeats; 0 for none."""
    numbers = (path.stem.rpartition("-")[2] for path in folder.glob("stall-*.request"))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def read_beats(folder: Path) -> list[Beat]:
    """Return the last heartbeat of each rank in a folder, those of earlier starts included."""
    beats = (_read_beat(file) for file in sorted(folder.glob("rank-*.json")))
    return [beat for beat in beats if beat is not None]


def stall_reports(folder: Path) -> list[Path]:
    """Return the reports of stalls in a folder, the oldest first, earlier starts included."""
    return sorted(folder.glob("stall-*.txt"))


def _read_beat(file: Path) -> Beat | None:
    """Return a heartbeat; None when there is none that can be read."""
    try:
        return Beat(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # the last two: of another version
        return None


class Heartbeat:
    """Publishes this rank's phase and takes part in finding stalls; a context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        stage: int,
        phases: Phases,
        config: StallConfig,
        last_request: int,
    ) -> None:
        """Describe this rank; nothing is written before the context is entered.

        Args:
            folder: ``RUN/heartbeats``, seen by all ranks.
            rank: this rank.
            world_size: ranks in all.
            stage: its pipeline stage.
            phases: where this rank is.
            config: limits, and what to do.
            last_request: number of the last request of earlier starts, the same on every rank.
        """
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._stage = stage
        self._phases = phases
        self._config = config
        self._limits = {phase: config.limit_of(phase) for phase in get_args(Phase)}
        known = (limit for limit in self._limits.values() if limit is not None)
        self._shortest = min(known, default=float("inf"))
        self._period = min(_LONGEST_PERIOD_SECONDS, self._shortest / _PERIODS_PER_LIMIT)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._stacks: IO[str] | None = None
        self._handled = last_request
        self._answer: _Answer | None = None
        self._trouble = ""
        self._reported: PhaseState | None = None
        self._num_reports = 0

    def __enter__(self) -> Self:
        """Begin to publish."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._file("stacks").open("a+", encoding="utf-8")
        self._begin_stacks()
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
            except Exception as error:  # of whatever kind: watching must not end, nor end the run
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Log what keeps this rank from watching, once while it stays the same."""
        if self._trouble != (trouble := f"{type(error).__name__}: {error}"):
            self._trouble = trouble
            logger.warning("heartbeat of rank %d: %s", self._rank, trouble)

    def _look(self) -> None:
        """Publish, ask for stacks if this rank makes no progress, answer if any rank asks."""
        state = self._phases.state
        self._tell_of_recovery(state)
        # Until the report, where the rank was when it answered: its stacks are of that moment.
        self._write(state if self._answer is None else self._answer.state)
        self._arm()
        request = self._newest_request()
        if request == self._handled and self._answer is None and self._is_stalled(state):
            request = self._ask()
        if request != self._handled:
            self._give_stacks(request, state)
        if self._answer is not None:
            self._see_to_report(self._answer)

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

    def _ask(self) -> int:
        """Ask all ranks for their stacks; return the request's number.

        Of ranks that ask at once, the one whose file is there first has asked for all.
        """
        request = self._handled + 1
        with suppress(FileExistsError):
            (self._folder / _REQUEST.format(request)).touch(exist_ok=False)
        return request

    def _newest_request(self) -> int:
        """Return the number of the newest request; the last handled one if there is no other."""
        newest = self._handled
        while (self._folder / _REQUEST.format(newest + 1)).exists():
            newest += 1
        return newest

    def _give_stacks(self, request: int, state: PhaseState) -> None:
        """Answer a request: write this rank's stacks, and say so in its heartbeat."""
        self._write_stacks()
        self._num_reports = self._num_reports + 1 if self._reported == state else 1
        self._reported = state
        self._handled = request
        self._answer = _Answer(request=request, state=state, since=time.monotonic())
        self._write(state)

    def _see_to_report(self, answer: _Answer) -> None:
        """Once there is a report, by this rank if it is its turn, do what is configured."""
        report = self._folder / _REPORT.format(answer.request)
        if not report.exists():
            if not self._has_to_report(answer):
                return
            self._report(report, answer.request)
        self._answer = None
        if self._config.action == "stop":
            logging.shutdown()
            os._exit(exit_codes.STALLED)  # the main thread may never return from where it is

    def _has_to_report(self, answer: _Answer) -> bool:
        """Whether this rank writes the report now.

        The lowest rank that answered does, when all have answered or were given the time to. If it
        died meanwhile the next ones do, one after the other.
        """
        waited = time.monotonic() - answer.since
        if any(self._has_answered(rank, answer.request) for rank in range(self._rank)):
            return waited > 2 * self._config.answer_seconds + self._rank * self._period
        others = range(self._rank, self._world_size)
        return waited > self._config.answer_seconds or (
            self._rank == 0 and all(self._has_answered(rank, answer.request) for rank in others)
        )

    def _report(self, path: Path, request: int) -> None:
        """Log and write the report of what all ranks have answered."""
        reports = [self._read_rank(rank, request) for rank in range(self._world_size)]
        text = render(reports, limits=self._limits, folder=str(self._folder))
        logger.error("%s", text)
        if self._config.action == "stop":
            logger.error("trainer.stall.action is stop: ending all ranks; start with --resume")
        try:
            write_text_atomic(path, text + "\n")
        except OSError as error:  # it is logged, and the others write their own
            self._warn(error)

    def _read_rank(self, rank: int, request: int) -> RankReport:
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

    def _has_answered(self, rank: int, request: int) -> bool:
        """Whether a rank has written its stacks for this request or a later one."""
        beat = self._read_beat(rank)
        return beat is not None and beat.answers >= request

    def _read_beat(self, rank: int) -> Beat | None:
        """Return a rank's last heartbeat; None when there is none that can be read."""
        return _read_beat(self._file("json", rank))

    def _write(self, state: PhaseState) -> None:
        """Publish this rank's heartbeat."""
        beat = Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            stage=self._stage,
            step=state.step,
            phase=state.phase,
            num_changes=state.num_changes,
            num_beats=state.num_beats,
            seconds=time.monotonic() - state.since,
            time=time.time(),
            answers=self._handled,
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
