"""A pool of judging processes that can be killed: payloads in, outcomes out, in order.

What a judge does with a payload may hang in C code, exhaust memory or crash. Each payload has a
hard wall limit, which this side enforces with SIGKILL, and each process a memory limit. A killed
process is replaced; the payloads that were waiting behind the offending one are issued again, so
that no outcome is lost and none is invented. See ``nursery.py`` for the other side.
"""

import logging
import selectors
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from prefixrl_mcore.rewards.children import Child, ChildLostError, Nursery, NurseryLostError
from prefixrl_mcore.rewards.wire import Json

logger = logging.getLogger(__name__)

Status = Literal["done", "error", "timeout", "memory", "crash"]

_MAX_CHUNK = 32
"""Payloads handed to a process at once: enough to hide the pipe, few enough to share evenly."""
_CHUNKS_PER_PROCESS = 4
"""The last payloads are handed out in smaller chunks, so that processes finish together."""
_MAX_CRASHES = 2
"""A process may be killed from outside, so one crash does not convict the payload it was at."""
_MAX_NURSERY_RESTARTS = 3
"""Per call of ``run``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one payload."""

    status: Status
    """``done``, ``error`` (the judge raised), ``timeout``, ``memory`` or ``crash``."""

    value: Json
    """What the judge returned; for ``error`` the exception's type name; otherwise None."""

    seconds: float
    """Wall time that the payload took in its process; of the last attempt when it crashed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolCounters:
    """Totals since the pool was made."""

    num_payloads: int
    """Payloads with an outcome of any kind."""

    num_errors: int
    """Payloads on which the judge raised an exception."""

    num_timeouts: int
    """Payloads that ran into the wall limit."""

    num_memory: int
    """Payloads that ran into the memory limit."""

    num_crashes: int
    """Payloads that ended a process twice."""

    num_replaced: int
    """Processes that were killed, died or retired, and were replaced."""

    num_reissued: int
    """Payloads issued again because the process that they waited in was replaced."""


class _Batch:
    """The payloads of one call: what waits, what is done, and what has crashed a process."""

    def __init__(self, payloads: Sequence[Json]) -> None:
        self._payloads = payloads
        self._queue: deque[int] = deque(range(len(payloads)))
        self._num_crashes: Counter[int] = Counter()
        self.outcomes: dict[int, Outcome] = {}

    @property
    def is_unfinished(self) -> bool:
        return len(self.outcomes) < len(self._payloads)

    def take_chunk(self, num_processes: int) -> list[tuple[int, Json]]:
        """Remove and return the next payloads for one process; empty when none wait."""
        share = len(self._queue) // (num_processes * _CHUNKS_PER_PROCESS)
        size = min(len(self._queue), max(1, min(_MAX_CHUNK, share)))
        indices = [self._queue.popleft() for _ in range(size)]
        return [(index, self._payloads[index]) for index in indices]

    def put_back(self, indices: Sequence[int]) -> None:
        """Let payloads wait again, before all others and in their order."""
        self._queue.extendleft(reversed(indices))

    def convict(self, index: int) -> bool:
        """Note that a waiting payload ended a process; True if that is its verdict."""
        self._num_crashes[index] += 1
        if self._num_crashes[index] < _MAX_CRASHES:
            return False
        self._queue.remove(index)
        return True


class JudgePool:
    """Runs an importable function on payloads in a fixed number of killable processes.

    The processes start at once in the background; the first call waits for them. No process
    outlives this one, however it ends.

    Args:
        judge: ``module:function`` from JSON value to JSON value, imported in the processes only.
        num_workers: judging processes.
        timeout_seconds: wall limit of one payload.
        memory_limit_bytes: address space of one process above its idle size. A payload is sure to
            get half of it: a process that has kept more than the other half retires.
        warm_up: payloads judged once at start, before any process is forked, to fill caches.
    """

    def __init__(
        self,
        judge: str,
        *,
        num_workers: int,
        timeout_seconds: float,
        memory_limit_bytes: int,
        warm_up: Sequence[Json] = (),
    ) -> None:
        self._judge = judge
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._memory_limit_bytes = memory_limit_bytes
        self._warm_up = list(warm_up)
        self._counts: Counter[str] = Counter()
        self._children: list[Child] = []
        self._lock = threading.Lock()
        self._is_closed = False
        self._start_nursery()

    @property
    def counters(self) -> PoolCounters:
        """Totals since the pool was made."""
        counts = self._counts
        return PoolCounters(
            num_payloads=counts["payloads"],
            num_errors=counts["error"],
            num_timeouts=counts["timeout"],
            num_memory=counts["memory"],
            num_crashes=counts["crash"],
            num_replaced=counts["replaced"],
            num_reissued=counts["reissued"],
        )

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The nursery, then the judging processes, as far as they have been started."""
        if self._is_closed:
            return ()
        return (self._nursery.process.pid, *(child.pid for child in self._children))

    def run(self, payloads: Sequence[Json]) -> list[Outcome]:
        """Return one outcome per payload, in order; calls from several threads take turns.

        Raises:
            RuntimeError: if the pool is closed, the judge cannot be imported, or the nursery is
                killed again and again.
        """
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the judging pool is closed; make a new one")
            batch = _Batch(payloads)
            try:
                if payloads:
                    self._run(batch)
            except BaseException:
                # An interrupt may have left a reply half read: start afresh, judge nothing twice.
                self._drop_children(batch)
                self._finalizer()
                self._start_nursery()
                raise
            return [batch.outcomes[index] for index in range(len(payloads))]

    def close(self) -> None:
        """End all processes; safe to call twice."""
        with self._lock:
            self._is_closed = True
            self._drop_children(_Batch([]))
            self._finalizer()

    def _start_nursery(self) -> None:
        self._nursery = Nursery(
            judge=self._judge, memory_limit_bytes=self._memory_limit_bytes, warm_up=self._warm_up
        )
        self._finalizer = weakref.finalize(self, self._nursery.close)

    def _drop_children(self, batch: _Batch) -> None:
        """Forget all children; their payloads wait again. The nursery's end is theirs too."""
        for child in self._children:
            self._reissue(batch, child)
            child.connection.close()
        self._children.clear()

    def _run(self, batch: _Batch) -> None:
        for num_restarts in range(_MAX_NURSERY_RESTARTS + 1):
            try:
                self._nursery.wait_until_ready()
                self._fill()
                while batch.is_unfinished:
                    self._turn(batch)
                return
            except NurseryLostError as error:
                logger.warning("the judging nursery died (%s); restart %d", error, num_restarts + 1)
                self._drop_children(batch)
                self._finalizer()
                self._start_nursery()
        raise RuntimeError(
            f"the judging nursery died {_MAX_NURSERY_RESTARTS + 1} times in one call; "
            "find out what kills it (the kernel's log names processes killed for memory)"
        )

    def _fill(self) -> None:
        """Bring the pool to its full number of live children."""
        for child in [child for child in self._children if child.has_hung_up()]:
            self._replace(_Batch([]), child)
        while len(self._children) < self._num_workers:
            self._children.append(self._nursery.spawn())

    def _turn(self, batch: _Batch) -> None:
        """Hand out work, wait until a child is ready or late, and deal with it."""
        for child in self._children:
            if not child.assigned and (chunk := batch.take_chunk(self._num_workers)):
                child.assign(chunk)
        busy = [child for child in self._children if child.assigned]
        for child in self._wait(busy):
            self._exchange(batch, child)
        for child in busy:
            if self._is_late(child):
                self._exchange(batch, child)  # its reply may have come in the meantime
            if self._is_late(child):
                index = child.assigned.popleft()
                self._finish(batch, index, "timeout", None, time.monotonic() - child.head_since)
                self._replace(batch, child)

    def _is_late(self, child: Child) -> bool:
        elapsed = time.monotonic() - child.head_since
        return bool(child.assigned) and elapsed >= self._timeout_seconds

    def _wait(self, busy: list[Child]) -> list[Child]:
        """Return the children that can be read or written, at the latest when one is late."""
        deadline = min(child.head_since for child in busy) + self._timeout_seconds
        with selectors.DefaultSelector() as selector:
            for child in busy:
                writable = selectors.EVENT_WRITE if child.outbox else 0
                selector.register(child.connection, selectors.EVENT_READ | writable, child)
            ready = selector.select(max(0.0, deadline - time.monotonic()))
        return [key.data for key, _ in ready]

    def _exchange(self, batch: _Batch, child: Child) -> None:
        """Take a child's replies and give it what it can take."""
        try:
            for reply in child.receive():
                self._accept(batch, child, reply)
            if child.assigned:
                child.send()
        except ChildLostError as error:
            if child in self._children:  # one that has retired is no loss
                self._mourn(batch, child, error)

    def _accept(self, batch: _Batch, child: Child, reply: Json) -> None:
        """Record one reply, and replace the child if it retires."""
        match reply:
            case [
                int(index),
                ("done" | "error" | "memory") as status,
                value,
                float(seconds),
                bool(is_retiring),
            ] if child.assigned and child.assigned[0] == index:
                child.assigned.popleft()
                child.head_since = time.monotonic()
                self._finish(batch, index, status, value, seconds)
                if is_retiring:
                    self._replace(batch, child)
            case _:
                raise ChildLostError(f"the child sent {str(reply)[:200]!r}, not a reply")

    def _mourn(self, batch: _Batch, child: Child, error: ChildLostError) -> None:
        """Replace a child that died over its first payload."""
        index, seconds = child.assigned[0], time.monotonic() - child.head_since
        exit_code = self._replace(batch, child)
        # Only now: had the nursery died, taking the child along, no payload would be to blame.
        is_final = batch.convict(index)
        logger.warning(
            "a judging process was lost (%s, exit code %d)%s",
            error,
            exit_code,
            "" if is_final else "; its payload is tried once more",
        )
        if is_final:
            self._finish(batch, index, "crash", None, seconds)

    def _replace(self, batch: _Batch, child: Child) -> int:
        """Kill a child and put another in its place; return its exit code.

        What was assigned to it waits again.
        """
        self._reissue(batch, child)
        self._counts["replaced"] += 1
        exit_code = self._nursery.end(child)
        self._children[self._children.index(child)] = self._nursery.spawn()
        return exit_code

    def _reissue(self, batch: _Batch, child: Child) -> None:
        """Let all that is assigned to a child wait again."""
        self._counts["reissued"] += len(child.assigned)
        batch.put_back(list(child.assigned))
        child.assigned.clear()

    def _finish(
        self, batch: _Batch, index: int, status: Status, value: Json, seconds: float
    ) -> None:
        batch.outcomes[index] = Outcome(status=status, value=value, seconds=seconds)
        self._counts["payloads"] += 1
        self._counts[status] += 1
