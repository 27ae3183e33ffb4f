"""Control groups of the nodes, which clusters on one machine would share: their names are alike."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_SLURMD = "slurmd"


def can_use() -> bool:
    """Return whether slurmd can make control groups here."""
    memory = ROOT / "memory" if (ROOT / "memory").is_dir() else ROOT
    return os.access(memory, os.W_OK)


def check_unused(nodes: Sequence[str]) -> None:
    """Refuse a machine whose groups of these nodes another cluster uses.

    Groups without a process are what a dead cluster has left; they are nobody's.

    Raises:
        RuntimeError: naming the other cluster, or the processes.
    """
    for pid, node, configuration in _daemons():
        if node in nodes and _tracks_by_groups(configuration):
            raise RuntimeError(
                f"another cluster with control groups runs here: slurmd of {node}, process {pid}, "
                f"of {configuration or 'an unknown slurm.conf'}. Two of them kill each other's "
                "tasks: take that one down first, or say --no-cgroups"
            )
    tasks = tasks_of(nodes)
    if tasks:
        raise RuntimeError(
            "tasks of another cluster run in the control groups of nodes with these names: "
            f"processes {', '.join(map(str, tasks))}. Two clusters kill each other's tasks: end "
            "them first, or say --no-cgroups"
        )


def tasks_of(nodes: Sequence[str]) -> list[int]:
    """Return the ids of all processes in the groups of nodes."""
    found: set[int] = set()
    for top in _tops(nodes):
        for file in top.rglob("cgroup.procs"):
            with suppress(OSError):  # it is going
                found.update(map(int, file.read_text().split()))
    return sorted(found)


def remove(nodes: Sequence[str]) -> None:
    """Remove the groups that the slurmds of nodes leave behind; those in use stay."""
    for top in _tops(nodes):
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()


def _tops(nodes: Sequence[str]) -> Iterator[Path]:
    """Return the uppermost groups of nodes: of version 1 in each controller, or of version 2."""
    for node in nodes:
        names = (f"slurm_{node}", f"*/slurm_{node}", f"system.slice/{node}_slurmstepd.scope")
        for name in names:
            yield from ROOT.glob(name)


def _daemons() -> Iterator[tuple[int, str, Path | None]]:
    """Return process id, node and slurm.conf of every slurmd that was started for a named node."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            variables = (process / "environ").read_bytes().decode(errors="replace").split("\0")
        except (OSError, UnicodeDecodeError):  # it has ended, or is no Slurm
            continue
        if Path(words[0]).name == _SLURMD and "-N" in words[:-1]:
            set_to = [v.partition("=")[2] for v in variables if v.startswith("SLURM_CONF=")]
            node = words[words.index("-N") + 1]
            yield int(process.name), node, Path(set_to[-1]) if set_to else None


def _tracks_by_groups(configuration: Path | None) -> bool:
    """Return whether a cluster uses control groups; one whose settings are gone might."""
    if configuration is None or not configuration.exists():
        return True
    return "proctrack/cgroup" in configuration.read_text()
