r"""Verification of mathematical answers by math-verify, in processes that can be killed.

Answer forms (``RewardConfig.answer_form``):

* ``final``: the last answer that the completion states, found by the rules of ``extract.py``, must
  equal the reference. The prefix is looked at only for a statement that it begins and the
  completion ends.
* ``sequence``: all closed ``\boxed{}`` of prefix + completion, in order, must be as many as the
  reference has parts (split at commas outside brackets), and equal to them.

Reasons of a verdict: ``correct``; ``wrong``; ``no_answer`` (nothing stated); ``not_stopped``
(``require_stop`` and the completion was cut off; not judged); ``too_long`` (an answer of thousands
of characters that is not literally the reference: not parsed); ``bad_reference`` (the reference
cannot be verified; find those with ``check_references`` before a run); ``timeout``, ``memory``,
``crash`` and ``error`` (what the answer did to its process). Only ``correct`` has reward 1.0.

The parent process imports neither math-verify nor sympy nor torch.
"""

import logging
from collections.abc import Sequence
from importlib.metadata import version

from prefixrl_mcore.config.reward import RewardConfig
from prefixrl_mcore.records import Verdict
from prefixrl_mcore.rewards.base import VerifyRequest
from prefixrl_mcore.rewards.pool import JudgePool, Outcome, PoolCounters
from prefixrl_mcore.rewards.wire import Json

logger = logging.getLogger(__name__)

RULES_VERSION = 1
"""Raised whenever extraction or comparison may decide differently than before."""

_JUDGE = "prefixrl_mcore.rewards.math_judge:judge"
_STRADDLE_CHARS = 4096
"""End of the prefix that is looked at for a statement that the completion finishes."""
_WARM_UP_ANSWERS = (
    ("12", r"\boxed{\frac{24}{2}}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"x^2+2x+1", r"\boxed{(x+1)^2}"),
    (r"\{1, 2\}", r"the answer is $2, 1$."),
    (r"(-\infty, 3]", r"#### $(-\infty, \sqrt{9}]$"),
    ("50\\%", "so 1,250.5 or 12 apples"),
)


class MathVerifier:
    """Judges completions by their mathematical answer; implements ``Verifier``.

    Nothing that a completion contains raises here, or hangs beyond the time limit of one answer.
    Not copied into forked processes: each process that verifies makes its own.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        warm_up: list[Json] = [
            ["final", reference, text, 0, True] for reference, text in _WARM_UP_ANSWERS
        ]
        self._pool = JudgePool(
            _JUDGE,
            num_workers=config.num_workers,
            timeout_seconds=config.timeout_seconds,
            memory_limit_bytes=config.memory_limit_bytes,
            warm_up=warm_up,
        )

    @property
    def name(self) -> str:
        """math-verify's version, the answer form, and the version of our own rules."""
        form = self._config.answer_form
        return f"math-verify {version('math-verify')} {form} rules-{RULES_VERSION}"

    @property
    def counters(self) -> PoolCounters:
        """Totals of timeouts, kills and the like since the verifier was made."""
        return self._pool.counters

    def verify(self, requests: Sequence[VerifyRequest]) -> list[Verdict]:
        """Return one verdict per request, in order."""
        judged = [
            request for request in requests if request.has_stopped or not self._config.require_stop
        ]
        outcomes = iter(self._pool.run([self._payload(request) for request in judged]))
        judged_ids = {id(request) for request in judged}
        return [
            _verdict(request, next(outcomes))
            if id(request) in judged_ids
            else Verdict(reward=0.0, reason="not_stopped")
            for request in requests
        ]

    def find_answer(self, texts: Sequence[tuple[str, str]]) -> list[bool]:
        r"""Return for each (answer, text) whether the text already states the final answer.

        It does if any closed ``\boxed{}`` or final-answer phrase in it (``extract.py``) equals the
        answer; for ``sequence``, if its first boxes are all the parts. That the number occurs
        somewhere is not a statement. A text that exceeds the limits counts as stating nothing,
        with a warning.
        """
        form = self._config.answer_form
        outcomes = self._pool.run([["states", form, answer, text] for answer, text in texts])
        for (answer, _), outcome in zip(texts, outcomes, strict=True):
            if outcome.status != "done":
                logger.warning(
                    "whether a prefix states the answer %.80r is unknown (%s); taken as no",
                    answer,
                    outcome.status,
                )
        return [outcome.value is True for outcome in outcomes]

    def check_references(self, answers: Sequence[str]) -> list[str | None]:
        """Return for each reference answer why it cannot be verified, or None when it can."""
        form = self._config.answer_form
        outcomes = self._pool.run([["check", form, answer] for answer in answers])
        return [_complaint(outcome) for outcome in outcomes]

    def check_reference(self, answer: str) -> str | None:
        """Return why a reference answer cannot be verified, or None; see ``check_references``."""
        return self.check_references([answer])[0]

    def close(self) -> None:
        """Stop the verifier's processes; safe to call twice."""
        self._pool.close()

    def _payload(self, request: VerifyRequest) -> Json:
        if self._config.answer_form == "sequence":
            return ["sequence", request.answer, request.prefix_text + request.completion_text]
        tail = request.prefix_text[-_STRADDLE_CHARS:]
        text = tail + request.completion_text
        return ["final", request.answer, text, len(tail), request.has_stopped]


def _verdict(request: VerifyRequest, outcome: Outcome) -> Verdict:
    """Return what an outcome means for the reward."""
    match outcome.status, outcome.value:
        case "done", [str(reason), str(extracted)]:
            reward = 1.0 if reason == "correct" else 0.0
            return Verdict(
                reward=reward, reason=reason, extracted=extracted, seconds=outcome.seconds
            )
        case _:
            logger.warning(
                "%s: no verdict on its answer (%s %s); counted as wrong",
                request.request_id,
                outcome.status,
                outcome.value or "",
            )
            return Verdict(reward=0.0, reason=outcome.status, seconds=outcome.seconds)


def _complaint(outcome: Outcome) -> str | None:
    if outcome.status == "done":
        return None if outcome.value is None else str(outcome.value)
    return f"unknown answer format: verifying it ended in {outcome.status}"
