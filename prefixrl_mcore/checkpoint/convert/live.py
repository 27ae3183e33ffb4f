"""The weights of a live Megatron model, matched with the rules of its family's table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from prefixrl_mcore.checkpoint.convert.rules import FamilyTable, ModelDims, Place, Rule
from prefixrl_mcore.checkpoint.manifest import CheckpointError

_LAYERS = "decoder.layers."


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveWeight:
    """One parameter of this rank."""

    rule: Rule
    """What it is made of."""

    place: Place
    """Its layer and expert in the whole model."""

    name: str
    """Megatron's name of the parameter in its model chunk."""

    parameter: Tensor
    """This tensor-parallel rank's part; not detached. A view, if it is one expert of a stack."""

    is_tied_copy: bool
    """The last pipeline stage's copy of a tied embedding: filled on load, not exported."""


def unwrap(chunk: nn.Module) -> nn.Module:
    """Return the model inside data-parallel and half-precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # pyright: ignore[reportAssignmentType] # a Module by construction
    return chunk


def parts_group(rule: Rule) -> dist.ProcessGroup:
    """Return the ranks that share a weight: tensor-parallel ones, in a mixture those of experts."""
    return cast(
        dist.ProcessGroup,
        parallel_state.get_expert_tensor_parallel_group()
        if rule.is_per_expert
        else parallel_state.get_tensor_model_parallel_group(),
    )


def live_weights(
    model_chunks: Sequence[nn.Module], table: FamilyTable, dims: ModelDims
) -> list[LiveWeight]:
    """Return every parameter of this rank with its rule, in the order of the model.

    The layer's index in the whole model is the one that Megatron gave the layer
    (``layer_number``): it is right for uneven and virtual pipeline stages too.

    Raises:
        CheckpointError: naming a parameter that the table does not know.
    """
    found: list[LiveWeight] = []
    for wrapped in model_chunks:
        chunk = unwrap(wrapped)
        for name, parameter in chunk.named_parameters():
            is_tied_copy = dims.is_tied and name == table.output_head_name
            match = (table.embedding, Place()) if is_tied_copy else table.find(name, dims)
            if match is None:
                raise CheckpointError(
                    f"model parameter {name} of shape {tuple(parameter.shape)} has no rule in the "
                    f"table of {table.model_type}; add one to convert/tables/{table.model_type}.py"
                )
            rule, local = match
            layer = None if local.layer is None else _global_layer(chunk, local.layer)
            found.extend(
                LiveWeight(
                    rule=rule,
                    place=Place(layer=layer, expert=expert),
                    name=name,
                    parameter=part,
                    is_tied_copy=is_tied_copy,
                )
                for expert, part in _by_expert(rule, local, parameter, dims)
            )
    return found


def _by_expert(
    rule: Rule, local: Place, parameter: Tensor, dims: ModelDims
) -> Iterator[tuple[int | None, Tensor]]:
    """Yield (expert in the whole layer, its part of a parameter), for a stack of experts each."""
    if not rule.is_per_expert:
        yield None, parameter
    elif local.expert is not None:
        yield _global_expert(local.expert, dims), parameter
    else:
        for index, part in enumerate(parameter.unbind()):
            yield _global_expert(index, dims), part


def _global_layer(chunk: nn.Module, local_layer: int) -> int:
    layer = chunk.get_submodule(f"{_LAYERS}{local_layer}")
    return int(layer.layer_number) - 1  # pyright: ignore[reportArgumentType] # an int set by Megatron


def _global_expert(local_expert: int, dims: ModelDims) -> int:
    """Return the expert's index in its layer; expert-parallel ranks have equal runs of them."""
    per_rank = dims.num_experts // parallel_state.get_expert_model_parallel_world_size()
    return parallel_state.get_expert_model_parallel_rank() * per_rank + local_expert
