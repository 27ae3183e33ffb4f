"""All servers of the engine: brought up, given weights, watched, buried, brought up again.

Everything here runs in the thread that calls ``sample`` or ``load_weights``. What takes time runs
in threads that put what came of it into ``events``: starts, health checks and requests.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.interruption import IsInterrupted, never_interrupted
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.counters import PoolCounters
from prefixrl_mcore.rollout.sglang.faults import ServerFault, ServerLost, WrongWeights
from prefixrl_mcore.rollout.sglang.health import Checked, HealthWatch, find_silent, is_gone
from prefixrl_mcore.rollout.sglang.in_flight import Answered
from prefixrl_mcore.rollout.sglang.member import (
    KV_CACHE,
    WEIGHTS,
    CameUp,
    Failure,
    Member,
    State,
    ask_all,
)
from prefixrl_mcore.rollout.sglang.weights import Weights, are_usable, send_weights
from prefixrl_mcore.rollout.weight_sync.checksums import WeightsDifferError
from prefixrl_mcore.rollout.weight_sync.syncer import Syncer

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.2
"""Longest time between two looks at the servers' processes."""

_HEARTBEAT_SECONDS = 30.0
_ABORT_SECONDS = 6.0
"""Longest wait for the servers to be told to drop what they do."""


class ServerPool:
    """The servers and the weights that they have."""

    def __init__(
        self,
        members: Sequence[Member],
        config: SGLangConfig,
        *,
        syncer: Syncer,
        router: SGLangClient | None,
    ) -> None:
        """Own the members; ``start`` brings them up.

        Args:
            members: all servers.
            config: their limits.
            syncer: brings weights to the servers.
            router: where requests are sent instead of to the servers.
        """
        self.members = list(members)
        self.router = router
        self.counters = PoolCounters(num_servers=len(self.members))
        self.events: queue.SimpleQueue[Answered | CameUp | Checked] = queue.SimpleQueue()
        self.weights = Weights(name="", policy_version=-1, make_buckets=None)
        self._config = config
        self._syncer = syncer
        self._health = HealthWatch(config, self.events.put)
        self._await_load: set[Member] = set()  # came up when the weights could not be had
        self._last_heartbeat = time.monotonic()
        self._is_closed = False

    @property
    def ready(self) -> list[Member]:
        """Servers that sample."""
        return [member for member in self.members if member.state is State.READY]

    def start(self, base_weights: str) -> None:
        """Bring all servers up at once; those with usable weights are ready then.

        Servers that run elsewhere may have been left with different weights, those of another run,
        or in the middle of an update: none is ready then, until ``load``.

        Args:
            base_weights: name of the model folder's weights in servers that were started for this.

        Raises:
            EngineError: if one does not come up.
        """
        for member in self.members:
            member.revive(self.events.put)
        self.begin_to_wait()
        names: dict[str, str] = {}
        while len(names) < len(self.members):
            self._beat("servers that start")
            try:
                event = self.events.get(timeout=TICK_SECONDS)
            except queue.Empty:
                continue
            assert isinstance(event, CameUp), "nothing else is under way"
            if isinstance(event.outcome, BaseException):
                raise event.outcome
            names[event.member.name] = event.member.served_weights = event.outcome
        if not are_usable(names.values(), own=base_weights):
            logger.warning(
                "SGLang: the servers have different, incomplete or another run's weights: %s", names
            )
            return
        self.weights = Weights(name=names["server 0"], policy_version=-1, make_buckets=None)
        for member in self.members:
            member.move_to(State.READY, f"has weights {self.weights.name!r}")

    def load(self, weights: Weights, *, is_interrupted: IsInterrupted = never_interrupted) -> None:
        """Give all living servers new weights; those that come up later get them then.

        Where none lives one is waited for, until somebody wants that to end: nothing is sampled
        then, and a run that is told to stop has its last step to save.

        Args:
            weights: the new ones.
            is_interrupted: asked several times a second while it waits.

        Raises:
            EngineError: if the stream is not the model's weights; if too few servers are left,
                because they died or refused the weights.
        """
        before, self.weights = self.weights, weights
        self._await_load.clear()
        try:
            self.take_answers()  # of a batch that was given up
            self._bury_the_lost()
            tries, up = self._config.max_failures, [m for m in self.members if m.is_up]
            for member in find_silent(up, max_probes=tries):  # it would be waited for for minutes
                self.bury(member, f"did not answer {tries} times before an update of its weights")
            self._update([member for member in self.members if member.is_up])
        except BaseException:
            self.weights = before
            raise
        self.begin_to_wait()
        while not self.ready and not is_interrupted():
            self.tend()
            self.next_answer(waiting_for="a server for the new weights")

    def verify(self) -> None:
        """Ask every ready server for the name of its weights; bury those that have others.

        One that does not say it, but answers still, is left alone: every answer of it says it, too.
        """
        names = ask_all(self.ready, lambda member: member.client.weight_version())
        faults = {
            member: name.exception()
            for member, name in names.items()
            if isinstance(name.exception(), ServerFault)
        }
        gone = ask_all(list(faults), is_gone)
        for member, name in names.items():
            if member in faults:
                if gone[member].result():
                    self.bury(member, f"did not say which weights it has: {faults[member]}")
            elif name.result() != self.weights.name:
                self.bury(
                    member,
                    f"has weights {name.result()!r}, expected {self.weights.name!r} (policy "
                    f"version {self.weights.policy_version}); does another trainer use it?",
                )

    def begin_to_wait(self) -> None:
        """Count the time until the next heartbeat from here."""
        self._last_heartbeat = time.monotonic()

    def take_metrics(self) -> dict[str, float]:
        """Return what was counted since the last call, by metric name.

        While another thread samples (``rollout.schedule.overlap``) it is part of what that
        generation does; the rest comes with the next call.
        """
        # Swapped before they are read: a generation that overlaps the update counts meanwhile.
        counted, self.counters = self.counters, PoolCounters(num_servers=len(self.members))
        # A run that takes turns with its servers asks while they sleep.
        ready = [m for m in self.members if m.state in (State.READY, State.ASLEEP)]
        values = counted.metrics(num_ready=len(ready))
        return values | self._syncer.take_metrics()

    def tend(self, *, may_update: bool = True) -> None:
        """Bury whose process ended, revive the dead, give weights to those that came up.

        Args:
            may_update: there is time for an update; those that came up wait for weights otherwise.

        Raises:
            EngineError: if too few servers are left, or another thread closed the pool.
        """
        self._bury_the_lost()
        self._check_open()  # nobody would end what is started now
        for member in self.members:
            if member.state is State.DEAD and member.restarts.take(
                time.monotonic(), others_serve=bool(self.ready)
            ):
                self.counters.num_restarts += 1
                member.revive(self.events.put)
        came_up = [m for m in self.members if m.state is State.STARTING and m.is_up]
        for member in came_up:
            if member.served_weights == self.weights.name:
                member.move_to(State.READY, f"has weights {self.weights.name!r}")
        if not self.ready:
            self._await_load.clear()  # nobody goes on: one more try, or the error that says why not
        outdated = [
            member
            for member in came_up
            if member.state is State.STARTING and member not in self._await_load
        ]
        if outdated and self.weights.make_buckets is not None:
            if may_update:
                self._catch_up(outdated)
        elif outdated:
            for member in outdated:
                self.bury(member, f"was restarted with other weights: {member.served_weights!r}")
        self._check_enough()

    def next_answer(self, *, waiting_for: str) -> Answered | None:
        """Wait a moment for an event; return an answer to a request, and handle anything else.

        Args:
            waiting_for: what the caller wants, for the heartbeat in the log.
        """
        self._beat(waiting_for)
        try:
            event = self.events.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return None
        if isinstance(event, Answered):
            return event
        self._handle(event)
        return None

    def take_answers(self) -> list[Answered]:
        """Handle all events that wait; return the answers to requests among them."""
        answers: list[Answered] = []
        while not self.events.empty():
            event = self.events.get()
            if isinstance(event, Answered):
                answers.append(event)
            else:
                self._handle(event)
        return answers

    def check_health(self, busy: Sequence[Member]) -> None:
        """Begin a health check of each server that owes answers, if one is due."""
        self._health.begin_due([member for member in busy if member.state is State.READY])

    def suspect(
        self, member: Member, life: int, kind: Failure, fault: ServerFault, *, asked: float
    ) -> None:
        """Take a failure into account: it may be one too many, or a sign that the server is gone.

        One hiccup, which all calls of that moment fail by, counts once.

        Args:
            member: which server.
            life: its life when it was asked.
            kind: what failed.
            fault: how.
            asked: when, on the monotonic clock.
        """
        if member.life != life or member.state is State.DEAD:
            return
        is_broken = kind == "answer" and isinstance(fault, ServerLost)
        if isinstance(fault, WrongWeights) or (is_broken and is_gone(member)):
            self.bury(member, str(fault))
        elif member.note_failure(kind, asked) >= self._config.max_failures:
            failed = "health checks" if kind == "health" else "answers"
            self.bury(member, f"{member.failures[kind]} {failed} in a row failed: {fault}")

    def bury(self, member: Member, cause: str) -> None:
        """Declare a server dead."""
        self._await_load.discard(member)
        self.counters.num_deaths += 1
        member.die(cause)

    def abort_all(self) -> None:
        """Tell all servers to drop what they do, and wait a moment for them to have heard it."""
        threads = [
            threading.Thread(target=member.client.abort, daemon=True)
            for member in self.members
            if member.is_up
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + _ABORT_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def command(
        self, call: Callable[[Member], None], states: Sequence[State], to: State, cause: str
    ) -> None:
        """Do the same with all servers in ``states``, which are ``to`` then; bury who refuses.

        Raises:
            EngineError: if too few servers are left.
        """
        told = [member for member in self.members if member.state in states and member.is_up]
        for member, result in ask_all(told, call).items():
            fault = result.exception()
            if fault is None:
                member.move_to(to, cause)
            elif isinstance(fault, ServerFault):
                self.bury(member, str(fault))
            else:
                raise fault
        self._check_enough()

    def sleep(self) -> None:
        """Have all servers give their device memory back, starts and health checks under way first.

        Raises:
            EngineError: if too few servers are left.
        """
        self.begin_to_wait()
        while any(member.state is State.STARTING and not member.is_up for member in self.members):
            self.next_answer(waiting_for="servers that start, to put them to sleep")
        self._health.wait()  # a check asks for a token
        self._bury_the_lost()
        awake = [State.STARTING, State.READY, State.PAUSED]
        self.command(Member.release_memory, awake, State.ASLEEP, "its memory is released")

    def wake(self) -> None:
        """Have all sleeping servers take memory for weights again.

        Raises:
            EngineError: if too few servers are left.
        """
        self._bury_the_lost()
        self.command(
            lambda member: member.resume_memory(WEIGHTS),
            [State.ASLEEP],
            State.STARTING,
            "it was woken, and has no weights",
        )

    def close(self) -> None:
        """End all servers that were started, and what waits for them; safe to call twice."""
        self._is_closed = True
        for result in ask_all(self.members, Member.close).values():
            result.result()
        if self.router is not None:
            self.router.close()

    def _update(self, members: Sequence[Member]) -> None:
        """Send the current weights to these servers.

        Raises:
            EngineError: if the stream is not the model's weights.
        """
        if not members:
            return
        send_weights(
            self.weights,
            members,
            self._syncer,
            num_ranks=self._config.tensor_parallel_size,
            bury=self.bury,
        )
        self.command(  # only now, so that memory for the exported weights was left
            lambda member: member.resume_memory(KV_CACHE),
            [State.UPDATING],
            State.READY,
            f"has weights {self.weights.name!r}",
        )

    def _catch_up(self, outdated: Sequence[Member]) -> None:
        """Send the current weights again, to servers that came up late.

        Raises:
            WeightsDifferError: if a server holds others than it was sent: the transport is broken.
            EngineError: if they cannot be had again, and no server has them.
        """
        try:
            self._update(outdated)
        except WeightsDifferError:
            raise
        except EngineError as error:
            if not self.ready:
                raise
            logger.warning("SGLang: %s; the others go on until the next weights", error)
            self._await_load.update(outdated)

    def _bury_the_lost(self) -> None:
        for member in self.members:
            if member.has_lost_process() and member.state is not State.DEAD:
                self.bury(member, "its process is gone")

    def _check_open(self) -> None:
        """Raise EngineError if another thread closed the pool."""
        if self._is_closed:
            raise EngineError("SGLang: the engine was closed while it was in use")

    def _check_enough(self) -> None:
        """Raise EngineError if fewer servers than wanted are alive or may become so."""
        now = time.monotonic()
        lost = [m for m in self.members if m.state is State.DEAD and not m.restarts.is_left(now)]
        left = len(self.members) - len(lost)
        if left >= self._config.min_servers:
            return
        raise EngineError(
            f"SGLang: {len(lost)} of {len(self.members)} servers are dead for good; {left} are "
            f"left, rollout.sglang.min_servers = {self._config.min_servers}. "
            + "; ".join(f"{member}: {member.restarts}" for member in lost)
        )

    def _handle(self, event: CameUp | Checked) -> None:
        member = event.member
        if event.life != member.life or member.state is State.DEAD:
            return
        if isinstance(event, CameUp):
            if isinstance(event.outcome, EngineError):
                self.bury(member, str(event.outcome))
            elif isinstance(event.outcome, OSError | ValueError):  # a later start may find more
                self.bury(member, f"{type(event.outcome).__name__}: {event.outcome}")
            elif isinstance(event.outcome, BaseException):
                raise event.outcome
            else:
                member.served_weights = event.outcome
            return
        self._health.note(event)
        if event.fault is None:
            member.failures["health"] = 0
        elif member.state is State.READY:  # a paused one shows no progress
            self.suspect(member, event.life, "health", event.fault, asked=event.asked)

    def _beat(self, waiting_for: str) -> None:
        """Say now and then what is waited for, unless it never comes."""
        self._check_open()
        now = time.monotonic()
        if now - self._last_heartbeat >= _HEARTBEAT_SECONDS:
            self._last_heartbeat = now
            logger.info(
                "SGLang: waiting for %s; %s",
                *(waiting_for, "; ".join(str(member) for member in self.members)),
            )
