"""One call of ``sample``: which request is where, what was lost, and what comes back.

A request is one HTTP call for all of its samples, after one for their context. What was asked of a
server that died is asked of another one at once; only when none is left does it wait for a restart.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import (
    IsEnough,
    OnCompleted,
    RolloutError,
    SampleRequest,
    SamplingParams,
)
from prefixrl_mcore.rollout.interruption import IsInterrupted
from prefixrl_mcore.rollout.sglang.answer import AnswerReader
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.context_pass import (
    context_pass_payload,
    read_context_pass,
    with_context_pass,
)
from prefixrl_mcore.rollout.sglang.determinism import sample_seeds
from prefixrl_mcore.rollout.sglang.faults import (
    BadAnswer,
    ServerFault,
    ServerLost,
    ServerRefusal,
    is_away,
)
from prefixrl_mcore.rollout.sglang.in_flight import (
    ROUTED,
    Answered,
    InFlight,
    Ticket,
    expected_tokens,
)
from prefixrl_mcore.rollout.sglang.member import Member
from prefixrl_mcore.rollout.sglang.payloads import generate_payload
from prefixrl_mcore.rollout.sglang.pool import ServerPool
from prefixrl_mcore.rollout.sglang.retries import Loss, Retries
from prefixrl_mcore.rollout.sglang.schedule import (
    CompletionLengths,
    Cost,
    choose_server,
    longest_first,
)

logger = logging.getLogger(__name__)

_ABORT_EVERY_SECONDS = 1.0
"""A request may reach a server after the call that aborts all: the call is repeated."""

_ABORT_LIMIT_SECONDS = 60.0
"""Longest wait for aborted requests to come back."""

_INTERRUPTION_LIMIT_SECONDS = 10.0
"""The same where nobody will use them: they are only counted, and whoever interrupts is in a
hurry."""


@dataclass(kw_only=True, slots=True)
class Batch:
    """The requests of one call; ``run`` returns their completions."""

    name: str
    """The engine, for errors."""

    tag: str
    """Begins the request ids on the servers; unique to this call."""

    pool: ServerPool
    """Where they are sampled."""

    requests: Sequence[SampleRequest]
    """What is asked for."""

    limits: Sequence[int]
    """Most new tokens of a completion, for each request."""

    params: SamplingParams
    """How to sample."""

    vocab_size: int
    """Of the model."""

    lengths: CompletionLengths
    """What completions were long so far; grows."""

    is_seeded: bool
    """The servers honour seeds."""

    has_prefix_cache: bool
    """The servers keep a context for the samples that share it."""

    max_retries: int
    """Times that a request that was lost is issued again."""

    router_seconds: float
    """Longest time that a router may be away."""

    max_samples: int
    """Completions that a server is asked for at a time."""

    is_enough: IsEnough
    """Told of each finished request; True ends the rest."""

    on_completed: OnCompleted | None
    """Told how much has come."""

    is_interrupted: IsInterrupted
    """Whether somebody wants the sampling to end now."""

    was_interrupted: bool = False
    """The batch was ended by that."""

    _costs: list[Cost] = field(default_factory=list)
    _waiting: deque[int] = field(default_factory=deque)
    _done: dict[int, list[Completion]] = field(default_factory=dict)
    _in_flight: InFlight = field(default_factory=InFlight)
    _retries: Retries = field(init=False)
    _is_ending: bool = False
    _end_by: float = 0.0
    _next_abort: float = 0.0

    def __post_init__(self) -> None:
        """Begin with nothing lost."""
        self._retries = Retries(self.max_retries, router_seconds=self.router_seconds)

    def run(self) -> list[list[Completion]]:
        """Return the completions of each request, in the order of the requests.

        Raises:
            RolloutError: if a request was refused, or lost for good.
            EngineError: if too few servers are left.
        """
        self._costs = [
            Cost.of(request, self.lengths.expected_tokens(limit), is_cached=self.has_prefix_cache)
            for request, limit in zip(self.requests, self.limits, strict=True)
        ]
        self._waiting.extend(longest_first(self._costs))
        try:
            while len(self._done) < len(self.requests):
                self._advance()
        finally:
            if self._in_flight.tickets:  # nothing may go on sampling behind the caller's back
                self._in_flight.end_all()
                self.pool.abort_all()
        return [self._done[index] for index in range(len(self.requests))]

    def _advance(self) -> None:
        """Send what can be sent, wait a moment, take what came."""
        if not self._is_ending and self.is_interrupted():
            self.was_interrupted = True
            self._end(_INTERRUPTION_LIMIT_SECONDS)
        self.pool.tend(may_update=not self._is_ending)  # nobody is left to sample for
        self._take_back_of_the_dead()
        if self._is_ending:
            self._hurry()
        else:
            self._waiting.extendleft(self._retries.wake())
            self._send_what_fits()
        # A router does not say whom it asked.
        self.pool.check_health(
            self.pool.members if self.pool.router is not None else self._in_flight.members
        )
        answered = self.pool.next_answer(waiting_for=self._outstanding())
        if answered is not None and answered.ticket in self._in_flight.tickets:
            self._take(answered)

    def _send_what_fits(self) -> None:
        """Send requests, the longest first, as long as a server has room."""
        ready = {ROUTED: None} if self.pool.router else {m.index: m for m in self.pool.ready}
        if not self.pool.ready:
            return
        loads = {i: self._in_flight.load_of(member) for i, member in ready.items()}
        room = self.max_samples * (len(self.pool.ready) if self.pool.router else 1)
        while self._waiting:
            index = self._waiting[0]
            request = self.requests[index]
            others = {i: load for i, load in loads.items() if i != self._retries.lost_on(index)}
            server = choose_server(
                self._costs[index],
                request.context_token_ids,
                request.num_samples,
                others or loads,
                max_samples=room,
            )
            if server is None:
                return
            self._waiting.popleft()
            self._send(index, ready[server])

    def _send(self, index: int, member: Member | None) -> None:
        request = self.requests[index]
        ticket = self._in_flight.begin(
            index,
            request,
            self._costs[index],
            member=member,
            server_id=f"{self.tag}-{self._retries.num_lost(index)}-{request.request_id}.",
        )
        client = self.pool.router if member is None else member.client
        assert client is not None, "no member means a router"
        is_routed = member is None and self.has_prefix_cache
        if is_routed and not self.is_seeded and request.num_samples > 1:
            ticket.num_pass_tokens = len(request.context_token_ids)  # at most: nobody reports it
        payload = generate_payload(
            context_token_ids=request.context_token_ids,
            num_samples=request.num_samples,
            max_new_tokens=self.limits[index],
            temperature=self.params.temperature,
            stop_token_ids=self.params.stop_token_ids,
            request_id=ticket.server_id,
            seeds=sample_seeds(request.seed, request.num_samples) if self.is_seeded else None,
            is_routed=is_routed,
        )
        # Not a thread pool's: those are waited for when the interpreter ends, and a server that
        # hangs elsewhere may keep this one for an hour.
        threading.Thread(target=self._ask, args=(ticket, client, payload), daemon=True).start()

    def _ask(self, ticket: Ticket, client: SGLangClient, payload: Mapping[str, Any]) -> None:
        """In a thread: the HTTP calls of one request, the first of them for the context."""
        outcome: list[dict[str, Any]] | BaseException
        context = self.requests[ticket.index].context_token_ids
        try:
            if self.has_prefix_cache and ticket.num_samples > 1 and ticket.member is not None:
                answers = client.generate(
                    context_pass_payload(context, f"{ticket.server_id}context")
                )
                ticket.num_pass_tokens = read_context_pass(answers, len(context))
            if self._is_ending or not ticket.is_wanted:
                raise ServerLost("its samples were not asked for: no more is wanted")
            outcome = client.generate(payload)
        except BaseException as error:  # raised in the caller's thread, or taken as a fault there
            outcome = error
        self.pool.events.put(Answered(ticket=ticket, outcome=outcome))

    def _take(self, answered: Answered) -> None:
        """Take the end of a call: completions, a fault, or an error that ends the batch."""
        ticket, outcome = answered.ticket, answered.outcome
        self._in_flight.end(ticket)
        if isinstance(outcome, BaseException):
            if not isinstance(outcome, ServerFault):
                raise outcome
            fault = outcome
        else:
            try:
                self._finish(ticket, self._read(ticket, outcome))
                return
            except ServerFault as raised:
                fault = raised
        if self._is_ending:
            self._finish_unanswered(ticket.index, str(fault))
            return
        if isinstance(fault, ServerRefusal) and fault.is_hopeless:
            raise RolloutError(
                f"{self.name}: request {self.requests[ticket.index].request_id!r} was refused: "
                f"{fault}"
            ) from fault
        if isinstance(fault, BadAnswer):
            self.pool.counters.num_bad_answers += 1
        if ticket.member is not None:  # first, because its death is a loss of another kind
            self.pool.suspect(ticket.member, ticket.life, "answer", fault, asked=ticket.sent)
        self._lose(ticket, str(fault), _kind_of_loss(ticket, fault))

    def _read(self, ticket: Ticket, answers: list[dict[str, Any]]) -> list[Completion]:
        """Return the completions of an answer, once it has been checked.

        Raises:
            ServerFault: if it cannot be believed.
            RolloutError: if no server could answer better.
        """
        request = self.requests[ticket.index]
        where = f"{self.name}: request {request.request_id!r}"
        if ticket.member is not None:
            where += f" on {ticket.member.name}"
        if len(answers) != request.num_samples:
            raise BadAnswer(
                f"{where}: expected {request.num_samples} completions, got {len(answers)}"
            )
        reader = AnswerReader(
            where=where,
            max_new_tokens=self.limits[ticket.index],
            stop_token_ids=frozenset(self.params.stop_token_ids),
            vocab_size=self.vocab_size,
            weight_version=self.pool.weights.name,
            policy_version=self.pool.weights.policy_version,
            may_be_aborted=self._is_ending,
        )
        completions = [reader.read(answer) for answer in answers]
        return with_context_pass(completions, ticket.num_pass_tokens)

    def _finish(self, ticket: Ticket, completions: list[Completion]) -> None:
        """Note a request's completions and tell whoever wants to know."""
        if ticket.member is not None:
            ticket.member.failures["answer"] = 0
        self.pool.counters.note_answer(
            None if ticket.member is None else ticket.server,
            len(self.requests[ticket.index].context_token_ids),
            completions,
        )
        for completion in completions:
            if completion.finish_reason != "abort":
                self.lengths.observe(len(completion.token_ids))
        self._complete(ticket.index, completions)

    def _complete(self, index: int, completions: list[Completion]) -> None:
        self._done[index] = completions
        if self._is_ending:
            return
        if self.on_completed is not None:
            self.on_completed(len(completions), sum(len(one.token_ids) for one in completions))
        if self.is_enough(index, completions) and len(self._done) < len(self.requests):
            self._end(_ABORT_LIMIT_SECONDS)

    def _end(self, limit_seconds: float) -> None:
        """Begin to end the batch: what was not sent is not, and the rest is aborted.

        Args:
            limit_seconds: longest wait for what is aborted.
        """
        self._waiting.extend(self._retries.wake_all())
        num_sent, num_unsent = len(self._in_flight.tickets), len(self._waiting)
        logger.debug(
            "%s: no more is wanted; %d requests are aborted, %d of them were not sent",
            *(self.name, num_sent + num_unsent, num_unsent),
        )
        self._is_ending = True
        self._end_by = time.monotonic() + limit_seconds
        while self._waiting:
            self._finish_unanswered(self._waiting.popleft(), "")

    def _hurry(self) -> None:
        """Tell the servers to drop what is in flight, and give up what does not come back."""
        now = time.monotonic()
        if now >= self._end_by:
            for answered in self.pool.take_answers():  # came in time: we looked too late
                if answered.ticket in self._in_flight.tickets:
                    self._take(answered)
            for ticket in list(self._in_flight.tickets):
                self._in_flight.end(ticket)
                self._finish_unanswered(ticket.index, "it was aborted and never came back")
        elif self._in_flight.tickets and now >= self._next_abort:
            self.pool.abort_all()
            self._next_abort = time.monotonic() + _ABORT_EVERY_SECONDS

    def _finish_unanswered(self, index: int, cause: str) -> None:
        """Note completions without a token for a request that is no longer wanted."""
        request = self.requests[index]
        if cause:
            logger.debug("%s: request %r: %s", self.name, request.request_id, cause)
        self.pool.counters.num_aborted += request.num_samples
        unstarted = Completion.unstarted(self.pool.weights.policy_version)
        self._complete(index, [unstarted] * request.num_samples)

    def _take_back_of_the_dead(self) -> None:
        """Take back what dead servers owe."""
        for member, tickets in self._in_flight.end_of_the_dead().items():
            logger.warning(
                "%s: %s owed %d requests (about %.0f tokens)%s",
                *(self.name, member.name, len(tickets), expected_tokens(tickets)),
                "" if self._is_ending else "; they are issued again",
            )
            for ticket in tickets:
                cause = f"{member.name} died: {member.last_death}"
                if self._is_ending:
                    self._finish_unanswered(ticket.index, cause)
                else:
                    self._lose(ticket, cause, "death")

    def _lose(self, ticket: Ticket, cause: str, loss: Loss) -> None:
        """Count a lost request, and issue it again as long as it may be tried.

        Args:
            ticket: the call that was lost.
            cause: why.
            loss: what kind of cause that is. After a death, of which there is a line in the log,
                the others are well, and get the request at once; otherwise it rests.

        Raises:
            RolloutError: if it was tried often enough.
        """
        request_id = self.requests[ticket.index].request_id
        self._retries.note_loss(ticket.index, ticket.server, loss)
        num_lost = self._retries.num_lost(ticket.index)
        if not self._retries.may_retry(ticket.index):
            raise RolloutError(
                f"{self.name}: request {request_id!r} was lost after {num_lost} attempts "
                f"({self._retries.num_deaths(ticket.index)} by a server's death, of which, and of "
                f"others, rollout.sglang.max_retries = {self.max_retries} are allowed): {cause}"
            )
        logger.log(
            logging.DEBUG if loss == "death" else logging.WARNING,
            "%s: request %r was lost, attempt %d follows: %s",
            *(self.name, request_id, num_lost + 1, cause),
        )
        self.pool.counters.num_reissued += 1
        if loss == "death":
            self._waiting.appendleft(ticket.index)
        else:
            self._retries.rest(ticket.index)

    def _outstanding(self) -> str:
        """Say what is outstanding, for the heartbeat."""
        num_waiting = len(self._waiting) + self._retries.num_resting
        return f"{self._in_flight} and {num_waiting} that wait, of {len(self.requests)}"


def _kind_of_loss(ticket: Ticket, fault: ServerFault) -> Loss:
    """Return what a fault makes of the loss of its request."""
    if ticket.is_of_the_dead:
        return "death"
    return "router" if ticket.member is None and is_away(fault) else "other"
