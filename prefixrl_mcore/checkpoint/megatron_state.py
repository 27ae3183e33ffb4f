"""The Megatron part of a checkpoint: weights, optimizer, schedule, random states.

Uses Megatron's distributed checkpointing (format ``torch_dist``). Tensors are stored whole, cut
into the pieces that each rank held, so that ranks of another layout can read what they need.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
)

from prefixrl_mcore.checkpoint.checkpointable import Trainable
from prefixrl_mcore.checkpoint.convert.live import unwrap
from prefixrl_mcore.checkpoint.fused_state import complete_fused_state
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.random_states import get_rng_state, set_rng_state
from prefixrl_mcore.checkpoint.staged import StagedState, stage
from prefixrl_mcore.checkpoint.torch_dist import SHARDING_METADATA, TorchDistReader, is_extra_state
from prefixrl_mcore.policy.cpu_runtime import megatron_on_cpu
from prefixrl_mcore.policy.topology import gather_objects

_RNG_KEY = "rng_state"
_OPTIMIZER_KEY = "optimizer"
_SLOTS_KEY = "optimizer_slots"
_MAIN_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Before the names of the float32 weights of a distributed and of a plain optimizer."""
_COMMON_KEY = "common_state"  # Megatron's name of what is not a tensor
_MAX_KEYS_IN_ERROR = 5


@megatron_on_cpu()
def stage_megatron(folder: Path, policy: Trainable, *, turn: int, is_copied: bool) -> StagedState:
    """Plan a save of the policy's state into an empty folder; all ranks must call this.

    Args:
        folder: on storage that all ranks see.
        policy: what to save.
        turn: chooses the tensor that is read back after the save.
        is_copied: the policy may change as soon as this returns; otherwise when it is written.
    """
    complete_optimizer_state(policy.optimizer)
    state = _sharded_state(policy, is_loading=False, has_optimizer=True)
    state[_RNG_KEY] = _sharded_rng(get_rng_state())
    with _known_warnings_ignored():
        return stage(folder, state, turn=turn, is_copied=is_copied)


@megatron_on_cpu()
def load_megatron(
    folder: Path, policy: Trainable, *, has_optimizer: bool, with_random_states: bool
) -> None:
    """Overwrite the policy's state from a folder that ``stage_megatron`` planned.

    All ranks must call this.

    Args:
        folder: what was written.
        policy: of the same model; any parallel layout.
        has_optimizer: the folder holds optimizer and schedule.
        with_random_states: restore this rank's random generators; as many ranks as saved.

    Raises:
        CheckpointError: naming keys that are missing, unexpected or of another shape; the policy
            is then unchanged.
    """
    if has_optimizer:
        complete_optimizer_state(policy.optimizer)
    state = _sharded_state(policy, is_loading=True, has_optimizer=has_optimizer)
    optimizer_state = state.pop(_OPTIMIZER_KEY, {})
    slots = _find_slots(optimizer_state)
    reader = TorchDistReader(folder)
    state[_SLOTS_KEY], weights_again = _by_number(slots, reader)
    if with_random_states:
        state[_RNG_KEY] = _sharded_rng(None)
    _check_keys(reader, state)
    loaded = _load(folder, state)
    if weights_again:  # in a second pass, since Megatron reads a tensor into one place only
        loaded[_SLOTS_KEY] |= _load(folder, {_SLOTS_KEY: weights_again})[_SLOTS_KEY]
    _apply_weights(loaded, policy)
    if has_optimizer:
        for index, (held, key) in enumerate(slots):
            held[key] = loaded[_SLOTS_KEY][str(index)]
        _load_optimizer(
            policy.optimizer, optimizer_state, step=_saved_step(folder, loaded[_OPTIMIZER_KEY])
        )
        # The schedule's shape belongs to the config; a checkpoint knows only how far it went.
        policy.scheduler.num_steps = 0
        policy.scheduler.step(increment=loaded["scheduler"]["num_steps"])
    else:
        policy.optimizer.reload_model_params()
    if with_random_states:
        set_rng_state(loaded[_RNG_KEY])


def _load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Let Megatron load a sharded state dict; all ranks must call this."""
    with _known_warnings_ignored():
        try:
            return cast(dict[str, Any], dist_checkpointing.load(state, str(folder)))
        except CheckpointingException as error:
            raise CheckpointError(
                f"{folder}: cannot be loaded into this policy: {error}; load a checkpoint of the "
                "same model"
            ) from error


def _sharded_state(policy: Trainable, *, is_loading: bool, has_optimizer: bool) -> dict[str, Any]:
    metadata = {
        **SHARDING_METADATA,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    models = {
        _model_key(index): _without_extra_state(
            cast(Any, unwrap(chunk)).sharded_state_dict(metadata=metadata)
        )
        for index, chunk in enumerate(policy.model_chunks)
    }
    state: dict[str, Any] = dict(models)
    if has_optimizer:
        with _padding_between_buckets(policy.optimizer):
            state[_OPTIMIZER_KEY] = policy.optimizer.sharded_state_dict(
                models, is_loading=is_loading, metadata=metadata
            )
        state["scheduler"] = policy.scheduler.state_dict()
    return state


def _apply_weights(loaded: dict[str, Any], policy: Trainable) -> None:
    for index, chunk in enumerate(policy.model_chunks):
        result = unwrap(chunk).load_state_dict(loaded[_model_key(index)], strict=False)
        absent = [key for key in result.missing_keys if not is_extra_state(key)]
        if absent or result.unexpected_keys:
            raise RuntimeError(
                f"model chunk {index}: loaded state lacks {absent} and has unknown "
                f"{result.unexpected_keys}; the sharded state dict does not describe the model"
            )


def _find_slots(optimizer_state: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything in the optimizer's state that is to be loaded.

    Megatron loads by the path in the state, and the paths depend on the layout: as soon as experts
    have process groups of their own there is an optimizer for them and one for the rest. The names
    of the tensors do not depend on it, so the tensors are loaded under numbers and put back here.
    """
    return [
        (held, key)
        for held, key, value in nested_items_iter(optimizer_state)
        if isinstance(value, (ShardedBase, LocalNonpersistentObject))
    ]


def _by_number(
    slots: list[tuple[Any, Any]], reader: TorchDistReader
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what belongs into the slots by number, under the names that were stored.

    Returns:
        What the saved optimizer kept, and the float32 weights that it shared with the model.
    """
    kept: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for index, (held, key) in enumerate(slots):
        item = held[key]
        is_shared = False
        if isinstance(item, ShardedBase):
            name = _stored_name(item.key, reader)
            is_shared = name != item.key and not name.startswith(_MAIN_WEIGHTS)
            item.key = name
        (weights if is_shared else kept)[str(index)] = item
    return kept, weights


def _stored_name(name: str, reader: TorchDistReader) -> str:
    """Return the name under which the saved optimizer, whatever its kind, kept a live tensor.

    Moments have the same names in a plain and a distributed optimizer. The float32 weights that
    the optimizer updates have not, and a plain optimizer of a float32 model has the model's own.
    """
    for prefix in _MAIN_WEIGHTS:
        if name.startswith(prefix):
            weight = name.removeprefix(prefix)
            others = [other + weight for other in _MAIN_WEIGHTS]
            return next((other for other in others if other in reader.shapes), weight)
    return name


def _saved_step(folder: Path, saved: dict[Any, Any]) -> float:
    """Return the number of updates that Adam had taken, from what is no tensor in its state.

    Nothing else is taken from there: hyperparameters are the config's, and their grouping the
    layout's.

    Raises:
        CheckpointError: if parts of the optimizer had taken different numbers.
    """
    steps = {
        float(value)
        for _, key, value in nested_items_iter(saved)
        if key in ("step", "common_step") and value is not None
    }
    if len(steps) > 1:
        raise CheckpointError(
            f"{folder}: parts of the optimizer have taken {sorted(steps)} updates, expected one "
            "number; use another checkpoint"
        )
    return steps.pop() if steps else 0.0  # Megatron leaves a 0 out


def _load_optimizer(  # untyped upstream
    optimizer: Any,  # noqa: ANN401
    state: dict[Any, Any],
    *,
    step: float,
) -> None:
    """Load Megatron's optimizer, a sharded one in two parts.

    Without Transformer Engine, ``DistributedOptimizer`` looks for Adam's step among the tensors
    of each parameter, where its own format does not put it; so the steps are hidden from it.
    """
    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    for part, part_state in zip(parts, states, strict=True):
        sharded = part_state.pop("param_state", None)
        _set_step(part_state, step, is_in_state=sharded is None and _is_torch_adam(part.optimizer))
        part.load_state_dict(part_state)
        if sharded is None:
            continue
        steps = {
            parameter: values.pop("step")
            for parameter, values in part.optimizer.state.items()
            if "step" in values
        }
        part.load_parameter_state_from_fully_reshardable(sharded)
        for parameter, value in steps.items():
            part.optimizer.state[parameter]["step"] = value
    complete_optimizer_state(optimizer)


def _set_step(part_state: dict[Any, Any], step: float, *, is_in_state: bool) -> None:
    """Write Adam's step where Megatron reads it: beside the moments, or in the groups."""
    inner = part_state.get("optimizer", part_state)
    if is_in_state:
        inner["state"]["common_step"] = torch.tensor(step)
        return
    for group in inner["param_groups"]:
        group["step"] = int(step)


@contextmanager
def _padding_between_buckets(optimizer: Any) -> Iterator[None]:  # noqa: ANN401  (untyped upstream)
    """Let ``DistributedOptimizer`` find each parameter's state where it looks for it.

    megatron-core 0.19.2 gathers the state of a buffer without the padding between its buckets,
    and then cuts it at offsets that count the padding: every parameter behind the first padding
    is saved shifted. There are several buckets as soon as a tied embedding is on two pipeline
    stages. Can go when ``sharded_param_state_fully_reshardable`` no longer pads with zeros.
    """
    sharded = [part for part in _parts(optimizer) if hasattr(part, "get_parameter_state_dp_zero")]
    for part in sharded:
        part.get_parameter_state_dp_zero = partial(_gather_with_padding, part)
    try:
        yield
    finally:
        for part in sharded:
            del part.get_parameter_state_dp_zero


def _gather_with_padding(part: Any, **arguments: bool) -> dict[Any, Any] | None:  # noqa: ANN401
    gathered = type(part).get_parameter_state_dp_zero(part, **arguments)
    if gathered is None:
        return None
    for index, buffer in enumerate(part.buffers):
        for tensors in gathered[index].values():
            for key, compact in tensors.items():
                if not isinstance(compact, torch.Tensor):
                    continue
                padded, begin = compact.new_zeros(buffer.numel), 0
                for bucket in buffer.buckets:
                    length = bucket.numel_unpadded
                    padded[bucket.offset :][:length] = compact[begin:][:length]
                    begin += length
                tensors[key] = padded
    return gathered


def _is_torch_adam(inner: object) -> bool:
    """Whether this is torch's optimizer and not Transformer Engine's, which needs no help."""
    return isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))


def _parts(optimizer: Any) -> list[Any]:  # noqa: ANN401  (untyped upstream)
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def complete_optimizer_state(optimizer: Any) -> None:  # noqa: ANN401  (untyped upstream)
    """Give every parameter of torch's Adam a state of its own, as its first step would.

    Zero moments and step 0 are what Adam begins with, so this changes no number. Without it a
    policy that has not stepped yet could be neither saved nor loaded into. Steps are cloned
    because Megatron lets all parameters share one tensor after loading, and Adam then counts
    each update once per parameter.
    """
    for part in _parts(optimizer):
        inner = part.optimizer
        if not _is_torch_adam(inner):
            complete_fused_state(part)
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                step = state.get("step", 0.0)
                state["step"] = torch.as_tensor(step, dtype=torch.float32).clone()
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter.data)


def _sharded_rng(state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject(_RNG_KEY, state, (dist.get_world_size(),), (dist.get_rank(),))


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Drop Transformer Engine's private state, which is empty in bfloat16 and version-bound."""
    return {key: value for key, value in state.items() if not is_extra_state(key)}


def _model_key(index: int) -> str:
    return f"model{index}"


def _check_keys(reader: TorchDistReader, state: dict[str, Any]) -> None:
    """Refuse a checkpoint of other weights or optimizer before anything is overwritten.

    All ranks must call this: collective over all ranks.
    """
    wanted = {item.key for item in nested_values(state) if hasattr(item, "key")}
    everywhere = gather_objects(wanted)
    stored = reader.shapes.keys() | reader.objects
    needed = set[str]().union(*everywhere) - {_RNG_KEY}
    absent = sorted(needed - stored)
    unused = sorted(
        name
        for name in stored - needed - {_RNG_KEY, _COMMON_KEY}
        if not _is_weight_again(name, reader)
    )
    if absent or unused:
        raise CheckpointError(
            f"{reader.folder}: does not fit this policy: lacks {len(absent)} entries "
            f"{_shorten(absent)}, holds {len(unused)} that the policy has not {_shorten(unused)}; "
            "load a checkpoint of the same model, in the same precision"
        )


def _is_weight_again(name: str, reader: TorchDistReader) -> bool:
    """Return whether an optimizer's weight is equal to the model's, which float32 does not round.

    Such a one is not missed by a plain optimizer, which has no weights besides the model's.
    """
    weights = [name.removeprefix(prefix) for prefix in _MAIN_WEIGHTS if name.startswith(prefix)]
    return any(reader.dtypes.get(weight) == torch.float32 for weight in weights)


def _shorten(keys: list[str]) -> str:
    return str(keys[:_MAX_KEYS_IN_ERROR]).removesuffix("]") + (
        ", ...]" if len(keys) > _MAX_KEYS_IN_ERROR else "]"
    )


@contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    """Hide remarks of torch on how Megatron calls it."""
    with warnings.catch_warnings():
        for message in (
            "torch.distributed is disabled",  # each rank reads for itself, on purpose
            "The argument order of load has been changed",
            "Please use DTensor instead",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
