"""``prefixrl checkpoint ls | show | verify``: what is on disk, and whether it can be trusted."""

import json
import time
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.inventory import (
    CheckpointEntry,
    describe,
    find_checkpoints,
    leftovers,
)
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.run_checkpoints import show_layout
from prefixrl_mcore.observability.progress import byte_progress

_AGES = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def list_checkpoints(path: Path) -> None:
    """Print one line per checkpoint, the oldest step first.

    Args:
        path: a run folder, a folder of checkpoints, or one checkpoint.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    console = Console()
    found = find_checkpoints(path)
    table = Table(title=escape(f"checkpoints of {path}"))
    for name in ("checkpoint", "step", "policy version", "size", "layout", "age"):
        table.add_column(name, justify="left" if name in ("checkpoint", "layout") else "right")
    table.add_column("complete", overflow="fold")
    for checkpoint in found:
        table.add_row(*_row(describe(checkpoint)))
    console.print(table)
    unfinished = leftovers(found[0])
    if unfinished:
        console.print(
            f"{len(unfinished)} folders of a running or dead save; the next start of the run "
            "removes dead ones",
            highlight=False,
        )


def show_checkpoint(path: Path) -> None:
    """Print all that a checkpoint says of itself; of several, of the one to go on from.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    entries = [describe(checkpoint) for checkpoint in find_checkpoints(path)]
    entry = next((entry for entry in entries if entry.is_latest), entries[-1])
    table = Table(title=escape(str(entry.path)), show_header=False)
    for name, value in _details(entry).items():
        table.add_row(name, Text(value))
    Console().print(table)


def verify_checkpoints(path: Path) -> bool:
    """Compare every file with its checksum, with progress; return whether all are right.

    Raises:
        CheckpointError: if there is no checkpoint.
    """
    console = Console()
    are_right = True
    for checkpoint in find_checkpoints(path):
        try:
            _verify(checkpoint)
        except CheckpointError as error:
            are_right = False
            console.print(Text.assemble(("damaged ", "bold red"), f"{checkpoint}: {error}"))
        else:
            console.print(Text.assemble(("right ", "bold green"), str(checkpoint)))
    return are_right


def _verify(checkpoint: Path) -> None:
    """Check one checkpoint; progress counts the bytes that its manifest lists."""
    listed = manifest.read_manifest(checkpoint)
    with byte_progress(Console(stderr=True)) as progress:
        total = sum(entry.size_bytes for entry in listed.files.values())
        task = progress.add_task(checkpoint.name, total=total)
        manifest.verify(checkpoint, on_bytes=lambda number: progress.advance(task, number))


def _row(entry: CheckpointEntry) -> list[Text]:
    """Return the cells of one line of ``ls``."""
    state = entry.state
    name = entry.path.name + (" (latest)" if entry.is_latest else "")
    complete = Text("yes", style="green")
    if entry.problem is not None:
        complete = Text(f"no: {_relative(entry)}", style="red")
    return [
        Text(name),
        Text("?" if state is None else str(state.step)),
        Text("?" if state is None else str(state.policy_version)),
        Text(decimal(entry.size_bytes)),
        Text(_layout(entry)),
        Text(_age(entry)),
        complete,
    ]


def _details(entry: CheckpointEntry) -> dict[str, str]:
    """Return the lines of ``show``."""
    values = {
        "complete": "yes" if entry.problem is None else f"no: {entry.problem}",
        "latest": "yes" if entry.is_latest else "no",
        "size": f"{decimal(entry.size_bytes)} ({entry.size_bytes} bytes)",
        "age": _age(entry),
    }
    state = entry.state
    if state is None:
        return values
    return values | {
        "step": str(state.step),
        "policy version": str(state.policy_version),
        "optimizer": "yes" if state.has_optimizer else "no, weights only",
        "layout": f"{_layout(entry)}, {state.world_size} ranks",
        "metrics": json.dumps(state.metrics, indent=2),
        "trainer state": json.dumps(state.extra_state, indent=2),
    }


def _relative(entry: CheckpointEntry) -> str:
    """Return the problem without the path of the checkpoint, which the line names already."""
    assert entry.problem is not None, "asked of an incomplete checkpoint"
    return entry.problem.replace(f"{entry.path}/", "")


def _layout(entry: CheckpointEntry) -> str:
    """Return for example ``tp2 pp2 dp1``."""
    if entry.state is None or not entry.state.layout:
        return "?" if entry.state is None or entry.state.world_size else "none"
    return show_layout(entry.state.layout)


def _age(entry: CheckpointEntry) -> str:
    """Return the time since the checkpoint was sealed, in its largest unit."""
    if entry.created_unix_seconds is None:
        return "?"
    seconds = max(0.0, time.time() - entry.created_unix_seconds)
    unit, length = next(((u, n) for u, n in _AGES if seconds >= n), _AGES[-1])
    return f"{seconds / length:.0f} {unit}"
