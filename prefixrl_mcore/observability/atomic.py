"""Files and folders that are there completely or not at all, also after a SIGKILL or power loss."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path


def write_text_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file by a text; see ``write_bytes_atomic``."""
    write_bytes_atomic(path, text.encode(), durable=durable)


def write_json_atomic(path: Path, value: object, *, durable: bool = True) -> None:
    """Replace a file by ``value`` as indented JSON; see ``write_bytes_atomic``."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n", durable=durable)


def write_bytes_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace a file: temporary name, flush to disk, rename, flush of the folder.

    ``durable=False`` leaves out both flushes: for a state file that is written many times a
    minute and means nothing after a power loss.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        sync_to_disk(path.parent)


def write_folder_atomic(
    folder: Path, temporary: Path, files: Mapping[str, Callable[[Path], None]]
) -> None:
    """Write a folder of files under a temporary name, flush it to disk, and rename it.

    Args:
        folder: final name; must not exist.
        temporary: name to build it under, in the same parent; must not exist.
        files: file name -> function that writes the file to the given path.

    Raises:
        FileExistsError: if ``folder`` came into being in the meantime.
    """
    temporary.mkdir()
    for name, write in files.items():
        path = temporary / name
        write(path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_to_disk(temporary)
    try:
        temporary.rename(folder)
    except FileNotFoundError:
        raise
    except OSError as error:  # ENOTEMPTY or EEXIST, depending on the file system
        raise FileExistsError(f"{folder}: exists already") from error
    sync_to_disk(folder.parent)


def sync_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
