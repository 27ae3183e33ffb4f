"""A verifier without processes: the text behind the last ``A: `` must equal the reference."""

from collections.abc import Sequence

from prefixrl_mcore.records import Verdict
from prefixrl_mcore.rewards.base import VerifyRequest


class FakeVerifier:
    """Judges by ``A: <answer>`` on the last line; remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[VerifyRequest] = []

    @property
    def name(self) -> str:
        return "fake 1.0"

    def verify(self, requests: Sequence[VerifyRequest]) -> list[Verdict]:
        self.requests.extend(requests)
        return [self._verdict(request) for request in requests]

    def find_answer(self, texts: Sequence[tuple[str, str]]) -> list[bool]:
        return [f"A: {answer}" in text for answer, text in texts]

    def check_references(self, answers: Sequence[str]) -> list[str | None]:
        return [None for _ in answers]

    def close(self) -> None:
        pass

    def _verdict(self, request: VerifyRequest) -> Verdict:
        _, marker, extracted = request.completion_text.rpartition("A: ")
        if not marker:
            return Verdict(reward=0.0, reason="no_answer")
        is_right = extracted == request.answer
        return Verdict(
            reward=float(is_right), reason="correct" if is_right else "wrong", extracted=extracted
        )
