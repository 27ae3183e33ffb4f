"""Folders that appear complete or not at all, and can be checked later.

A folder is written under a temporary sibling name. Sealing it makes every file durable, lists
all files with sizes and SHA-256 checksums in ``manifest.json`` (written last), renames the
folder to its final name and makes that rename durable. A process killed at any moment leaves
either the old state or the new one, plus a temporary folder that the next writer removes.

Names: ``.<final name>.writing-<id>`` is being written, ``.<final name>.replaced-<id>`` is a
complete folder on its way out, ``.<final name>.deleting-<id>`` is being removed. Only the second
kind is ever read again: when a kill fell between the two renames of a replacement.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from prefixrl_mcore.observability.atomic import sync_to_disk

MANIFEST_NAME = "manifest.json"
_FORMAT_VERSION = 1
_READ_BYTES = 1 << 20
_MAX_HASH_THREADS = 8  # beyond that, storage is the limit
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.(?P<kind>writing|replaced|deleting)-[0-9a-f]{32}$")


class CheckpointError(ValueError):
    """A checkpoint or model folder that cannot be used; says which file, got, expected, remedy."""


class StorageReadError(CheckpointError):
    """The storage did not give a file back; it may be whole, and another try may succeed."""


class SaveError(OSError):
    """The storage refused a save; what was there before is as it was, and a retry may succeed."""


class ReadBackError(RuntimeError):
    """What was read back is not what was saved; what was there before is as it was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestEntry:
    """One file of a sealed folder."""

    size_bytes: int
    """Length of the file."""

    sha256: str
    """Hexadecimal digest of its content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a sealed folder holds."""

    files: dict[str, ManifestEntry]
    """By path relative to the folder, with forward slashes; ``manifest.json`` is not listed."""

    created_unix_seconds: float
    """When the folder was sealed."""


def begin_folder(final: Path) -> Path:
    """Return a new, empty temporary sibling of ``final``; stale ones of that name are removed."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise CheckpointError(
            f"{final}: cannot be written, got {error}; name a folder that can be created"
        ) from None
    clean_temporaries(final.parent, name=final.name)
    temporary = _temporary_path(final, "writing")
    temporary.mkdir()
    return temporary


def seal_folder(
    temporary: Path,
    final: Path,
    *,
    with_manifest: bool = True,
    known: Mapping[str, ManifestEntry] | None = None,
    not_before: float = 0.0,
    may_replace: bool = True,
) -> None:
    """Make ``temporary`` durable, write its manifest, and rename it to ``final``.

    A folder that already has the name ``final`` is replaced; see ``clean_temporaries`` for a
    kill between the two renames that this takes.

    Args:
        temporary: folder that ``begin_folder`` made.
        final: its final name.
        with_manifest: list the files with sizes and checksums.
        known: size and digest of what was written to files that were hashed on the way, by path
            relative to the folder; the others are hashed here.
        not_before: unix seconds; the folder counts as sealed then if the clock is behind it.
        may_replace: False refuses a ``final`` that is no empty folder, and leaves it as it is.

    Raises:
        FileExistsError: if ``final`` may not be replaced.
        OSError: if the storage refuses, or a file has another size than what was written to it.
    """
    _sync_tree(temporary)
    if with_manifest:
        _write_manifest(temporary, known or {}, max(time.time(), not_before))
    replaced = None
    if may_replace and final.exists():
        replaced = _temporary_path(final, "replaced")
        final.rename(replaced)
    _rename_to_free_name(temporary, final)
    sync_to_disk(final.parent)
    if replaced is not None:
        _remove_tree(replaced, final)


def remove_folder(folder: Path) -> None:
    """Delete ``folder`` so that a kill half-way leaves nothing that looks complete."""
    _remove_tree(folder, folder)


def clean_temporaries(parent: Path, *, name: str | None = None) -> tuple[int, int]:
    """Undo what killed writers left in ``parent``; only one writer may use ``parent`` at a time.

    Half-written and half-deleted folders are removed. A replaced folder gets its name back when
    the new one never arrived, and is removed otherwise.

    Args:
        parent: folder to clean; nothing happens if it does not exist.
        name: only temporaries of this final name; None cleans those of every name.

    Returns:
        Folders removed, and folders that got their name back.
    """
    num_removed = num_restored = 0
    if not parent.is_dir():
        return num_removed, num_restored
    for path in sorted(parent.iterdir()):
        match = _TEMPORARY.match(path.name)
        if match is None or name not in (None, match["name"]) or not path.is_dir():
            continue
        final = parent / match["name"]
        if match["kind"] == "replaced" and not final.exists():
            path.rename(final)
            sync_to_disk(parent)
            num_restored += 1
        else:
            _remove_tree(path, final)
            num_removed += 1
    return num_removed, num_restored


def list_temporaries(parent: Path) -> list[Path]:
    """Return what ``clean_temporaries`` would look at, without touching it."""
    return sorted(p for p in parent.iterdir() if p.is_dir() and _TEMPORARY.match(p.name))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of ``folder`` without looking at the files that it lists.

    Raises:
        CheckpointError: if the folder or its manifest is missing, or the manifest is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: does not exist or is not a folder; check the path")
    path = folder / MANIFEST_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format_version"] != _FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: got format_version {value['format_version']!r}, expected "
                f"{_FORMAT_VERSION}; read it with the version of this program that wrote it"
            )
        return Manifest(
            files={name: ManifestEntry(**entry) for name, entry in value["files"].items()},
            created_unix_seconds=float(value["created_unix_seconds"]),
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: is missing, so {folder} is incomplete or no checkpoint; use another one"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: is damaged ({type(error).__name__}: {error}), expected the JSON that was "
            "written with the folder; use another checkpoint"
        ) from None


def verify(
    folder: Path, *, checksums: bool = True, on_bytes: Callable[[int], object] | None = None
) -> Manifest:
    """Check every file of a sealed folder and return the manifest.

    Files that the manifest does not list are left alone: nothing reads them.

    Args:
        folder: a sealed folder.
        checksums: compare contents too; False compares only names and sizes, which finds
            missing and truncated files at the price of one ``stat`` each.
        on_bytes: called with the size of each block that was hashed, from several threads.

    Raises:
        CheckpointError: naming the first bad file, what it has and what it should have.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_size(folder / name, entry)
    if checksums:
        verify_contents(folder, manifest.files, on_bytes=on_bytes)
    return manifest


def verify_contents(
    folder: Path,
    files: Mapping[str, ManifestEntry],
    *,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Compare files with their checksums.

    Args:
        folder: a sealed folder.
        files: some or all entries of its manifest.
        on_bytes: called with the size of each block that was hashed, from several threads.

    Raises:
        CheckpointError: naming the first bad file, what it has and what it should have.
    """
    paths = [folder / name for name in files]
    for path, entry, digest in zip(
        paths, files.values(), _hash_files(paths, on_bytes), strict=True
    ):
        if digest != entry.sha256:
            raise CheckpointError(
                f"{path}: content is damaged, got sha256 {digest}, expected {entry.sha256}; "
                "use another checkpoint or restore the file"
            )


def _check_size(path: Path, entry: ManifestEntry) -> None:
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: is missing, expected {entry.size_bytes} bytes; use another checkpoint or "
            "restore the file"
        ) from None
    if size_bytes != entry.size_bytes:
        raise CheckpointError(
            f"{path}: got {size_bytes} bytes, expected {entry.size_bytes}; use another "
            "checkpoint or restore the file"
        )


def _write_manifest(folder: Path, known: Mapping[str, ManifestEntry], now: float) -> None:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    absent = sorted(known.keys() - set(names))
    if absent:
        raise FileNotFoundError(f"{folder}: {absent} were written but are not there any more")
    for name, entry in known.items():
        size_bytes = (folder / name).stat().st_size
        if size_bytes != entry.size_bytes:
            raise OSError(
                f"{folder / name}: got {size_bytes} bytes, expected the {entry.size_bytes} that "
                "were written; look at the storage"
            )
    unknown = [name for name in names if name not in known]
    hashed = zip(unknown, _hash_files([folder / name for name in unknown]), strict=True)
    entries = dict(known)
    for name, digest in hashed:
        size_bytes = (folder / name).stat().st_size
        entries[name] = ManifestEntry(size_bytes=size_bytes, sha256=digest)
    value = {
        "format_version": _FORMAT_VERSION,
        "created_unix_seconds": now,
        "files": {name: asdict(entries[name]) for name in names},
    }
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_to_disk(folder)


def _hash_files(paths: list[Path], on_bytes: Callable[[int], object] | None = None) -> list[str]:
    num_threads = min(_MAX_HASH_THREADS, os.cpu_count() or 1, max(len(paths), 1))
    with ThreadPoolExecutor(num_threads) as threads:  # hashlib releases the GIL
        return list(threads.map(lambda path: hash_file(path, on_bytes), paths))


def hash_file(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Return the hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def _temporary_path(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{uuid.uuid4().hex}")


def _rename_to_free_name(folder: Path, final: Path) -> None:
    """Rename a folder; the system does it in place of nothing and of empty folders only."""
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(f"{final}: exists and is no empty folder") from error
        raise


def _remove_tree(folder: Path, final: Path) -> None:
    """Rename ``folder`` to a name that nothing reads, then delete it."""
    doomed = _temporary_path(final, "deleting")
    folder.rename(doomed)
    sync_to_disk(doomed.parent)
    shutil.rmtree(doomed)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync_to_disk(path)
    sync_to_disk(folder)
