"""Batches whose update was not finite, on disk.

``RUN/dumps/step-<N>.npz`` holds the packed batch of step N, ``step-<N>.json`` what is known of it,
and the checkpoint ``step-<N>/`` the policy that met it. A supervised phase has ``dumps/sft/``.
``replay.py`` runs them again.
"""

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from prefixrl_mcore.checkpoint.manifest import ReadBackError
from prefixrl_mcore.checkpoint.run_checkpoints import step_folder
from prefixrl_mcore.checkpoint.saver import save_checkpoint
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.data.packing import PackedBatch, Stream
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.policy.nonfinite import Findings, NonFiniteError
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.policy.topology import run_on_first

logger = logging.getLogger(__name__)

SFT_FOLDER = "sft"
"""Dumps of the supervised phase inside a folder of dumps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dump:
    """What a dump says of an update."""

    batch: PackedBatch
    """Packed for the layout of the run."""

    loss: LossConfig | None
    """Estimator of this update; None is the policy's."""


def dump_and_explain(
    error: NonFiniteError,
    policy: MegatronPolicy,
    batch: PackedBatch,
    *,
    loss: LossConfig | None,
    folder: Path,
    step: int,
    state: dict[str, Any],
) -> NonFiniteError:
    """Keep batch and policy, then look for what made the update non-finite; return the whole error.

    All ranks must call this. The dump comes first: the search takes many passes, and a job may not
    live to its end. Storage that refuses the dump does not hide the error.

    Args:
        error: what the update raised; it has changed nothing.
        policy: the policy that met the batch.
        batch: what it was given.
        loss: estimator of this update; None is the policy's.
        folder: where dumps go.
        step: of the phase.
        state: the trainer's, for the checkpoint.
    """
    path = dump_path(folder, step)
    place = str(path)
    try:
        run_on_first(lambda: write_dump(path, step, batch, error, loss=loss))
        save_checkpoint(folder, step, policy, state)
    except (OSError, ReadBackError) as refusal:  # on every rank
        place = f"incomplete, the storage refused it ({refusal})"
    logger.error("step %d: %s. Dump: %s. Looking for the rollouts that made it", step, error, place)
    findings = policy.find_nonfinite(batch, loss=loss)
    try:
        run_on_first(lambda: _add_findings(path, findings))
    except OSError as refusal:  # on every rank
        place = f"incomplete, the storage refused it ({refusal})"
    return NonFiniteError(
        f"step {step}: {error}, {findings}; no step was taken. Look at these rollouts and their "
        f"logprob gap; lower policy.optimizer.lr if it happens again. Dump: {place}"
    )


def dump_path(folder: Path, step: int) -> Path:
    """Return the JSON file of a dump; the arrays lie beside it, with the suffix ``.npz``."""
    return step_folder(folder, step).with_suffix(".json")


def write_dump(
    path: Path, step: int, batch: PackedBatch, error: NonFiniteError, *, loss: LossConfig | None
) -> None:
    """Write a batch and the error that it made; the JSON file comes last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    arrays = {
        f"{index}/{field.name}": getattr(stream, field.name)
        for index, stream in enumerate(batch.streams)
        for field in fields(Stream)
    }
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    facts = {f.name: getattr(batch, f.name) for f in fields(PackedBatch) if f.name != "streams"}
    value = {
        "step": step,
        "error": str(error),
        "loss": None if loss is None else loss.model_dump(mode="json"),
        "batch": facts,
        "num_streams": len(batch.streams),
    }
    write_json_atomic(path, value)


def _add_findings(path: Path, findings: Findings) -> None:
    if path.exists():
        value = json.loads(path.read_text(encoding="utf-8"))
        write_json_atomic(path, value | {"findings": asdict(findings)})


def read_dump(path: Path) -> Dump:
    """Return what a dump says of an update.

    Raises:
        ConfigError: if there is no such dump.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such dump; see the error of the run for the path")
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    with np.load(path.with_suffix(".npz")) as arrays:
        streams = tuple(
            Stream(**{field.name: arrays[f"{index}/{field.name}"] for field in fields(Stream)})
            for index in range(value["num_streams"])
        )
    facts = value["batch"] | {"sequence_ids": tuple(value["batch"]["sequence_ids"])}
    loss = None if value["loss"] is None else LossConfig.model_validate(value["loss"])
    return Dump(batch=PackedBatch(streams=streams, **facts), loss=loss)
