"""Saving and loading the whole training state of a policy; all ranks must take part.

``run_checkpoints.py`` describes the folder; ``megatron_state.py`` writes the tensors.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.convert.hf_folder import (
    CONFIG_NAME,
    copy_assets,
    read_hf_config,
)
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.megatron_state import Trainable, load_megatron, save_megatron
from prefixrl_mcore.checkpoint.retention import KEEP_ALL, Retention
from prefixrl_mcore.checkpoint.run_checkpoints import (
    HF_FOLDER,
    MEGATRON_FOLDER,
    TrainerState,
    check_json,
    clean_up,
    latest_checkpoint,
    publish,
    read_trainer_state,
    resolve_checkpoint,
    step_folder,
    write_trainer_state,
)
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.topology import run_on_first

__all__ = ["clean_up", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)

_SAME_MODEL_KEYS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
    *("tie_word_embeddings", "rms_norm_eps"),
)
"""Entries of ``config.json`` that must agree between a checkpoint and the policy."""


class CheckpointablePolicy(Trainable, Protocol):
    """What saving and loading need of a policy."""

    hf_config: dict[str, Any]
    """Content of the model's ``config.json``."""

    model_path: Path | None
    """Hugging Face folder whose tokenizer and config files belong to the model; None if there is
    none, and a checkpoint then gets only ``hf_config``."""

    policy_version: int
    """Optimizer steps applied to the weights."""


def save_checkpoint(
    folder: Path,
    step: int,
    policy: CheckpointablePolicy,
    extra_state: Mapping[str, Any],
    retention: Retention = KEEP_ALL,
    *,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write ``folder/step-<step>`` and return its path; synchronous, complete on return.

    A kill at any moment leaves the checkpoints that were there before; what it left half-written
    is removed by the next save. An existing checkpoint of the same step is replaced. After the
    new one is complete, ``latest`` names it, and those that no rule of ``retention`` keeps go.

    All ranks must call this, with the same step; rank 0's ``extra_state`` is the one saved.

    Args:
        folder: the run's ``checkpoints`` folder, on storage that all ranks see; made if needed.
        step: step of the trainer, at least 0.
        policy: what to save.
        extra_state: any JSON object of the trainer (data cursor, FLOPs, ...).
        retention: which checkpoints are kept; this one always is.
        metrics: evaluation of these weights, for ``retention.keep_best``; rank 0's is saved.

    Raises:
        CheckpointError: if ``folder`` cannot be written.
        ValueError: if ``extra_state`` or ``metrics`` is not JSON, or ``step`` is negative.
    """
    final = step_folder(folder, step)

    def begin() -> Path:
        state = TrainerState(
            step=step,
            policy_version=policy.policy_version,
            has_optimizer=True,
            world_size=dist.get_world_size(),
            extra_state=check_json(extra_state, step=step),
            layout=_layout(),
            metrics=check_json(metrics or {}, step=step),
        )
        clean_up(folder)
        temporary = manifest.begin_folder(final)
        (temporary / MEGATRON_FOLDER).mkdir()
        write_trainer_state(temporary, state)
        _write_hf_files(temporary / HF_FOLDER, policy)
        return temporary

    temporary = run_on_first(begin)
    save_megatron(temporary / MEGATRON_FOLDER, policy)
    run_on_first(lambda: publish(temporary, final, retention))
    logger.info("saved checkpoint %s", final)
    return final


def load_checkpoint(folder: Path, policy: CheckpointablePolicy) -> tuple[int, dict[str, Any]]:
    """Restore a policy from a checkpoint and return (step, extra_state).

    The parallel layout may differ from the one that saved. Random states are restored when the
    number of ranks is the same, otherwise they stay as they are, and that is logged. A checkpoint
    made of a Hugging Face folder restores the weights only. The schedule's shape comes from the
    policy's config; only its progress is restored.

    All ranks must call this.

    Args:
        folder: a checkpoint (``.../step-000040``), or a folder of checkpoints, whose latest
            complete one is taken.
        policy: a policy of the same model; its state is overwritten.

    Raises:
        CheckpointError: if there is no checkpoint, it is incomplete or damaged, or it belongs to
            another model; the message names the path.
    """
    path, state = run_on_first(lambda: _check(folder, policy))
    restored_rng = load_megatron(
        path / MEGATRON_FOLDER,
        policy,
        has_optimizer=state.has_optimizer,
        saved_world_size=state.world_size,
    )
    policy.policy_version = state.policy_version
    if not state.has_optimizer:
        logger.info("%s holds weights only; optimizer and schedule begin anew", path)
    elif not restored_rng:
        logger.warning(
            "%s was saved by %d ranks and is loaded by %d: random states were not restored",
            path,
            state.world_size,
            dist.get_world_size(),
        )
    logger.info("loaded checkpoint %s", path)
    return state.step, state.extra_state


def _layout() -> dict[str, int]:
    """Return the parallel sizes of this run by their short names."""
    current = topology.current()
    return {"tp": current.tp_size, "pp": current.pp_size, "dp": current.dp_size}


def _write_hf_files(folder: Path, policy: CheckpointablePolicy) -> None:
    """Write what a conversion to Hugging Face will need besides the weights."""
    if policy.model_path is not None:
        copy_assets(policy.model_path, folder)
        return
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps(policy.hf_config, indent=2), encoding="utf-8")


def _check(folder: Path, policy: CheckpointablePolicy) -> tuple[Path, TrainerState]:
    """Find and verify a checkpoint, and refuse one of another model."""
    path = resolve_checkpoint(folder)
    manifest.verify(path)
    theirs = _identity(read_hf_config(path / HF_FOLDER))
    ours = _identity(policy.hf_config)
    differing = [
        f"{key} got {theirs[key]!r}, expected {value!r}"
        for key, value in ours.items()
        if theirs[key] != value
    ]
    if differing:
        raise CheckpointError(
            f"{path}: belongs to another model than {policy.model_path or 'the policy'}: "
            f"{'; '.join(differing)}; load a checkpoint of the same model, or correct model.path"
        )
    return path, read_trainer_state(path)


def _identity(hf_config: Mapping[str, Any]) -> dict[str, object]:
    """Return what two configs of the same model agree on, whichever transformers wrote them."""
    rope = hf_config.get("rope_parameters") or {}  # since transformers 5
    return {
        **{key: hf_config.get(key) for key in _SAME_MODEL_KEYS},
        "rope_theta": rope.get("rope_theta", hf_config.get("rope_theta")),
    }
