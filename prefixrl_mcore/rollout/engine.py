"""The rollout engine protocol: token ids in, token ids and logprobs out, never text.

An engine knows contexts and weights. It does not know problems, prefixes, groups or rewards.
The trainer talks to it from one rank; the engine may use any number of devices of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prefixrl_mcore.records import Completion

if TYPE_CHECKING:
    from torch import Tensor


class EngineError(RuntimeError):
    """The engine cannot serve any more; the message names the engine and the cause."""


class RolloutError(RuntimeError):
    """A rollout was lost for good; the message names its request id and the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """A context and how many completions to sample after it."""

    request_id: str
    """Unique among the requests in flight; named in every error."""

    context_token_ids: tuple[int, ...]
    """[num_context_tokens] prompt and prefix; never empty."""

    num_samples: int
    """Completions to sample independently after the same context."""

    seed: int
    """Seed of this request; engines that cannot honour it say so in ``is_seeded``."""

    max_completion_tokens: int | None = None
    """New tokens per completion of this request, where they are fewer than those of
    ``SamplingParams``: for the rest of a completion that was begun before. None is no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to sample, for all requests of one call.

    There is no top-p or top-k: the loss uses the full softmax at the same temperature.
    """

    temperature: float
    """Above 0, or exactly 0 for greedy decoding (logprobs are then at temperature 1)."""

    max_completion_tokens: int
    """New tokens per completion."""

    max_total_tokens: int
    """Context and completion together; a context that leaves no room is refused."""

    stop_token_ids: tuple[int, ...]
    """Tokens that end a completion; the end token is part of the completion."""


OnCompleted = Callable[[int, int], None]
"""Called with (completions of one request, tokens in them) whenever a request is finished."""

IsEnough = Callable[[int, list[Completion]], bool]
"""Called with (index of a finished request, its completions); True aborts what is in flight."""


def never_enough(_index: int, _completions: list[Completion]) -> bool:
    """Return False: all that is asked for is sampled."""
    return False


WeightStream = Callable[[], Iterator[tuple[str, "Tensor"]]]
"""Begins a stream of (Hugging Face name, full tensor) pairs, one per weight of the model. A tensor
is valid until the next one is asked for. The stream may be left half-way by closing it."""


class RolloutEngine(Protocol):
    """What the trainer needs of an inference engine; one contract-test suite runs on each.

    Calls may come from different threads. Those that sample wait for each other; those that change
    the engine (``load_weights``, ``pause``, ``resume``, ``sleep``, ``wake``) are refused with an
    EngineError while completions are sampled; ``close`` ends whatever goes on.
    """

    @property
    def name(self) -> str:
        """Short name with version, for logs and the trace store: ``sglang 0.5.17``."""
        ...

    @property
    def is_seeded(self) -> bool:
        """Equal requests with equal seeds and weights give equal completions."""
        ...

    @property
    def policy_version(self) -> int:
        """Version of the weights loaded last; ``-1`` for those the engine began with."""
        ...

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        on_completed: OnCompleted | None = None,
        is_enough: IsEnough = never_enough,
    ) -> list[list[Completion]]:
        """Return ``num_samples`` completions for each request, in the order of the requests.

        ``is_enough`` is called in the caller's thread after each finished request, and not again
        once it was true. What is in flight is then aborted: such a completion has the finish
        reason ``abort`` and the tokens so far, possibly none. ``on_completed`` hears of finished
        requests only.

        An engine may be built with a function that ends any call in the middle
        (``interruption.py``).

        Raises:
            SamplingInterrupted: if that function said so; nothing is in flight any more.
            ValueError: if a context is empty or leaves no room for a completion.
            RolloutError: if a request was lost after all retries.
            EngineError: if the engine is gone and could not be restarted.
        """
        ...

    def load_weights(self, stream: WeightStream, policy_version: int) -> None:
        """Replace all weights; later completions carry ``policy_version``.

        Args:
            stream: begins the weights. As long as this version is current, the engine may begin
                them again inside ``load_weights`` and ``sample``, from the caller's thread: for a
                server that was started anew.
            policy_version: optimizer steps applied to these weights.

        Raises:
            EngineError: if a name is unknown, missing, or its shape differs.
        """
        ...

    def pause(self) -> None:
        """Have the engine compute nothing: no sampling until ``resume``.

        A run never does; for callers that share the device with something else.
        """
        ...

    def resume(self) -> None:
        """Accept requests again."""
        ...

    def sleep(self) -> None:
        """Give device memory back to the trainer; the weights may be lost."""
        ...

    def wake(self) -> None:
        """Take device memory again; ``load_weights`` must follow before sampling."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """Return what was measured since the last call, by metric name; empty if nothing was."""
        ...

    def close(self) -> None:
        """Stop everything that the engine started; safe to call twice."""
        ...
