"""Whether servers still do something: the busy show it now and then, all before an update."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.client import SGLangClient
from prefixrl_mcore.rollout.sglang.faults import ServerFault
from prefixrl_mcore.rollout.sglang.member import Member, ask_all

_PROBE_PAUSE_SECONDS = 0.5
"""Between two probes before an update: one that is refused at once says little of the next."""

_DEATH_SECONDS = 1.0
"""Time from a broken connection until the supervisor has seen that the process is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """The end of one health check."""

    member: Member
    """Who was checked."""

    life: int
    """Its life when that began."""

    asked: float
    """When, on the monotonic clock."""

    fault: ServerFault | None
    """Why it showed no progress; None if it did."""


class HealthWatch:
    """Health checks of servers that owe answers, each in a thread of its own."""

    def __init__(self, config: SGLangConfig, report: Callable[[Checked], None]) -> None:
        """Begin with no check.

        Args:
            config: how often to check, and how long that may take.
            report: is called in the thread of a check with its end.
        """
        self._config = config
        self._report = report
        self._next_check: dict[Member, float] = {}
        self._under_way: dict[Member, tuple[int, threading.Thread]] = {}  # life, and check

    def begin_due(self, members: Sequence[Member]) -> None:
        """Begin a check of each of these servers, if one is due.

        A server has one at a time, until its end was noted: one silence counts once.
        """
        now = time.monotonic()
        for member in members:
            if not self._is_checked(member) and self._next_check.get(member, 0.0) <= now:
                check = threading.Thread(
                    target=self._check, args=(member, member.life, member.client), daemon=True
                )
                self._under_way[member] = member.life, check
                check.start()

    def _is_checked(self, member: Member) -> bool:
        """Return whether a check is under way; nobody notes the end of one of an earlier life."""
        life, check = self._under_way.get(member, (None, None))
        return life == member.life or (check is not None and check.is_alive())

    def note(self, checked: Checked) -> None:
        """Count the time until the server's next check from here."""
        del self._under_way[checked.member]
        self._next_check[checked.member] = time.monotonic() + self._config.health_every_seconds

    def wait(self) -> None:
        """Return when no check is under way."""
        for _, check in self._under_way.values():
            check.join()

    def _check(self, member: Member, life: int, client: SGLangClient) -> None:
        """In a thread: check one server's health."""
        fault, asked = None, time.monotonic()
        try:
            client.check_progress(self._config.health_timeout_seconds)
        except ServerFault as raised:
            fault = raised
        self._report(Checked(member=member, life=life, asked=asked, fault=fault))


def find_silent(members: Sequence[Member], *, max_probes: int) -> list[Member]:
    """Return those who answer none of ``max_probes`` probes."""
    answers = ask_all(members, lambda member: _answers_at_all(member, max_probes))
    return [member for member, answer in answers.items() if not answer.result()]


def _answers_at_all(member: Member, max_probes: int) -> bool:
    """In a thread: return whether a server answers a probe."""
    for probe in range(max_probes):
        if probe:
            time.sleep(_PROBE_PAUSE_SECONDS)
        if member.client.is_healthy():
            return True
        if member.has_lost_process():
            return False
    return False


def is_gone(member: Member) -> bool:
    """Return whether a server that dropped a connection is dead, and not only busy or restless."""
    if member.client.is_healthy():
        return False
    deadline = time.monotonic() + _DEATH_SECONDS
    while member.server is not None and member.server.is_alive and time.monotonic() < deadline:
        time.sleep(0.05)  # for its supervisor to say what it died of
    return True
