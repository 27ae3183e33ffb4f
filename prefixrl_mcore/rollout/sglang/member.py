"""One server of the pool: what state it is in, and how it gets from one to the next."""

import itertools
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.api_key import find_api_key
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.faults import ServerFault, WrongWeights
from prefixrl_mcore.rollout.sglang.gpus import gpu_numbers
from prefixrl_mcore.rollout.sglang.launch import ServerLaunch
from prefixrl_mcore.rollout.sglang.restarts import RestartAllowance
from prefixrl_mcore.rollout.sglang.server import SGLangServer
from prefixrl_mcore.rollout.weight_sync.sync import is_incomplete

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_HEALTH_POLL_SECONDS = 0.5
_REPORT_SECONDS = 10.0
_JOIN_SECONDS = 30.0
"""Time for a start under way to notice that it is cancelled, and to end what it started."""

WEIGHTS, KV_CACHE = _MEMORY_PARTS = ("weights", "kv_cache")
"""Parts of device memory, as SGLang calls them; its compiled graphs stay."""

_ASLEEP = "asleep:incomplete"
"""Name of weights that were given back. A server that has another was started anew in its sleep."""

Failure = Literal["answer", "health"]
"""What failed: an answer to a request, or a health check."""


class State(Enum):
    """What a server is doing, and so what it may be asked for."""

    STARTING = "starting"
    """It comes up, or waits for weights to sample from."""

    READY = "ready"
    """It has the current weights and samples."""

    PAUSED = "paused"
    """It has the current weights and computes nothing."""

    UPDATING = "updating"
    """Weights are on their way to it."""

    ASLEEP = "asleep"
    """It has given its device memory back."""

    DEAD = "dead"
    """It is gone, hangs, or cannot be believed; started again as long as it may be."""


ALLOWED: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.UPDATING, State.ASLEEP, State.DEAD}),
    State.READY: frozenset({State.PAUSED, State.UPDATING, State.ASLEEP, State.DEAD}),
    State.PAUSED: frozenset({State.READY, State.UPDATING, State.ASLEEP, State.DEAD}),
    State.UPDATING: frozenset({State.STARTING, State.READY, State.DEAD}),
    State.ASLEEP: frozenset({State.STARTING, State.DEAD}),
    State.DEAD: frozenset({State.STARTING}),
}
"""The transitions there are. UPDATING falls back to STARTING when the stream of weights ended
half-way; ASLEEP becomes STARTING because memory that was given back held the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CameUp:
    """A server was started or waited for, and this is what came of it."""

    member: "Member"
    """Which server."""

    life: int
    """Which of its lives; an older one is of no interest any more."""

    outcome: str | BaseException
    """Name of the weights that it has, or why it did not come up."""


class Member:
    """A server: its client, its process if it is ours, its state and its faults.

    One thread at a time may call its methods; coming up takes place in a thread of its own.
    """

    def __init__(
        self,
        index: int,
        config: SGLangConfig,
        *,
        launch: ServerLaunch | None,
        is_here: bool,
        logs_folder: Path,
        check: Callable[["Member"], None],
    ) -> None:
        """Take the place of server ``index``, DEAD until ``revive``.

        Args:
            index: place in the pool, and among ``config.urls``.
            config: time-outs, and the URL of a server that runs elsewhere.
            launch: how the child process is started; None if it runs elsewhere.
            is_here: it is on this machine.
            logs_folder: gets ``sglang-<server>-<start>.log``.
            check: raises EngineError for a server that is up and not what it should be; called in
                another thread.
        """
        self.index = index
        self.name = f"server {index}"
        self.state = State.DEAD
        self.cause = "not started"
        self.server: SGLangServer | None = None
        self.served_weights = ""
        """Name of the weights that it said it has, or was sent since; empty until it came up."""

        self.last_death = ""
        """What it died of last, without the end of its log."""

        self.life = 0
        """Counts revivals; what belongs to an earlier life is of no interest."""

        self.failures: Counter[Failure] = Counter()
        """Failures of either kind since the last success of that kind, one for each moment."""

        self.released: tuple[str, ...] = ()
        """Parts of its device memory that it gave back in this life. Only these may be resumed:
        any other ends SGLang's scheduler."""

        self.restarts = RestartAllowance(config)
        """How often it may still be started again, or waited for."""

        self.gpus = None if launch is None else gpu_numbers(launch.gpus)
        """The GPU of each of its ranks, as this process numbers them; None if it has none, or
        others started it. Those of one that shares this run's are noted whenever it comes up."""

        self.is_own = launch is not None
        """It is started as a child process."""

        self.is_here = is_here
        """It is on this machine."""

        self._config = config
        self._client = None if launch is not None else self._client_of_url()
        self._launch = launch
        self._logs_folder = logs_folder
        self._check = check
        self._since = time.monotonic()
        self._last_failure: dict[Failure, float] = {}
        self._lock = threading.Lock()  # between the end of a start and its cancellation
        self._cancelled = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @property
    def client(self) -> SGLangClient:
        """Calls to the server, once it has come up for the first time."""
        assert self._client is not None, f"{self.name} has not come up"
        return self._client

    @property
    def is_up(self) -> bool:
        """Whether it answers control calls."""
        if self.state is State.STARTING:
            return bool(self.served_weights)
        return self.state is not State.DEAD

    def __str__(self) -> str:
        """Name the server, its state, for how long, and why."""
        seconds = time.monotonic() - self._since
        return f"{self.name} {self.state.value} for {seconds:.0f} s ({self.cause})"

    def move_to(self, state: State, cause: str) -> None:
        """Change the state and log why.

        Raises:
            AssertionError: if there is no such transition; a mistake of ours.
        """
        assert state in ALLOWED[self.state], f"{self.name}: {self.state} -> {state} ({cause})"
        level = logging.WARNING if state is State.DEAD else logging.INFO
        if {self.state, state} == {State.READY, State.UPDATING}:
            level = logging.DEBUG  # every step
        logger.log(
            level, "SGLang: %s: %s -> %s: %s", self.name, self.state.value, state.value, cause
        )
        self.state, self.cause, self._since = state, cause, time.monotonic()
        if state is State.READY:
            self.restarts.note_success()

    def revive(self, on_up: Callable[[CameUp], None]) -> None:
        """Start it, or wait for it if it runs elsewhere; ``on_up`` is called in another thread.

        Nothing is started once it is closed: nobody would end that.
        """
        self.life += 1
        self.failures.clear()
        self._last_failure.clear()
        self.served_weights = ""
        self.released = ()
        cancelled, life = threading.Event(), self.life
        self.move_to(State.STARTING, f"start {life}" if self._launch else "waiting for it")

        def come_up() -> None:
            outcome: str | BaseException
            try:
                outcome = self._come_up(life, cancelled)
            except BaseException as error:  # of any kind: somebody waits for this thread
                outcome = error
            on_up(CameUp(member=self, life=life, outcome=outcome))

        thread = threading.Thread(target=come_up, name=f"sglang-{self.index}", daemon=True)
        with self._lock:
            if not self._is_closed:
                thread.start()
                self._cancelled, self._thread = cancelled, thread

    def die(self, cause: str) -> None:
        """Declare it dead and end its processes; others answer what it was asked for."""
        tail = ""
        if self.server is not None:
            if not self.server.is_alive:
                cause = f"{self.server.cause_of_death()} ({cause})"
            tail = f"; {self.server.log_tail()}"
        self.last_death = cause
        self._end()
        self.move_to(State.DEAD, cause + tail)

    def note_failure(self, kind: Failure, asked: float) -> int:
        """Count a failure unless it was asked before the last one; return how many in a row.

        Args:
            kind: what failed.
            asked: when that began, on the monotonic clock.
        """
        if asked > self._last_failure.get(kind, -math.inf):
            self.failures[kind] += 1
            self._last_failure[kind] = time.monotonic()
        return self.failures[kind]

    def release_memory(self) -> None:
        """Give its device memory back, once it is idle: a busy server would die of it.

        Raises:
            ServerFault: if it does not get idle, or is lost.
        """
        self.client.abort()  # what a batch that was given up left in flight
        self.client.resume()  # a paused server never gets idle
        self.client.flush_cache()
        self.client.set_weight_version(_ASLEEP)
        self.client.release_memory([p for p in _MEMORY_PARTS if p not in self.released])
        self.released = _MEMORY_PARTS

    def resume_memory(self, *parts: str) -> None:
        """Take those of its parts of device memory again that it gave back.

        Raises:
            WrongWeights: if it is not the one that gave them back: somebody started it anew since.
            ServerFault: if it cannot, or is lost.
        """
        wanted = [part for part in parts if part in self.released]
        if WEIGHTS in wanted and (served := self.client.weight_version()) != _ASLEEP:
            raise WrongWeights(f"was started anew in its sleep, and has weights {served!r}")
        if wanted:
            self.client.resume_memory(wanted)
        if WEIGHTS in wanted:
            self.served_weights = "lost in its sleep"
        self.released = tuple(part for part in self.released if part not in wanted)

    def has_lost_process(self) -> bool:
        """Return whether it is a child process that ended by itself."""
        return self.server is not None and not self.server.is_alive

    def close(self) -> None:
        """End its processes, those of a start under way included; safe to call twice."""
        with self._lock:
            self._is_closed = True
        self._end()
        if self._thread is not None and self._launch is None:
            self._thread.join(_JOIN_SECONDS)
        if self._client is not None:
            self._client.close()

    def _end(self) -> None:
        with self._lock:
            self._cancelled.set()
            server, self.server = self.server, None
            thread = self._thread
        if server is not None:
            server.stop()
        # A start under way ends its process itself, which may have the memory of the next one.
        if thread is not None and self._launch is not None:
            thread.join(_JOIN_SECONDS)
            if thread.is_alive():
                logger.warning("SGLang: %s: its start goes on after it was cancelled", self.name)

    def _come_up(self, life: int, cancelled: threading.Event) -> str:
        """Start it or wait for it; return the name of the weights that it has.

        Raises:
            EngineError: if it does not come up in time, or is not what it should be.
            OSError: if this machine has no memory, file or space left for it.
            ValueError: if its model's folder or its key cannot be read.
        """
        try:
            if self._launch is not None:
                self._start(self._launch, cancelled)
            else:
                self._wait_for_url(cancelled, is_back=life > 1)
            self._check(self)
            self._warm_up(cancelled)
            return self.client.weight_version()
        except ServerFault as fault:
            raise EngineError(f"SGLang: {self.name}: {fault}") from fault

    def _start(self, launch: ServerLaunch, cancelled: threading.Event) -> None:
        """Start its process, which is this member's from then on: its death ends all calls."""
        server = SGLangServer.start(launch, self._new_log_file(), cancelled=cancelled)
        with self._lock:
            if not cancelled.is_set():
                self.server, self._client = server, server.client
        if cancelled.is_set():
            server.stop()
            raise self._unwanted()

    def _new_log_file(self) -> Path:
        """Return one that no start has had, of an earlier trainer's either: they are evidence."""
        files = (self._logs_folder / f"sglang-{self.index}-{n}.log" for n in itertools.count(1))
        return next(file for file in files if not file.exists())

    def _warm_up(self, cancelled: threading.Event) -> None:
        """Have it sample some tokens, whoever started it: it may compile kernels for that.

        Only then do the limits of health checks say something. One that was left in the middle of
        an update sampled before that, and has no weights to sample from now.

        Raises:
            ServerFault: if it cannot be asked.
            EngineError: if it samples none in the time for a start, or is no longer wanted.
        """
        if is_incomplete(self.client.weight_version()):
            return
        self.client.resume()  # the trainer that it had may have died while it was paused
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def sample() -> None:
            try:
                self.client.warm_up(self._config.start_timeout_seconds)
            except BaseException as error:  # of any kind: it is raised by who waits
                ended.put(error)
            else:
                ended.put(None)

        # Not waited for once it is no longer wanted: nothing ends a call to somebody's server.
        threading.Thread(target=sample, name=f"warm-up-{self.index}", daemon=True).start()
        while ended.empty():
            if cancelled.wait(_POLL_SECONDS):
                raise self._unwanted()
        error = ended.get()
        if isinstance(error, ServerFault):
            tail = "" if self.server is None else f"; {self.server.log_tail()}"
            raise EngineError(
                f"SGLang: {self.name} came up and did not sample its first tokens within "
                f"{self._config.start_timeout_seconds:g} s; raise "
                f"rollout.sglang.start_timeout_seconds if it compiles: {error}{tail}"
            ) from error
        if error is not None:
            raise error

    def _unwanted(self) -> EngineError:
        return EngineError(f"SGLang: {self.name} is no longer wanted")

    def _wait_for_url(self, cancelled: threading.Event, *, is_back: bool) -> None:
        """Wait for a server that runs elsewhere; one that was given up must show that it works."""
        started = reported = time.monotonic()
        while not self._answers(is_back=is_back):
            now = time.monotonic()
            if now - started > self._config.start_timeout_seconds or cancelled.is_set():
                raise EngineError(
                    f"SGLang: no healthy server at {self.client.url} after {now - started:.1f} s; "
                    "is it started, and is rollout.sglang.urls right?"
                )
            if now - reported > _REPORT_SECONDS:
                reported = now
                logger.info(
                    "SGLang: waiting for %s at %s to be healthy, %.0f of at most %.0f s",
                    *(self.name, self.client.url),
                    *(now - started, self._config.start_timeout_seconds),
                )
            cancelled.wait(_HEALTH_POLL_SECONDS)

    def _answers(self, *, is_back: bool) -> bool:
        if not self.client.is_healthy():
            return False
        if is_back:
            self.client.abort()  # what it still does for its earlier life
            try:
                self.client.resume()  # an update may have ended half-way, with the server paused
                self.client.check_progress(self._config.health_timeout_seconds)
            except ServerFault:
                return False
        return True

    def _client_of_url(self) -> SGLangClient:
        return SGLangClient(
            self._config.urls[self.index],
            request_timeout_seconds=self._config.request_timeout_seconds,
            api_key=find_api_key(self._config),
            max_connections=self._config.max_samples_per_server,
        )


def ask_all[Reply](
    members: Sequence[Member], call: Callable[[Member], Reply]
) -> dict[Member, Future[Reply]]:
    """Do the same for all members at once; return what came of it when all have ended."""
    with ThreadPoolExecutor(max(1, len(members)), "sglang-ask") as threads:
        return {member: threads.submit(call, member) for member in members}
