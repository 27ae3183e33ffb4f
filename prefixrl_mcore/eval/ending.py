"""How stages that are one process end at a signal: at once, as for Ctrl-C, with 128 + n."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from prefixrl_mcore.observability.signal_handlers import handled_by

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def exits_at_signals() -> Iterator[None]:
    """End what is done inside at SIGTERM (143) or SIGUSR1 (138), from the main thread only.

    Unlike a trainer, ``collect`` and ``eval`` have nothing to save then: what is to be kept is on
    disk already, and ``keep_seconds`` of results at most are lost. They take their servers with
    them. 138 is also what a shell says of a process that dies of SIGUSR1: before this is entered,
    or after a second signal, which kills. A site's ``requeue.exit_codes`` hold it, so that a Slurm
    job goes on after its time limit; 143 they do not: who was cancelled has been told to end.

    Raises:
        SystemExit: in the main thread, at a signal.
    """

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        raise SystemExit(128 + number)

    with handled_by(leave, _SIGNALS):
        yield
