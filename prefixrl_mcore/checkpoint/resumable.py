"""A folder of large files whose writing can be killed and taken up again.

The folder is written under the name ``.<final name>.converting``. A file counts as finished when
it is durable and the journal beside that folder lists its checksum; after a kill the finished
files are compared with it and kept, everything else is removed. The folder gets its final name
when it is complete, so that an unfinished one is never taken for a result.
"""

import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.manifest import CheckpointError, SaveError, StorageReadError
from prefixrl_mcore.observability.atomic import write_json_atomic

logger = logging.getLogger(__name__)

_MAX_LOCKS = 10
"""Tries to lock a folder that others remove in between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedFile:
    """A file that is complete and durable."""

    size_bytes: int
    """Its length."""

    sha256: str
    """Hexadecimal digest of its content."""

    notes: Any
    """What the writer wants to know of the file when it goes on after a kill; JSON."""


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError if ``out`` is a file, a mount point, holds something or is no name."""
    try:
        is_mount_point = _is_mount_point(out)
        is_taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    except OSError as error:
        raise _unusable(out, error) from None
    if is_mount_point:
        raise CheckpointError(
            f"{out}: is a mount point, which no finished folder can be renamed to; name a folder "
            "below it"
        )
    if is_taken:
        raise CheckpointError(
            f"{out}: exists, expected a new or empty folder; remove it or name another one"
        )


def _unusable(out: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{out}: cannot be written, got {error}; name a folder that can be created"
    )


def _is_mount_point(folder: Path) -> bool:
    """Return whether a folder is one, also if what is mounted is of the same file system."""
    if os.path.ismount(folder):
        return True
    return folder.is_dir() and _mount_id(folder) != _mount_id(folder.resolve().parent)


def _mount_id(folder: Path) -> str | None:
    """Return which mount a folder is in; None where the system does not tell (Linux does)."""
    descriptor = os.open(folder, os.O_PATH)  # works on a folder that may be entered but not read
    try:
        facts = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return next((fact for fact in facts if fact.startswith("mnt_id:")), None)


class ResumableFolder:
    """The folder while it is written; use as a context manager, and ``seal`` it at the end."""

    def __init__(
        self,
        final: Path,
        task: Mapping[str, Any],
        on_kept: Callable[[int], object] | None = None,
    ) -> None:
        """Name the folder; nothing is touched before the block begins.

        Args:
            final: its final name.
            task: what decides its content, JSON: the files of another task are not kept.
            on_kept: called with the size of each file that a killed writer had finished.
        """
        final = final.resolve()  # links are followed, and "." gets a name
        self.path = final.with_name(f".{final.name}.converting")
        """Where the files are written."""
        self._journal = final.with_name(_journal_name(final))
        self.finished: dict[str, FinishedFile] = {}
        """By path relative to the folder, with forward slashes."""
        self._final = final
        self._task = hashlib.sha256(json.dumps(dict(task), sort_keys=True).encode()).hexdigest()
        self._on_kept = on_kept
        self._lock: int | None = None

    def __enter__(self) -> "ResumableFolder":
        """Make the folder, or take up the one that a killed writer left.

        Raises:
            CheckpointError: if it cannot be made, another process is writing it, or the final name
                holds something.
        """
        try:
            self._make_and_lock()
            self._refuse_result()
            self._take_up()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Keep finished files for the next try, unless the input is what is wrong."""
        is_input_wrong = isinstance(error, CheckpointError) and not isinstance(
            error, StorageReadError
        )
        if is_input_wrong or not self.finished:
            shutil.rmtree(self.path, ignore_errors=True)
            self._journal.unlink(missing_ok=True)
        elif error is not None:
            logger.warning(
                "%s: %d finished files are kept there; the same command goes on from them",
                self.path,
                len(self.finished),
            )
        self._unlock()

    def is_sealed(self) -> bool:
        """Return whether a writer of this task died when all was done but its last journal.

        The journal is removed then.
        """
        journal = self._read_journal()
        if self.path.exists() or journal is None or not journal["is_sealing"]:
            return False
        files = {name: FinishedFile(**entry) for name, entry in journal["files"].items()}
        if journal["task"] != self._task or not all(
            _is_right(self._final / name, file) for name, file in files.items()
        ):
            return False
        self._journal.unlink()
        self._report_kept(files)
        logger.info("%s: was finished by a killed conversion, checksums right", self._final)
        return True

    def finish(self, name: str, *, size_bytes: int, sha256: str, notes: Any = None) -> None:  # noqa: ANN401  (JSON)
        """Take note of a file that is complete and durable."""
        self.finished[name] = FinishedFile(size_bytes=size_bytes, sha256=sha256, notes=notes)
        self._write_journal()

    def seal(self, *, with_manifest: bool) -> None:
        """Make the folder durable and give it its final name, in place of nothing or an empty one.

        Raises:
            SaveError: if the storage refuses, or the final name holds something by now, which is
                left as it is.
        """
        known = {
            name: manifest.ManifestEntry(size_bytes=file.size_bytes, sha256=file.sha256)
            for name, file in self.finished.items()
        }
        self._write_journal(is_sealing=True)
        try:
            manifest.seal_folder(
                self.path,
                self._final,
                with_manifest=with_manifest,
                known=known,
                may_replace=False,
            )
            self._journal.unlink(missing_ok=True)
        except FileExistsError:
            raise SaveError(
                f"{self._final}: came to hold something during the conversion; move it away and "
                "repeat the command, finished files are kept"
            ) from None
        except OSError as error:
            raise SaveError(f"{self._final}: the storage refused: {error}") from error

    def _make_and_lock(self) -> None:
        """Make the folder and lock it.

        Another process may finish or remove it between opening and locking; a lock of what has
        lost the name would keep nobody out.
        """
        for _ in range(_MAX_LOCKS):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = os.open(self.path, os.O_RDONLY)
            except OSError as error:
                raise _unusable(self._final, error) from None
            self._take_lock(self._lock)
            if _is_at(self._lock, self.path):
                return
            self._unlock()
        raise CheckpointError(
            f"{self._final}: other processes removed {self.path} {_MAX_LOCKS} times while it was "
            "locked; let only one process write"
        )

    def _take_lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self._final}: is being written by another process; wait for it or stop it"
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                "%s: cannot be locked (%s); let only one process write", self.path, error
            )

    def _refuse_result(self) -> None:
        """Refuse a final name that another process has filled before the lock was taken."""
        try:
            refuse_existing(self._final)
        except CheckpointError:
            with suppress(OSError):
                self.path.rmdir()  # unless a killed conversion left something there
            raise

    def _take_up(self) -> None:
        """Keep the finished files of the same task; remove everything else."""
        for path in self._journal.parent.glob(f".{glob.escape(self._journal.name)}.tmp-*"):
            path.unlink()
        journal = self._read_journal()
        if journal is not None and journal["task"] == self._task:
            for name, entry in journal["files"].items():
                self._keep(name, FinishedFile(**entry))
        elif any(self.path.iterdir()):
            logger.warning(
                "%s: begins anew, what lies there was of other input or settings, or unfinished",
                self.path,
            )
        self._remove_unfinished()
        self._write_journal()
        self._report_kept(self.finished)
        if self.finished:
            logger.info(
                "%s: kept %d finished files of a killed conversion, %d bytes, checksums right",
                self.path,
                len(self.finished),
                sum(file.size_bytes for file in self.finished.values()),
            )

    def _report_kept(self, files: Mapping[str, FinishedFile]) -> None:
        if self._on_kept is not None:
            for file in files.values():
                self._on_kept(file.size_bytes)

    def _keep(self, name: str, file: FinishedFile) -> None:
        if _is_right(self.path / name, file):
            self.finished[name] = file
        else:
            logger.warning("%s: changed since it was finished, is written again", self.path / name)

    def _remove_unfinished(self) -> None:
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_file() and path.relative_to(self.path).as_posix() not in self.finished:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _read_journal(self) -> dict[str, Any] | None:
        """Return the journal; None if there is none that can be read."""
        try:
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            for entry in journal["files"].values():
                FinishedFile(**entry)
            return {**journal, "task": journal["task"], "is_sealing": journal["is_sealing"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _write_journal(self, *, is_sealing: bool = False) -> None:
        files = {name: asdict(file) for name, file in self.finished.items()}
        try:
            write_json_atomic(
                self._journal, {"task": self._task, "is_sealing": is_sealing, "files": files}
            )
        except OSError as error:
            raise SaveError(f"{self._journal}: the storage refused: {error}") from error

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether what is open under ``descriptor`` still has the name ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_right(path: Path, file: FinishedFile) -> bool:
    """Return whether a file is what the journal says of it."""
    return (
        path.is_file()
        and path.stat().st_size == file.size_bytes
        and manifest.hash_file(path) == file.sha256
    )


def refuse_unless_sealing(out: Path) -> None:
    """As ``refuse_existing``, but leave a result to ``is_sealed`` whose journal is still there."""
    final = out.resolve()
    try:
        has_journal = final.with_name(_journal_name(final)).is_file()
    except OSError as error:  # the name is too long, or a folder on the way may not be entered
        raise _unusable(final, error) from None
    if not has_journal:
        refuse_existing(final)


def _journal_name(final: Path) -> str:
    return f".{final.name}.converting.json"
