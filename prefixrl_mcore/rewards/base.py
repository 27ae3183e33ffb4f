"""The verifier protocol: text in, verdict out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prefixrl_mcore.records import Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyRequest:
    """One completion to judge."""

    request_id: str
    """Rollout or trace id, named in logs."""

    answer: str
    """Reference answer of the problem."""

    prefix_text: str
    """Decoded prefix; empty without one."""

    completion_text: str
    """Decoded completion, without the end token."""

    has_stopped: bool
    """The completion ended by itself (finish reason ``stop``)."""


class Verifier(Protocol):
    """Judges completions; never raises because of what a completion contains.

    Made with the run's ``RewardConfig`` as its only argument, in each process that verifies.
    """

    @property
    def name(self) -> str:
        """Name and version of the rules, kept with traces: ``math-verify 0.9.0 final rules-1``."""
        ...

    def verify(self, requests: Sequence[VerifyRequest]) -> list[Verdict]:
        """Return one verdict per request, in order."""
        ...

    def find_answer(self, texts: Sequence[tuple[str, str]]) -> list[bool]:
        """Return for each (answer, text) whether the text already states the final answer."""
        ...

    def check_references(self, answers: Sequence[str]) -> list[str | None]:
        """Return for each reference answer why it cannot be verified, or None when it can."""
        ...

    def close(self) -> None:
        """Stop the verifier's processes; safe to call twice."""
        ...
