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
    """Yield (Hugging Face name, full tensor) for every weight on rank 0, nothing on other ranks.

    In the order of the family's table, each once, in the parameters' own type and on their device.
    Vocabulary padding is cut, and a tied output head is left out. A tensor may share memory with
    the live weights: use or copy it before the next optimizer step.

    A weight goes to rank 0 and nowhere else, from the replica that rank 0 is part of. Its
    owning pipeline stage sends its parts to the first stage; there, an expert goes on to the first
    expert-parallel rank; then the first rank of the group that shares the weight gathers it. So
    rank 0 holds one weight twice (parts and whole), a rank on the way one part of it, the others
    nothing.

    All ranks must call this and exhaust it together: transfers inside the pipeline-, tensor-,
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
                f"no rank of the model holds {mine.fill(rule.megatron[0])} (expert "
                f"{mine.expert}), expected {dims.num_layers} layers as config.json says; build the "
                "model from that config"
            )
        if not _is_of_first_replica(rule):
            continue
        if rule.kind == "replicated" and dist.get_rank(parts_group(rule)) != 0:
            continue
        part = _send_to_first_stage(local.get(key), facts[key], device, owner)
        if owner is not None:
            part = _send_to_first_expert_rank(part, facts[key], device, owner)
        full = _gather_parts(rule, part)
        if full is None:
            continue
        del part
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


def _is_of_first_replica(rule: Rule) -> bool:
    """Return whether this rank's part of the weight belongs to rank 0's replica of the model."""
    if rule.is_per_expert:
        return parallel_state.get_expert_data_parallel_rank() == 0
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return dist.get_rank(cast(dist.ProcessGroup, group)) == 0


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


def _send_to_first_stage(
    part: Tensor | None, facts: _Facts, device: torch.device, expert_owner: int | None
) -> Tensor | None:
    """Return this rank's part of the weight if it is on the first pipeline stage, else None.

    An expert takes this way in its owner's pipeline group only.
    """
    if expert_owner not in (None, parallel_state.get_expert_model_parallel_rank()):
        return None
    return _move(part, facts, device, source=facts[0], group=_stage_group())


def _send_to_first_expert_rank(
    part: Tensor | None, facts: _Facts, device: torch.device, owner: int
) -> Tensor | None:
    """Return this rank's part of an expert if it is the first expert-parallel rank, else None."""
    if parallel_state.get_pipeline_model_parallel_rank() != 0:
        return None
    group = cast(dist.ProcessGroup, parallel_state.get_expert_model_parallel_group())
    return _move(part, facts, device, source=dist.get_global_rank(group, owner), group=group)


def _move(
    part: Tensor | None,
    facts: _Facts,
    device: torch.device,
    *,
    source: int,
    group: dist.ProcessGroup,
) -> Tensor | None:
    """Return the part that global rank ``source`` has on the first rank of ``group``, else None."""
    first = dist.get_global_rank(group, 0)
    if source == first:
        return part if dist.get_rank() == first else None
    if dist.get_rank() == source:
        assert part is not None, "the source holds the part"
        dist.send(part.contiguous(), dst=first, group=group)
    if dist.get_rank() != first:
        return None
    buffer = torch.empty(facts[1], dtype=facts[2], device=device)
    dist.recv(buffer, src=source, group=group)
    return buffer


def _stage_group() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def _gather_parts(rule: Rule, part: Tensor | None) -> Tensor | None:
    """Return the whole Megatron weight on rank 0, and None on every other rank."""
    if part is None:
        return None
    group = parts_group(rule)
    size = dist.get_world_size(group)
    if size == 1 or rule.kind == "replicated":
        return part
    part = part.contiguous()  # gloo delivers wrong bytes from a tensor with gaps
    parts = None
    if dist.get_rank(group) == 0:
        parts = [torch.empty_like(part) for _ in range(size)]
    dist.gather(part, parts, dst=dist.get_global_rank(group, 0), group=group)
    return None if parts is None else layout.merge(rule.kind, parts)
