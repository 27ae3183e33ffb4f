"""How much memory of its own this process held at most."""

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_PERIOD_SECONDS = 0.02


class MemoryWatch:
    """Looks at the process's anonymous memory while a block runs; use as a context manager.

    Anonymous memory is what the process allocated. Pages of mapped files are left out: the
    operating system takes them back when it needs room.
    """

    def __init__(self) -> None:
        """Note what is held before the block."""
        self.start_bytes = anonymous_bytes()
        """Held before the block: the interpreter and its libraries."""
        self.peak_bytes = self.start_bytes
        """Most that was held."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_PERIOD_SECONDS):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return the anonymous memory that this process holds, as Linux counts it."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no RssAnon; expected a Linux kernel of 4.5 or later")
