"""Traces through a verifier: on import, and again for a whole store."""

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.traces import TraceStore
from prefixrl_mcore.records import FinishReason, Problem, Verdict
from prefixrl_mcore.rewards.base import Verifier, VerifyRequest
from prefixrl_mcore.rewards.build import verify

_BATCH_SIZE = 1024
"""Traces verified in one call, to bound the texts held in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """A completion to be verified as an answer to a problem."""

    attempt_id: str
    """Trace id, named in reports."""

    problem: Problem
    """The problem with its reference answer."""

    completion_token_ids: tuple[int, ...]
    """[num_completion_tokens] the tokens that the verifier's text is decoded from."""

    finish_reason: FinishReason
    """Why the completion ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A stored trace that the verifier does not accept any more."""

    trace_id: str
    """The trace."""

    problem_id: str
    """Its problem."""

    answer: str
    """The reference answer now; empty when the problem is unknown."""

    reason: str
    """The verdict's reason, or ``unknown_problem``."""

    extracted: str
    """The answer that the verifier found; empty when none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerificationReport:
    """Result of verifying a store again."""

    verifier: str
    """Name and version of the verifier that was used now."""

    num_traces: int
    """Traces in the store."""

    failures: tuple[Failure, ...]
    """Traces that did not verify, in the order of the store."""

    @property
    def num_verified(self) -> int:
        """Traces that verified."""
        return self.num_traces - len(self.failures)

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> failures."""
        return dict(collections.Counter(failure.reason for failure in self.failures))


def verify_attempts(
    attempts: Sequence[Attempt], verifier: Verifier, renderer: PromptRenderer
) -> list[Verdict]:
    """Return one verdict per attempt, in order, on the text of its token ids."""
    verdicts: list[Verdict] = []
    for begin in range(0, len(attempts), _BATCH_SIZE):
        requests = [
            VerifyRequest(
                request_id=attempt.attempt_id,
                answer=attempt.problem.answer,
                prefix_text="",
                completion_text=renderer.completion_text(attempt.completion_token_ids),
                has_stopped=attempt.finish_reason == "stop",
            )
            for attempt in attempts[begin : begin + _BATCH_SIZE]
        ]
        verdicts.extend(verify(verifier, requests))
    return verdicts


def verify_store(
    store: TraceStore,
    problems: Sequence[Problem],
    verifier: Verifier,
    renderer: PromptRenderer,
) -> VerificationReport:
    """Verify every trace of a store against the problems' answers as they are now.

    The store is not changed.
    """
    by_id: Mapping[str, Problem] = {problem.problem_id: problem for problem in problems}
    attempts: list[Attempt] = []
    failures: dict[str, Failure] = {}
    order: list[str] = []
    for record in store.traces():
        order.append(record.trace_id)
        problem = by_id.get(record.problem_id)
        if problem is None:
            failures[record.trace_id] = Failure(
                trace_id=record.trace_id,
                problem_id=record.problem_id,
                answer="",
                reason="unknown_problem",
                extracted="",
            )
            continue
        attempts.append(
            Attempt(
                attempt_id=record.trace_id,
                problem=problem,
                completion_token_ids=record.completion_token_ids,
                finish_reason=record.finish_reason,
            )
        )
    verdicts = verify_attempts(attempts, verifier, renderer)
    for attempt, verdict in zip(attempts, verdicts, strict=True):
        if verdict.reward <= 0.0:
            failures[attempt.attempt_id] = Failure(
                trace_id=attempt.attempt_id,
                problem_id=attempt.problem.problem_id,
                answer=attempt.problem.answer,
                reason=verdict.reason,
                extracted=verdict.extracted,
            )
    return VerificationReport(
        verifier=verifier.name,
        num_traces=len(order),
        failures=tuple(failures[trace_id] for trace_id in order if trace_id in failures),
    )
