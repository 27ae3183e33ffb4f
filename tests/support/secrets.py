"""Looking for secrets where every user of a machine can see them: in command lines."""

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_PAUSE_SECONDS = 0.02


class ProcessWatch:
    """Looks at all processes, again and again, until it is left."""

    def __init__(self, secrets: Sequence[str], *, holder: str) -> None:
        """Look for secrets in command lines, and for processes ``holder`` that were given all."""
        self._secrets = [secret.encode() for secret in secrets]
        self._holder = holder.encode()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.leaks: set[str] = set()
        """Command lines with a secret."""

        self.num_looks = 0
        """Times that all processes were looked at."""

        self.has_reached = False
        """Whether the environment of a holder has had all secrets."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(_PAUSE_SECONDS):
            for process in Path("/proc").glob("[0-9]*"):
                self._look_at(process)
            self.num_looks += 1

    def _look_at(self, process: Path) -> None:
        try:
            command = (process / "cmdline").read_bytes()
            is_holder = self._holder in command
            environment = (process / "environ").read_bytes() if is_holder else b""
        except OSError:  # it has ended
            return
        if any(secret in command for secret in self._secrets):
            self.leaks.add(command.replace(b"\0", b" ").decode(errors="replace"))
        if is_holder and all(secret in environment for secret in self._secrets):
            self.has_reached = True
