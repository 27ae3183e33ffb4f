"""Waiting for facts instead of seconds, in threads that no failed assertion leaves behind."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

_POLL_SECONDS = 0.01


def wait_until(
    is_so: Callable[[], object], *, seconds: float = 60.0, poll_seconds: float = _POLL_SECONDS
) -> None:
    """Return as soon as it is so; fail if it is not after so many seconds."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {seconds:g} s"
        time.sleep(poll_seconds)


def is_inside(function: str) -> bool:
    """Return whether any thread of this process is in a function of that name."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_name == function:
                return True
            frame = frame.f_back
    return False


@contextmanager
def beside(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Do ``work`` in a thread beside the block.

    It is given an event that is set when the block ends, whether well or not, and has to look at
    it wherever it waits: the block's end waits for it.
    """
    is_over = threading.Event()
    thread = threading.Thread(target=work, args=(is_over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(60)


def once(
    is_so: Callable[[], object], then: Callable[[], object], *, seconds: float = 60.0
) -> AbstractContextManager[None]:
    """Call ``then`` beside the block as soon as it is so.

    It is called after so many seconds, too, for the block may wait for it; not after the block.
    """

    def wait(is_over: threading.Event) -> None:
        deadline = time.monotonic() + seconds
        while not is_so() and time.monotonic() < deadline:
            if is_over.wait(_POLL_SECONDS):
                return
        then()

    return beside(wait)
