"""Signal handlers of this process, which a run in it must not leave changed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def restored_stop_signals() -> Iterator[None]:
    """Put back the handlers of the stop signals: pytest itself must go on to be stopped by them."""
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
