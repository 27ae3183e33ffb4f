"""Sampling that is ended in the middle, by whoever wants to stop the run."""

from collections.abc import Callable, Sequence
from typing import Self

from prefixrl_mcore.records import Completion
from prefixrl_mcore.rollout.engine import SampleRequest

IsInterrupted = Callable[[], bool]
"""Asked by an engine from the thread that samples, between two tokens or several times a second;
True ends the call with ``SamplingInterrupted``."""


def never_interrupted() -> bool:
    """Return False: nobody stops this."""
    return False


class SamplingInterrupted(RuntimeError):  # noqa: N818 -- no error: it was asked for
    """What was being sampled is thrown away; says how much that was, as far as it is known.

    Known is what the engine gave back. A request that was aborted before its first token, or that
    never came back, counts nothing.
    """

    def __init__(self, num_tokens: int, num_new_tokens: int, num_cached_tokens: int) -> None:
        """Keep the counts.

        Args:
            num_tokens: context and new tokens of all completions.
            num_new_tokens: those of them that were sampled.
            num_cached_tokens: context tokens that the engine did not compute.
        """
        super().__init__(num_tokens, num_new_tokens, num_cached_tokens)  # survives pickling
        self.num_tokens = num_tokens
        self.num_new_tokens = num_new_tokens
        self.num_cached_tokens = num_cached_tokens

    def __str__(self) -> str:
        """Say it in words."""
        return (
            f"sampling was interrupted: {self.num_new_tokens} sampled tokens ({self.num_tokens} "
            "with their contexts) are thrown away"
        )

    @classmethod
    def after(
        cls, requests: Sequence[SampleRequest], sampled: Sequence[Sequence[Completion]]
    ) -> Self:
        """Count what there is of each request, in the order of the requests."""
        begun = [
            (len(request.context_token_ids), completion)
            for request, completions in zip(requests, sampled, strict=True)
            for completion in completions
            if completion.token_ids
        ]
        num_new_tokens = sum(len(completion.token_ids) for _, completion in begun)
        return cls(
            num_new_tokens + sum(num_context_tokens for num_context_tokens, _ in begun),
            num_new_tokens,
            sum(completion.num_cached_tokens for _, completion in begun),
        )
