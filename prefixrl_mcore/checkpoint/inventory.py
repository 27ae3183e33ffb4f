"""What lies in a folder of checkpoints, complete or not; reads only, and needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.run_checkpoints import (
    RUN_CHECKPOINTS,
    TrainerState,
    checkpoints_in,
    latest_checkpoint,
    read_trainer_state,
    step_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointEntry:
    """One checkpoint, as far as it can be read."""

    path: Path
    """Its folder."""

    problem: str | None
    """Why the loader would refuse it; None for a complete one (contents are not compared)."""

    size_bytes: int
    """Bytes of all files that are there."""

    created_unix_seconds: float | None
    """When it was sealed; None without a readable manifest."""

    state: TrainerState | None
    """Content of ``trainer.json``; None if it cannot be read."""

    is_latest: bool
    """A resumed run would go on from this one."""


def find_checkpoints(path: Path) -> list[Path]:
    """Return the checkpoints that ``path`` stands for, by step.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run folder.

    Raises:
        CheckpointError: if there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run, its checkpoints or one")
    if (path / manifest.MANIFEST_NAME).exists() or step_of(path) is not None:
        return [path]
    steps = {path: step_of(path) for path in checkpoints_in(path).iterdir()}
    found = sorted((step, path) for path, step in steps.items() if step is not None)
    if not found:
        raise CheckpointError(
            f"{path}: holds no checkpoint, expected step-<number> folders here or in "
            f"{RUN_CHECKPOINTS}/; check the path"
        )
    return [path for _, path in found]


def describe(checkpoint: Path) -> CheckpointEntry:
    """Return what can be said of a checkpoint without reading its tensors."""
    problem = created = state = None
    try:
        state = read_trainer_state(checkpoint)
    except CheckpointError as error:
        problem = str(error)
    try:
        created = manifest.read_manifest(checkpoint).created_unix_seconds
        manifest.verify(checkpoint, checksums=False)
    except CheckpointError as error:
        problem = str(error)  # says more than a missing trainer.json
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return CheckpointEntry(
        path=checkpoint,
        problem=problem,
        size_bytes=sum(path.stat().st_size for path in files),
        created_unix_seconds=created,
        state=state,
        is_latest=step_of(checkpoint) is not None
        and latest_checkpoint(checkpoint.parent) == checkpoint,
    )


def leftovers(checkpoint: Path) -> list[Path]:
    """Return the folders of dead or running saves beside a checkpoint."""
    return manifest.list_temporaries(checkpoint.parent)
