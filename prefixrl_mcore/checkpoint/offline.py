"""Conversion between checkpoints and Hugging Face folders without a model, GPU or other ranks.

One process, one weight at a time: memory is a small multiple of the largest weight.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.convert import layout
from prefixrl_mcore.checkpoint.convert.hf_folder import (
    HfWeights,
    copy_assets,
    read_hf_config,
    refuse_existing,
    write_hf_folder,
)
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, Place, Rule, find_table, hf_name
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.run_checkpoints import (
    HF_FOLDER,
    MEGATRON_FOLDER,
    TrainerState,
    read_trainer_state,
    resolve_checkpoint,
    write_trainer_state,
)
from prefixrl_mcore.checkpoint.torch_dist import Piece, TorchDistReader, write_torch_dist

logger = logging.getLogger(__name__)


def convert_to_hf(checkpoint: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the weights of a checkpoint as a Hugging Face folder; return the checkpoint's path.

    Config, generation config, tokenizer and template files are those of the initial model, byte
    for byte. An interrupted call leaves no folder of the name ``out``.

    Args:
        checkpoint: a checkpoint, or a folder of checkpoints, whose latest is taken.
        out: folder to make; must not exist, or be empty.
        dtype: type of the written weights; None keeps the checkpoint's.

    Raises:
        CheckpointError: if the checkpoint is missing, incomplete or damaged, a weight is
            missing or of the wrong shape, or ``out`` holds something.
    """
    refuse_existing(out)
    path = resolve_checkpoint(checkpoint)
    manifest.verify(path)
    hf_config = read_hf_config(path / HF_FOLDER)
    reader = TorchDistReader(path / MEGATRON_FOLDER)
    write_hf_folder(_hf_weights(reader, hf_config, path), path / HF_FOLDER, out, dtype=dtype)
    logger.info("wrote %s from step %d of %s", out, read_trainer_state(path).step, path)
    return path


def convert_from_hf(source: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights of a Hugging Face folder as a checkpoint of step 0, without optimizer.

    ``load_checkpoint`` loads it in any parallel layout; optimizer and schedule begin anew. An
    interrupted call leaves no folder of the name ``out``.

    Args:
        source: folder with ``config.json``, safetensors weights and tokenizer files.
        out: checkpoint folder to make; must not exist, or be empty.
        dtype: type of the stored weights; None keeps each as it is.

    Raises:
        CheckpointError: naming a damaged file, or a weight that is missing, unexpected or of the
            wrong shape; or if ``out`` holds something.
    """
    refuse_existing(out)
    hf_config = read_hf_config(source)
    with HfWeights(source) as weights, manifest.write_folder(out) as folder:
        weights.check(hf_config)
        (folder / MEGATRON_FOLDER).mkdir()
        write_torch_dist(folder / MEGATRON_FOLDER, _pieces(weights, hf_config, dtype))
        copy_assets(source, folder / HF_FOLDER)
        write_trainer_state(
            folder,
            TrainerState(
                step=0, policy_version=0, has_optimizer=False, world_size=0, extra_state={}
            ),
        )
    logger.info("wrote checkpoint %s from %s", out, source)


def _hf_weights(
    reader: TorchDistReader, hf_config: Mapping[str, Any], path: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) in the order of the family's table."""
    table, dims = find_table(hf_config), ModelDims.from_hf_config(hf_config)
    for rule, place in table.weights(dims):
        full = _read_full(reader, rule, place, dims, path)
        tensors = layout.full_to_hf(
            rule.kind, full, rows=rule.rows(dims), num_groups=dims.num_groups
        )
        for weight, tensor in zip(rule.hf, tensors, strict=True):
            yield hf_name(weight, place), tensor


def _read_full(
    reader: TorchDistReader, rule: Rule, place: Place, dims: ModelDims, path: Path
) -> Tensor:
    """Return one whole Megatron weight, from a stack of layers or under its own name."""
    stacks = () if place.layer is None else rule.stacked_checkpoint_names()
    stacked = [n for n in stacks if reader.shapes.get(n, ())[:1] == (dims.num_layers,)]
    names = [name for name in rule.checkpoint_names(place) if name in reader.shapes]
    if not stacked and not names:
        raise CheckpointError(
            f"{path}: lacks {rule.checkpoint_names(place)[0]}, expected a model of "
            f"{dims.num_layers} layers as its config.json says; use another checkpoint"
        )
    name = (stacked or names)[0]
    indices = (place.layer if stacked else None, place.expert)
    full = reader.read(name, *(index for index in indices if index is not None))
    expected = rule.full_shape(dims)
    is_padded = rule.kind == "vocab" and full.shape[0] >= expected[0]
    if tuple(full.shape[1:]) != expected[1:] or not (full.shape[0] == expected[0] or is_padded):
        raise CheckpointError(
            f"{path}: {name} got shape {tuple(full.shape)}, expected {expected} as its "
            "config.json says; use another checkpoint"
        )
    return full


def _pieces(
    weights: HfWeights, hf_config: Mapping[str, Any], dtype: torch.dtype | None
) -> Iterator[Piece]:
    """Yield every Megatron weight; layers as pieces of a stack, as Megatron stores them."""
    table, dims = find_table(hf_config), ModelDims.from_hf_config(hf_config)
    for rule, place in table.weights(dims):
        tensors = [weights.read(hf_name(weight, place)).to(dtype=dtype) for weight in rule.hf]
        full = layout.hf_to_full(rule.kind, tensors, num_groups=dims.num_groups)
        indices = [
            (index, number)
            for index, number in (
                (place.layer, dims.num_layers),
                (place.expert, dims.num_experts),
            )
            if index is not None
        ]
        yield Piece(
            name=rule.stacked_checkpoint_names()[0],
            full_shape=(*(number for _, number in indices), *full.shape),
            offsets=(*(index for index, _ in indices), *(0,) * full.dim()),
            tensor=full[(None,) * len(indices)],
        )
