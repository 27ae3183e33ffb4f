"""A file that is hashed while it is written, so that nobody has to read it again for that."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from prefixrl_mcore.checkpoint.manifest import SaveError

_MIN_BYTES_BESIDE = 1 << 16  # below that, handing a block to a thread costs more than hashing it


class HashedFile:
    """A new file, written from its beginning to its end; use as a context manager.

    A block is hashed in a thread beside its writing. Whatever goes wrong in writing a block, an
    interruption included, is kept and further blocks are dropped, because ``torch.save`` hides an
    error of its file behind one of its own; ``raise_kept`` and ``close_durably`` raise it.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int], object] | None = None) -> None:
        """Create the file.

        Args:
            path: its name; an existing file is overwritten.
            on_bytes: called with the size of each block that was written.

        Raises:
            SaveError: if it cannot be created.
        """
        self.path = path
        self.size_bytes = 0
        """Bytes written so far."""
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()
        self._error: BaseException | None = None
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise _refused(path, error) from error
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, block: bytes | memoryview) -> int:
        """Append a block and return its size."""
        content = memoryview(block).cast("B")
        if self._error is None:
            try:
                self._append(content)
            except BaseException as error:
                self._error = error
        return len(content)

    def raise_kept(self) -> None:
        """Raise what went wrong in an earlier block, if anything did.

        Raises:
            SaveError: if the storage refused it.
            BaseException: if something else stopped its writing.
        """
        if isinstance(self._error, OSError):
            raise _refused(self.path, self._error) from self._error
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Do nothing: blocks are not collected. ``torch.save`` wants this method."""

    def close_durably(self) -> str:
        """Let the file survive a power loss and return its hexadecimal SHA-256.

        Raises:
            SaveError: if the storage refused this or an earlier block.
            BaseException: if something else stopped the writing of an earlier block.
        """
        self.raise_kept()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _refused(self.path, error) from error
        return self._digest.hexdigest()

    def _append(self, content: memoryview) -> None:
        beside = len(content) >= _MIN_BYTES_BESIDE
        hashing = self._thread.submit(self._digest.update, content) if beside else None
        written = 0
        while written < len(content):
            written += self._file.write(content[written:])
        if hashing is None:
            self._digest.update(content)
        else:
            hashing.result()
        self.size_bytes += len(content)
        if self._on_bytes is not None:
            self._on_bytes(len(content))


def _refused(path: Path, error: OSError) -> SaveError:
    return SaveError(f"{path}: the storage refused: {error}; free space or mend it, and repeat")
