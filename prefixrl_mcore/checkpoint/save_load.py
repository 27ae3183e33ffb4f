"""Loading the whole training state of a policy; all ranks must take part.

``run_checkpoints.py`` describes the folder, ``saver.py`` writes it, ``megatron_state.py`` knows the
tensors.
"""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.checkpointable import CheckpointablePolicy
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.megatron_state import load_megatron
from prefixrl_mcore.checkpoint.random_states import derive_rng_state
from prefixrl_mcore.checkpoint.run_checkpoints import (
    HF_FOLDER,
    MEGATRON_FOLDER,
    TrainerState,
    clean_up,
    latest_checkpoint,
    read_trainer_state,
    resolve_checkpoint,
    show_layout,
)
from prefixrl_mcore.checkpoint.saver import parallel_layout, save_checkpoint
from prefixrl_mcore.config.model_shape import read_hf_config, read_model_shape, shape_differences
from prefixrl_mcore.policy.topology import run_on_first

__all__ = ["clean_up", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

logger = logging.getLogger(__name__)


def load_checkpoint(folder: Path, policy: CheckpointablePolicy) -> tuple[int, dict[str, Any]]:
    """Restore a policy from a checkpoint and return (step, extra_state).

    The parallel layout may differ from the one that saved. Random states are restored under the
    same layout; under another one they are derived anew from the policy's seed and the step, and
    that is logged. A checkpoint made of a Hugging Face folder restores the weights only. The
    schedule's shape comes from the policy's config; only its progress is restored.

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
    layout = parallel_layout()
    is_same_layout = state.world_size == dist.get_world_size() and all(
        layout[name] == size for name, size in state.layout.items()
    )
    load_megatron(
        path / MEGATRON_FOLDER,
        policy,
        has_optimizer=state.has_optimizer,
        with_random_states=state.has_optimizer and is_same_layout,
    )
    policy.policy_version = state.policy_version
    if not state.has_optimizer:
        logger.info("%s holds weights only; optimizer and schedule begin anew", path)
    elif not is_same_layout:
        derive_rng_state(policy.seed, state.step)
        logger.warning(
            "%s was saved by %d ranks (%s), there are %d (%s): random states are derived anew from "
            "seed %d and step %d",
            path,
            state.world_size,
            show_layout(state.layout),
            dist.get_world_size(),
            show_layout(layout),
            policy.seed,
            state.step,
        )
    logger.info("loaded checkpoint %s", path)
    return state.step, state.extra_state


def _check(folder: Path, policy: CheckpointablePolicy) -> tuple[Path, TrainerState]:
    """Find and verify a checkpoint, and refuse one of another model."""
    path = resolve_checkpoint(folder)
    manifest.verify(path)
    theirs = read_model_shape(read_hf_config(path / HF_FOLDER))
    ours = read_model_shape(policy.hf_config)
    differing = [
        f"{name} got {got!r}, expected {expected!r}"
        for name, (got, expected) in shape_differences(theirs, ours).items()
    ]
    if differing:
        raise CheckpointError(
            f"{path}: belongs to another model than {policy.model_path or 'the policy'}: "
            f"{'; '.join(differing)}; load a checkpoint of the same model, or correct model.path"
        )
    return path, read_trainer_state(path)
