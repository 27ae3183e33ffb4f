"""A live, sharded Megatron model as a stream of Hugging Face weights."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from prefixrl_mcore.checkpoint.convert import layout
from prefixrl_mcore.checkpoint.convert.live import live_weights, parts_group
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, Place, Rule, find_table, hf_name
from prefixrl_mcore.checkpoint.manifest import CheckpointError

_Key = tuple[str, Place]
"""(Megatron's name in the table, layer and expert) of a weight of the whole model."""


def export_hf_weights(
    model_chunks: Sequence[nn.Module], hf_config: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) for every weight of the model, each once.

    Every rank gets every tensor, in the order of the family's table, in the parameters' own type
    and on their device. A weight's owning pipeline stage broadcasts its parts to the other
    stages, then each tensor-parallel group gathers the whole; an expert is broadcast by its owner
    in each expert-parallel group, and gathered in each expert tensor-parallel group. Vocabulary
    padding is cut, and a tied output head is left out. A tensor may share memory with the live
    weights: use or copy it before the next optimizer step.

    All ranks must call this and exhaust it together: collectives over the pipeline-, tensor-,
    expert- and expert tensor-parallel groups.

    Raises:
        CheckpointError: naming a parameter without a rule, or a weight that no rank holds.
    """
    table, dims = find_table(hf_config), ModelDims.from_hf_config(hf_config)
    local: dict[_Key, Tensor] = {
        (live.rule.megatron[0], live.place): live.parameter.detach()
        for live in live_weights(model_chunks, table, dims)
        if not live.is_tied_copy
    }
    device = next(iter(local.values())).device
    facts = _gather_facts(local)
    for rule, place in table.weights(dims):
        owner, mine = _expert_owner(place, dims)
        key = (rule.megatron[0], mine)
        if key not in facts:
            raise CheckpointError(
                f"no rank of the model holds {rule.checkpoint_names(mine)[0]} (expert "
                f"{mine.expert}), expected {dims.num_layers} layers as config.json says; build the "
                "model from that config"
            )
        if owner is None:
            part = _share_over_stages(local.get(key), facts[key], device)
        else:
            part = _share_expert(owner, local.get(key), facts[key], device)
        full = _gather_parts(rule, part)
        tensors = layout.full_to_hf(
            rule.kind, full, rows=rule.rows(dims), num_groups=dims.num_groups
        )
        for weight, tensor in zip(rule.hf, tensors, strict=True):
            yield hf_name(weight, place), tensor


_Facts = tuple[int, tuple[int, ...], torch.dtype]
"""(global rank of the owner in this rank's pipeline group, shape of its part, dtype)."""


def _gather_facts(local: Mapping[_Key, Tensor]) -> dict[_Key, _Facts]:
    """Return who holds which weight in this rank's pipeline-parallel group."""
    group = _stage_group()
    mine = {
        key: (dist.get_rank(), tuple(tensor.shape), tensor.dtype) for key, tensor in local.items()
    }
    if dist.get_world_size(group) == 1:
        return mine
    stages: list[dict[_Key, _Facts] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(stages, mine, group=group)
    facts: dict[_Key, _Facts] = {}
    for stage in stages:
        facts = {**(stage or {}), **facts}
    return facts


def _share_over_stages(part: Tensor | None, facts: _Facts, device: torch.device) -> Tensor:
    """Return the owner's part on every rank of the pipeline-parallel group."""
    group = _stage_group()
    if dist.get_world_size(group) == 1 and part is not None:
        return part
    owner, shape, dtype = facts
    if dist.get_rank() == owner and part is not None:
        buffer = part.contiguous()  # gloo delivers wrong bytes from a tensor with gaps
    else:
        buffer = torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(buffer, src=owner, group=group)
    return buffer


def _expert_owner(place: Place, dims: ModelDims) -> tuple[int | None, Place]:
    """Return the expert-parallel rank that owns a weight, and this rank's counterpart of it.

    The counterpart, whose shape is the same, is the weight itself for the owner, and for a weight
    that is no expert's, which has no owner.
    """
    if place.expert is None:
        return None, place
    per_rank = dims.num_experts // parallel_state.get_expert_model_parallel_world_size()
    owner, index = divmod(place.expert, per_rank)
    first = parallel_state.get_expert_model_parallel_rank() * per_rank
    return owner, Place(layer=place.layer, expert=first + index)


def _share_expert(
    owner: int, counterpart: Tensor | None, facts: _Facts, device: torch.device
) -> Tensor:
    """Return this rank's part of the expert of expert-parallel rank ``owner`` on every rank.

    The pipeline stages of one expert-parallel rank hold the same experts, so the owner's stages
    share it first.
    """
    group = cast(dist.ProcessGroup, parallel_state.get_expert_model_parallel_group())
    if dist.get_rank(group) == owner:
        buffer = _share_over_stages(counterpart, facts, device).contiguous()
    else:
        buffer = torch.empty(facts[1], dtype=facts[2], device=device)
    if dist.get_world_size(group) > 1:
        dist.broadcast(buffer, src=dist.get_global_rank(group, owner), group=group)
    return buffer


def _stage_group() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def _gather_parts(rule: Rule, part: Tensor) -> Tensor:
    """Return the whole Megatron weight on every rank that has a part of it."""
    group = parts_group(rule)
    size = dist.get_world_size(group)
    if size == 1 or rule.kind == "replicated":
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, part.contiguous(), group=group)
    return layout.merge(rule.kind, parts)
