"""Writing small files so that a reader or a kill never sees half of one."""

import json
import os
from pathlib import Path


def write_text_atomic(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace ``path`` by ``text``: temporary name, fsync, rename, fsync of the folder.

    ``durable=False`` leaves out both fsyncs: for a state file that is written many times a
    minute and means nothing after a power loss.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json_atomic(path: Path, value: object, *, durable: bool = True) -> None:
    """Replace ``path`` by ``value`` as indented JSON."""
    write_text_atomic(path, json.dumps(value, indent=2) + "\n", durable=durable)
