"""Who may use an engine: one call samples from it or changes it, and never both at a time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefixrl_mcore.rollout.engine import EngineError

_PAUSED = "it is paused; call resume first"
_ASLEEP = "it slept; call wake and load_weights first"
_INCOMPLETE = "its weights are incomplete; load_weights failed or did not finish"
_CLOSED = "it is closed"


class EngineGuard:
    """Keeps calls of different threads apart, and knows why an engine cannot sample, if so.

    What samples waits for another one that samples. What changes the engine waits for nobody: it is
    refused while completions are sampled, because the caller thinks that none are.
    """

    def __init__(self, name: Callable[[], str]) -> None:
        """Begin with an engine that can sample.

        Args:
            name: the engine's, for errors.
        """
        self._name = name
        self._in_use = threading.Lock()
        self._closing = threading.Lock()  # what is closed stays so
        self._obstacle = ""

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called, by whichever thread."""
        return self._obstacle == _CLOSED

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample, after whoever does at the moment.

        Raises:
            EngineError: if the engine is closed or paused, or has no complete weights.
        """
        self._check_can_sample()  # now, rather than after all that samples before
        with self._in_use:
            self._check_can_sample()
            yield

    @contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """Change the engine, which nobody samples from meanwhile.

        Args:
            what: is done, for errors: ``sleep``.

        Raises:
            EngineError: if the engine is closed, or samples.
        """
        if self.is_closed:
            raise EngineError(f"{self._name()}: cannot {what}: {_CLOSED}")
        if not self._in_use.acquire(blocking=False):
            raise EngineError(
                f"{self._name()}: cannot {what} while completions are sampled; wait for sample"
            )
        try:
            yield
        finally:
            self._in_use.release()

    @contextmanager
    def replacing_weights(self) -> Iterator[None]:
        """Inside ``changing``: weights are complete at the end, and not if that is not reached."""
        after = _PAUSED if self._obstacle == _PAUSED else ""
        self.forbid(_INCOMPLETE)
        yield
        self.forbid(after)

    def pause(self) -> bool:
        """Inside ``changing``: forbid to sample; return whether that was allowed until now."""
        could = not self._obstacle
        if could:
            self.forbid(_PAUSED)
        return could

    def resume(self) -> bool:
        """Inside ``changing``: allow what ``pause`` forbade; return whether it had."""
        was_paused = self._obstacle == _PAUSED
        if was_paused:
            self.forbid("")
        return was_paused

    def sleep(self) -> None:
        """Inside ``changing``: forbid to sample until there are weights again."""
        self.forbid(_ASLEEP)

    def close(self) -> None:
        """Forbid everything for good; may be called in any thread, at any time."""
        with self._closing:
            self._obstacle = _CLOSED

    def forbid(self, obstacle: str) -> None:
        """Say why the engine cannot sample; an empty text allows it, if it is not closed."""
        with self._closing:
            if not self.is_closed:
                self._obstacle = obstacle

    def _check_can_sample(self) -> None:
        if self._obstacle:
            raise EngineError(f"{self._name()}: cannot sample: {self._obstacle}")
