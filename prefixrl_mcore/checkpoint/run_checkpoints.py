"""The folder of a run's checkpoints: names, which one is the latest, which may go.

A checkpoint is one folder, complete or absent (``manifest.py``)::

    RUN/checkpoints/step-000040/
        megatron/       weights, optimizer, schedule, random states: torch_dist format, in global
                        tensors, so that another parallel layout can load it
        trainer.json    step, policy version, and whatever the trainer wants to remember
        hf/             config.json, tokenizer and template files of the initial model, as bytes
        manifest.json   sizes and checksums of all of the above
    RUN/checkpoints/latest      name of the newest complete checkpoint

Nothing here needs torch or Megatron.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.observability.atomic import write_text_atomic

logger = logging.getLogger(__name__)

MEGATRON_FOLDER = "megatron"
HF_FOLDER = "hf"
TRAINER_NAME = "trainer.json"
LATEST_NAME = "latest"

_FORMAT_VERSION = 1
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


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of ``step``."""
    if step < 0:
        raise ValueError(f"checkpoint step must be at least 0, got {step}")
    return folder / f"step-{step:06d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names if it is complete, else the newest complete one.

    Complete means that the manifest is there and every file has its size. None if there is none.
    Only reads, so that it can be called beside a running trainer; the process that owns the folder
    calls ``clean_up`` first, which also brings back a checkpoint whose replacement was killed
    between two renames.
    """
    pointer = folder / LATEST_NAME
    if pointer.is_file():
        named = folder / pointer.read_text(encoding="utf-8").strip()
        if _creation_time(named) is not None:
            return named
        logger.warning("%s names %s, which is not complete; trying others", pointer, named)
    complete = _complete_checkpoints(folder)
    return complete[-1] if complete else None


def clean_up(folder: Path) -> None:
    """Remove or undo what killed saves left half-written, half-renamed or half-deleted.

    Only the trainer that writes to the folder may call this, on one rank, with no save under way.
    """
    manifest.clean_temporaries(folder)
    for path in folder.glob(f".{LATEST_NAME}.tmp-*"):
        path.unlink()


def resolve_checkpoint(folder: Path) -> Path:
    """Return ``folder`` if it is a checkpoint, else the latest complete one inside it.

    Raises:
        CheckpointError: if there is none.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder; check the path")
    if (folder / manifest.MANIFEST_NAME).exists() or _STEP_FOLDER.match(folder.name):
        return folder
    latest = latest_checkpoint(folder)
    if latest is None:
        raise CheckpointError(
            f"{folder}: holds no complete checkpoint, expected step-<number> folders with a "
            f"{manifest.MANIFEST_NAME}; check the path, or start from the initial model"
        )
    return latest


def publish(temporary: Path, final: Path, keep_last: int | None) -> None:
    """Seal a checkpoint, let ``latest`` name it, and delete what exceeds ``keep_last``."""
    manifest.seal_folder(temporary, final)
    write_text_atomic(final.parent / LATEST_NAME, final.name + "\n")
    if keep_last is None:
        return
    for path in _complete_checkpoints(final.parent)[:-keep_last]:
        if path != final:
            manifest.remove_folder(path)
            logger.info("deleted checkpoint %s (checkpoint.keep_last = %d)", path, keep_last)


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


def _complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, oldest first by time of writing."""
    if not folder.is_dir():
        return []
    times = {
        path: _creation_time(path) for path in folder.iterdir() if _STEP_FOLDER.match(path.name)
    }
    complete = [(time, path) for path, time in times.items() if time is not None]
    return [path for _, path in sorted(complete)]


def _creation_time(checkpoint: Path) -> float | None:
    """Return when a checkpoint was sealed, unix seconds; None if it is not complete."""
    try:
        return manifest.verify(checkpoint, checksums=False).created_unix_seconds
    except CheckpointError:
        return None
