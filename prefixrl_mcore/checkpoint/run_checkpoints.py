"""The folder of a run's checkpoints: names, which one is the latest, which may go.

A checkpoint is one folder, complete or absent (``manifest.py``)::

    RUN/checkpoints/step-000040/
        megatron/       weights, optimizer, schedule, random states: torch_dist format, in global
                        tensors, so that another parallel layout can load it
        trainer.json    step, policy version, and whatever the trainer wants to remember
        hf/             config.json, tokenizer and template files of the initial model, as bytes
        manifest.json   sizes and checksums of all of the above
    RUN/checkpoints/latest      name of the checkpoint to go on from

``latest`` is written after the checkpoint that it names. A kill between the two leaves a pointer
that is older than the newest checkpoint; such a pointer is overruled, and repaired by the next
start. A pointer written later than the newest checkpoint (by somebody who wants to go back) holds.

Nothing here needs torch or Megatron.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.manifest import CheckpointError, ManifestEntry
from prefixrl_mcore.checkpoint.retention import Candidate, Retention, deletable
from prefixrl_mcore.observability.atomic import write_text_atomic

logger = logging.getLogger(__name__)

MEGATRON_FOLDER = "megatron"
HF_FOLDER = "hf"
TRAINER_NAME = "trainer.json"
LATEST_NAME = "latest"
RUN_CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints inside a run folder."""

_FORMAT_VERSION = 1
_TIME_STEP_SECONDS = 1e-3  # beyond the resolution of a float of unix seconds
_STEP_FOLDER = re.compile(r"^step-(\d{6,})$")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Content of ``trainer.json``."""

    step: int
    """Step of the trainer when it saved."""

    policy_version: int
    """Optimizer steps applied to the weights."""

    has_optimizer: bool
    """False for a checkpoint made of a Hugging Face folder, which holds weights only."""

    world_size: int
    """Trainer ranks that saved; random states belong to them one by one."""

    extra_state: dict[str, Any]
    """Whatever the trainer wants to remember."""

    layout: dict[str, int] = field(default_factory=dict)
    """Parallel sizes by short name (``tp``, ``pp``, ``dp``, ...); empty if no ranks saved it.
    Names that an earlier version did not record are absent."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Evaluation of these weights, for ``Retention.keep_best``; empty if there was none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanedUp:
    """What ``clean_up`` found of dead saves."""

    num_removed: int
    """Half-written, half-deleted or replaced folders and files that were removed."""

    num_restored: int
    """Checkpoints that got their name back after a replacement that was killed half-way."""

    repaired_pointer: bool
    """``latest`` named an older checkpoint than the newest complete one, or none."""


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of ``step``."""
    if step < 0:
        raise ValueError(f"checkpoint step must be at least 0, got {step}")
    return folder / f"step-{step:06d}"


def checkpoints_in(folder: Path) -> Path:
    """Return where the checkpoints of a run folder lie; another folder is returned as it is."""
    inside = folder / RUN_CHECKPOINTS
    return inside if inside.is_dir() else folder


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder is a Hugging Face model; a run folder has a ``config.json``, too."""
    return (folder / "config.json").is_file() and not (folder / RUN_CHECKPOINTS).is_dir()


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, oldest first by time of writing."""
    if not folder.is_dir():
        return []
    times = {
        path: _creation_time(path) for path in folder.iterdir() if _STEP_FOLDER.match(path.name)
    }
    complete = [(time, path) for path, time in times.items() if time is not None]
    return [path for _, path in sorted(complete)]


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to go on from: the one that ``latest`` names, or the newest.

    The pointer holds if what it names is complete and it was not written before the newest
    complete checkpoint was. Complete means that the manifest is there and every file has its
    size. None if there is no complete checkpoint. Only reads, so that it can be called beside a
    running trainer; the process that owns the folder calls ``clean_up`` first.
    """
    complete = complete_checkpoints(folder)
    if not complete:
        return None
    newest = complete[-1]
    pointer = folder / LATEST_NAME
    if not pointer.is_file():
        return newest
    named = folder / pointer.read_text(encoding="utf-8").strip()
    if named == newest:
        return named
    if named not in complete:
        logger.warning("%s names %s, which is not complete; taking %s", pointer, named, newest)
        return newest
    # Both times are of the folder's file system, so that no other clock matters.
    if pointer.stat().st_mtime_ns <= (newest / manifest.MANIFEST_NAME).stat().st_mtime_ns:
        logger.warning(
            "%s names %s, but %s was completed after it was written (a save was killed); taking "
            "the newer one",
            pointer,
            named.name,
            newest.name,
        )
        return newest
    return named


def clean_up(folder: Path) -> CleanedUp:
    """Remove or undo what killed saves left, repair ``latest``, and say what was found.

    Only the trainer that writes to the folder may call this, on one rank, with no save under way.
    """
    num_removed, num_restored = manifest.clean_temporaries(folder)
    for path in folder.glob(f".{LATEST_NAME}.tmp-*"):
        path.unlink()
        num_removed += 1
    pointer, latest = folder / LATEST_NAME, latest_checkpoint(folder)
    named = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
    is_wrong = latest is not None and named != latest.name
    if latest is not None and is_wrong:
        is_wrong = _write_pointer(latest)
    found = CleanedUp(num_removed=num_removed, num_restored=num_restored, repaired_pointer=is_wrong)
    if num_removed or num_restored or is_wrong:
        logger.warning(
            "%s: removed %d leftovers of dead saves, restored %d checkpoints, latest %s",
            folder,
            num_removed,
            num_restored,
            "repaired" if is_wrong else "was right",
        )
    return found


def resolve_checkpoint(folder: Path) -> Path:
    """Return ``folder`` if it is a checkpoint, else the latest complete one inside it.

    Args:
        folder: a checkpoint, a folder of checkpoints, or a run folder.

    Raises:
        CheckpointError: if there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder; check the path")
    if (folder / manifest.MANIFEST_NAME).exists() or _STEP_FOLDER.match(folder.name):
        return folder
    latest = latest_checkpoint(checkpoints_in(folder))
    if latest is None:
        raise CheckpointError(
            f"{folder}: holds no complete checkpoint, expected step-<number> folders with a "
            f"{manifest.MANIFEST_NAME}, here or in {RUN_CHECKPOINTS}/; check the path, or start "
            "from the initial model"
        )
    return latest


def publish(
    temporary: Path,
    final: Path,
    retention: Retention,
    *,
    known: Mapping[str, ManifestEntry] | None = None,
    abandoned: frozenset[str] = frozenset(),
) -> bool:
    """Seal a checkpoint, let ``latest`` name it, and delete what no rule of ``retention`` keeps.

    A checkpoint counts from its rename on, and is found without the pointer: what fails after the
    rename is logged. The time of sealing is later than that of every checkpoint in the folder, so
    that a clock that is behind (another machine after a resume) does not make it an old one.

    Args:
        temporary: the written folder.
        final: its name.
        retention: which older checkpoints are kept; neither the new one nor an incomplete one is
            ever deleted.
        known: size and SHA-256 of files that are hashed already, by path relative to the folder.
        abandoned: names of checkpoints that the run has gone back behind.

    Returns:
        Whether the storage refused nothing.

    Raises:
        OSError: if the checkpoint did not come to be.
    """
    is_clean = True
    not_before = _newest_time(final.parent) + _TIME_STEP_SECONDS
    try:
        manifest.seal_folder(temporary, final, known=known, not_before=not_before)
    except OSError as error:
        sealed = _creation_time(final)
        if sealed is None or sealed < not_before:  # not this one
            raise
        is_clean = False
        logger.error("%s is saved, but may not outlive a loss of power: %s", final, error)
    is_clean &= _write_pointer(final)
    try:
        apply_retention(
            final.parent, retention, protected=frozenset({final.name}), abandoned=abandoned
        )
    except OSError as error:
        is_clean = False
        logger.error("%s is saved, but older checkpoints cannot be deleted: %s", final, error)
    return is_clean


def _write_pointer(checkpoint: Path) -> bool:
    """Let ``latest`` name a complete checkpoint; return whether the storage let it be written."""
    pointer = checkpoint.parent / LATEST_NAME
    try:
        write_text_atomic(pointer, checkpoint.name + "\n")
    except OSError as error:
        logger.error(
            "%s cannot be written (%s); %s is the newest checkpoint and is found without it",
            pointer,
            error,
            checkpoint.name,
        )
        return False
    return True


def apply_retention(
    folder: Path,
    retention: Retention,
    *,
    protected: frozenset[str],
    abandoned: frozenset[str] = frozenset(),
) -> None:
    """Delete the complete checkpoints that no rule keeps."""
    if retention.keep_last is None:
        return
    candidates: list[Candidate] = []
    for path in complete_checkpoints(folder):
        try:
            candidates.append(_candidate(path, with_metrics=retention.keep_best is not None))
        except CheckpointError as error:  # may be the best one: neither counted nor deleted
            logger.warning("%s is kept whatever it is: %s", path, error)
    for name in deletable(candidates, retention, protected=protected, abandoned=abandoned):
        manifest.remove_folder(folder / name)
        reason = "the run went back behind it" if name in abandoned else "no rule keeps it"
        logger.info("deleted checkpoint %s (%s)", folder / name, reason)


def later_checkpoints(folder: Path, step: int) -> frozenset[str]:
    """Return the names of the complete checkpoints of steps after ``step``."""
    found = {path.name: step_of(path) for path in complete_checkpoints(folder)}
    return frozenset(name for name, other in found.items() if other is not None and other > step)


def step_of(checkpoint: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for another name."""
    match = _STEP_FOLDER.match(checkpoint.name)
    return None if match is None else int(match[1])


def _candidate(checkpoint: Path, *, with_metrics: bool) -> Candidate:
    step = step_of(checkpoint)
    assert step is not None, "complete checkpoints are found by that name"
    metrics = read_trainer_state(checkpoint).metrics if with_metrics else {}
    return Candidate(name=checkpoint.name, step=step, metrics=metrics)


def write_trainer_state(folder: Path, state: TrainerState) -> None:
    """Write ``trainer.json``; durable once the checkpoint is sealed.

    Raises:
        ValueError: if ``extra_state`` is not JSON.
    """
    try:
        text = json.dumps(
            {"format_version": _FORMAT_VERSION, **asdict(state)}, indent=2, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"extra_state of checkpoint step {state.step} is not JSON: {error}; use plain values"
        ) from None
    (folder / TRAINER_NAME).write_text(text + "\n", encoding="utf-8")


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """Return the content of a checkpoint's ``trainer.json``.

    Raises:
        CheckpointError: if it is missing or was written in another format.
    """
    path = checkpoint / TRAINER_NAME
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = value.pop("format_version")
        if version != _FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: got format_version {version!r}, expected {_FORMAT_VERSION}; read it "
                "with the version of this program that wrote it"
            )
        return TrainerState(**value)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}), expected the state that "
            "was saved with the checkpoint; use another checkpoint"
        ) from None


def show_layout(layout: Mapping[str, int]) -> str:
    """Return for example ``tp2 pp2 dp1``."""
    return " ".join(f"{name}{size}" for name, size in layout.items())


def check_json(extra_state: Mapping[str, Any], *, step: int) -> dict[str, Any]:
    """Return ``extra_state`` as it will come back from ``trainer.json``.

    Raises:
        ValueError: if it is not JSON, or a key is not text.
    """
    try:
        value = json.loads(json.dumps(dict(extra_state), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"extra_state of checkpoint step {step} is not JSON: {error}; use plain values"
        ) from None
    return value


def _newest_time(folder: Path) -> float:
    """Return when the newest checkpoint was sealed, unix seconds; 0 if there is none."""
    complete = complete_checkpoints(folder)
    return manifest.read_manifest(complete[-1]).created_unix_seconds if complete else 0.0


def _creation_time(checkpoint: Path) -> float | None:
    """Return when a checkpoint was sealed, unix seconds; None if it is not complete."""
    try:
        return manifest.verify(checkpoint, checksums=False).created_unix_seconds
    except CheckpointError:
        return None
