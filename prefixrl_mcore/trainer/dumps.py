"""Batches whose update was not finite, on disk, and their replay.

``RUN/dumps/step-<N>.npz`` holds the packed batch of step N, ``step-<N>.json`` what is known of it,
and the checkpoint ``step-<N>/`` the policy that met it.
"""

import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefixrl_mcore.checkpoint.run_checkpoints import step_folder
from prefixrl_mcore.checkpoint.save_load import load_checkpoint
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.packing import PackedBatch, Stream
from prefixrl_mcore.observability.atomic import write_json_atomic
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.policy.nonfinite import NonFiniteError
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.policy.topology import initialize, run_on_first, shut_down
from prefixrl_mcore.trainer.run_policy import build_policy

logger = logging.getLogger(__name__)


def write_dump(folder: Path, step: int, batch: PackedBatch, error: NonFiniteError) -> Path:
    """Write a batch and the error that it made; return the path of the JSON file."""
    path = step_folder(folder, step).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{index}/{field.name}": getattr(stream, field.name)
        for index, stream in enumerate(batch.streams)
        for field in fields(Stream)
    }
    np.savez_compressed(path.with_suffix(".npz"), **arrays)
    facts = {f.name: getattr(batch, f.name) for f in fields(PackedBatch) if f.name != "streams"}
    culprits = [
        {
            "sequence_ids": culprit.sequence_ids,
            "data_parallel_rank": culprit.data_parallel_rank,
            "microbatch": culprit.microbatch,
        }
        for culprit in error.culprits
    ]
    value = {"step": step, "error": str(error), "culprits": culprits, "batch": facts}
    write_json_atomic(path, {**value, "num_streams": len(batch.streams)})
    return path


def read_dump(path: Path) -> PackedBatch:
    """Return the batch of a dump.

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
    return PackedBatch(streams=streams, **facts)


def replay(policy: MegatronPolicy, batch: PackedBatch) -> NonFiniteError | None:
    """Run the update of a dumped batch again; return what it raised, None if it was finite.

    All ranks must call this. The number of data-parallel ranks may differ from the dump's if it
    divides the number of streams. A finite update changes the policy.
    """
    dp_size = policy.topology.dp_size
    if len(batch.streams) % dp_size:
        raise ConfigError(
            f"the dump has {len(batch.streams)} streams, which {dp_size} data-parallel ranks "
            "cannot share; set policy.parallel.data_parallel_size to a divisor, for example 1"
        )
    try:
        policy.update(replace(batch, num_ranks=dp_size))
    except NonFiniteError as error:
        return error
    return None


def run_replay(config: RunConfig, step: int) -> int:
    """Replay the dump of ``step`` in the run's folder; return 0 if it is non-finite again, else 1.

    Raises:
        ConfigError: if there is no dump of that step.
    """
    folder = RunFolder(config.run_folder).dumps
    topology = initialize(config.policy.parallel, seed=config.seed)
    try:
        batch = run_on_first(lambda: read_dump(step_folder(folder, step).with_suffix(".json")))
        policy = build_policy(config)
        load_checkpoint(step_folder(folder, step), policy)
        error = replay(policy, batch)
    finally:
        shut_down()
    if topology.is_first:
        logger.info("replay of step %d: %s", step, error or "the update was finite this time")
    return 1 if error is None else 0
