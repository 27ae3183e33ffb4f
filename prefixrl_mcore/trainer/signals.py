"""Stopping between steps: a signal asks, all ranks agree, the step in progress is finished."""

import logging
import signal
from types import FrameType

from prefixrl_mcore.policy.topology import any_rank

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Remembers the first stop signal; a second SIGINT stops at once."""

    def __init__(self) -> None:
        """Install the handlers of this process."""
        self._received: int | None = None
        for number in _SIGNALS:
            signal.signal(number, self._remember)

    @property
    def received(self) -> int | None:
        """Number of the signal that this rank got, or None."""
        return self._received

    def is_set(self) -> bool:
        """Return whether any rank was asked to stop; all ranks must call this."""
        return any_rank(self._received is not None)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        """Keep the signal for the end of the step."""
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        self._received = number
        logger.warning(
            "got %s: finishing this step, then saving and stopping", signal.Signals(number).name
        )
