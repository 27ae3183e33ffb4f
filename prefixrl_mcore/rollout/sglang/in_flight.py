"""What servers were asked and have not answered, and how busy that makes each of them."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prefixrl_mcore.rollout.engine import SampleRequest
from prefixrl_mcore.rollout.sglang.member import Member
from prefixrl_mcore.rollout.sglang.schedule import Cost, Load

ROUTED = -1
"""Stands for the router among the servers' indices."""


@dataclass(eq=False, kw_only=True, slots=True)
class Ticket:
    """One HTTP call that is under way."""

    index: int
    """Place of its request in the batch."""

    member: Member | None
    """Who was asked; None where a router chooses."""

    life: int
    """The member's life when it was asked."""

    num_samples: int
    """Completions that it was asked for."""

    tokens: float
    """Expected of it, as charged to the server's load."""

    server_id: str
    """Its request id on the server."""

    sent: float
    """When, on the monotonic clock."""

    num_pass_tokens: int = 0
    """Context tokens that were computed before the samples, by a pass of their own."""

    is_wanted: bool = True
    """Somebody waits for it."""

    @property
    def server(self) -> int:
        """The index of who was asked, or ``ROUTED``."""
        return _index_of(self.member)

    @property
    def is_of_the_dead(self) -> bool:
        """Whether the server that was asked is dead, or was started anew since."""
        member = self.member
        return member is not None and (member.life != self.life or not member.is_up)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """The end of one call."""

    ticket: Ticket
    """Which."""

    outcome: list[dict[str, Any]] | BaseException
    """One answer per sample, or what went wrong."""


class InFlight:
    """The calls of one batch that are under way, and the load of each server in each life.

    A server that was started anew has nothing in its cache.
    """

    def __init__(self) -> None:
        """Begin with nothing under way."""
        self.tickets: list[Ticket] = []
        self._loads: dict[tuple[int, int], Load] = {}

    @property
    def members(self) -> list[Member]:
        """Who owes answers."""
        return list(dict.fromkeys(one.member for one in self.tickets if one.member is not None))

    def load_of(self, member: Member | None) -> Load:
        """Return what a server is busy with, or all behind a router, to be looked at."""
        return self._loads.setdefault((_index_of(member), _life_of(member)), Load())

    def begin(
        self,
        index: int,
        request: SampleRequest,
        cost: Cost,
        *,
        member: Member | None,
        server_id: str,
    ) -> Ticket:
        """Charge a server with a request; return the ticket of the call."""
        load = self.load_of(member)
        ticket = Ticket(
            index=index,
            member=member,
            life=_life_of(member),
            num_samples=request.num_samples,
            tokens=load.cost_of(cost, request.context_token_ids),
            server_id=server_id,
            sent=time.monotonic(),
        )
        load.outstanding_tokens += ticket.tokens
        load.outstanding_samples += ticket.num_samples
        load.contexts.add(request.context_token_ids)
        self.tickets.append(ticket)
        return ticket

    def end(self, ticket: Ticket) -> None:
        """Take a call off the load of its server."""
        ticket.is_wanted = False
        self.tickets.remove(ticket)
        load = self._loads[ticket.server, ticket.life]
        load.outstanding_tokens -= ticket.tokens
        load.outstanding_samples -= ticket.num_samples

    def end_all(self) -> None:
        """End all calls: nobody waits for them any more."""
        for ticket in list(self.tickets):
            self.end(ticket)

    def end_of_the_dead(self) -> dict[Member, list[Ticket]]:
        """End what dead servers owe, and return it: such calls may hang as long as they like."""
        owed: dict[Member, list[Ticket]] = {}
        for ticket in list(self.tickets):
            if ticket.member is not None and ticket.is_of_the_dead:
                self.end(ticket)
                owed.setdefault(ticket.member, []).append(ticket)
        return owed

    def __str__(self) -> str:
        """Say how much it is, and since when."""
        oldest = min((ticket.sent for ticket in self.tickets), default=time.monotonic())
        return (
            f"{len(self.tickets)} requests in flight (about {expected_tokens(self.tickets):.0f} "
            f"tokens, the oldest for {time.monotonic() - oldest:.0f} s)"
        )


def expected_tokens(tickets: Iterable[Ticket]) -> float:
    """Return the tokens expected of these calls."""
    return sum(ticket.tokens for ticket in tickets)


def _index_of(member: Member | None) -> int:
    return ROUTED if member is None else member.index


def _life_of(member: Member | None) -> int:
    return 0 if member is None else member.life
