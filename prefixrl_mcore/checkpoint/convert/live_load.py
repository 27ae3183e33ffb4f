"""Hugging Face weights into a live, sharded Megatron model."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from prefixrl_mcore.checkpoint.convert import layout
from prefixrl_mcore.checkpoint.convert.hf_folder import HfWeights
from prefixrl_mcore.checkpoint.convert.live import LiveWeight, live_weights, parts_group
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, find_table, hf_name
from prefixrl_mcore.checkpoint.manifest import CheckpointError

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_hf_weights(
    model_chunks: Sequence[nn.Module], folder: Path, hf_config: Mapping[str, Any]
) -> None:
    """Fill this rank's parameters from a Hugging Face folder, cast to the parameters' type.

    Each rank reads the weights of its own layers and experts, one rule at a time, and keeps its
    tensor-parallel part. No collectives; every rank checks the whole folder's names and shapes
    first, so that all ranks refuse a bad folder alike. A distributed optimizer's float32 copies
    are not refreshed: build the optimizer afterwards, or call its ``reload_model_params``.

    Args:
        model_chunks: this rank's chunks, wrapped or not.
        folder: folder with ``config.json`` and safetensors weights.
        hf_config: content of ``config.json``.

    Raises:
        CheckpointError: naming a damaged file, or a weight that is missing, unexpected or of
            another shape than the config or the model says.
    """
    table, dims = find_table(hf_config), ModelDims.from_hf_config(hf_config)
    with HfWeights(folder) as weights:
        weights.check(hf_config)
        found = live_weights(model_chunks, table, dims)
        _warn_of_rounding(found, weights)
        for live in found:
            _fill(live, weights, dims)


def _warn_of_rounding(found: Sequence[LiveWeight], weights: HfWeights) -> None:
    """Say, once for all ranks, that the model's type cannot hold every number of the files."""
    if dist.get_rank() != 0:
        return
    ours = {live.parameter.dtype for live in found}
    theirs = {info.dtype for info in weights.infos.values()}
    lossy = {str(t) for t in theirs for o in ours if torch.promote_types(t, o) != o}
    if lossy:
        logger.warning(
            "%s: weights of type %s are rounded to the model's %s",
            weights.folder,
            " and ".join(sorted(lossy)),
            " and ".join(sorted(map(str, ours))),
        )


def _fill(live: LiveWeight, weights: HfWeights, dims: ModelDims) -> None:
    rule, parameter = live.rule, live.parameter
    group = parts_group(rule)
    tp_rank, tp_size = group.rank(), group.size()
    tensors = [weights.read(hf_name(weight, live.place)) for weight in rule.hf]
    full = layout.hf_to_full(rule.kind, tensors, num_groups=dims.num_groups)
    if rule.kind == "vocab":
        full = layout.pad_vocab(full, _padded_vocab(live, dims, tp_size))
    part = layout.shard(rule.kind, full, rank=tp_rank, size=tp_size)
    if part.shape != parameter.shape:
        raise CheckpointError(
            f"{weights.folder}: model parameter {live.name} (layer {live.place.layer}) has shape "
            f"{tuple(parameter.shape)} on tensor-parallel rank {tp_rank} of {tp_size}, expected "
            f"{tuple(part.shape)} from config.json; build the model from the same config"
        )
    parameter.copy_(part)


def _padded_vocab(live: LiveWeight, dims: ModelDims, tp_size: int) -> int:
    """Return the number of vocabulary rows that the model has over all ranks."""
    num_rows = live.parameter.shape[0] * tp_size
    if num_rows < dims.sizes["vocab"]:
        raise CheckpointError(
            f"model parameter {live.name} has {num_rows} rows over {tp_size} ranks, expected at "
            f"least the vocabulary of {dims.sizes['vocab']}; build the model from the same config"
        )
    return num_rows
