"""How one Hugging Face weight, or several, become one Megatron weight, and back.

Pure tensor functions, no Megatron: the only code that knows the order of rows. Letters: ``H``
hidden, ``A`` query heads, ``G`` key/value groups, ``d`` head size, ``q = A / G``, ``F``
feed-forward, ``V`` vocabulary, ``W`` vocabulary with padding.

* ``replicated``: one tensor, the same on every tensor-parallel rank.
* ``row``: one matrix, columns split over ranks.
* ``vocab``: [V, H], zero rows appended up to W, rows split over ranks.
* ``qkv``: queries [A d, ...], keys [G d, ...], values [G d, ...], interleaved by group: the q d
  query rows of group 0, its d key rows, its d value rows, then group 1; rows split over ranks.
* ``glu``: gate [F, H] over up [F, H]; a rank holds its share of the gate rows over its share of
  the up rows.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["replicated", "row", "vocab", "qkv", "glu"]


def hf_to_full(kind: Kind, tensors: Sequence[Tensor], *, num_groups: int) -> Tensor:
    """Return the whole Megatron weight made of the Hugging Face weights of one rule.

    Args:
        kind: layout; see the module's text.
        tensors: query, key, value for ``qkv``; gate, up for ``glu``; one tensor otherwise.
        num_groups: G; used by ``qkv`` only.
    """
    if kind == "qkv":
        by_group = [tensor.unflatten(0, (num_groups, -1)) for tensor in tensors]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    if kind == "glu":
        return torch.cat(list(tensors), dim=0)
    (tensor,) = tensors
    return tensor


def full_to_hf(kind: Kind, full: Tensor, *, rows: Sequence[int], num_groups: int) -> list[Tensor]:
    """Return the Hugging Face weights inside a whole Megatron weight.

    Inverse of ``hf_to_full``; padding of the vocabulary is cut. Results may share memory with
    ``full`` and are contiguous if ``full`` is.

    Args:
        kind: layout; see the module's text.
        full: the whole weight, of all tensor-parallel ranks.
        rows: number of rows of each Hugging Face weight, in the order of the rule.
        num_groups: G; used by ``qkv`` only.
    """
    if kind == "qkv":
        by_group = full.unflatten(0, (num_groups, -1))
        parts = by_group.split([row // num_groups for row in rows], dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]
    if kind == "glu":
        return list(full.split(list(rows), dim=0))
    if kind == "vocab":
        return [full[: rows[0]]]
    return [full]


def pad_vocab(full: Tensor, num_rows: int) -> Tensor:
    """Return ``full`` [V, H] with zero rows appended up to [num_rows, H]."""
    if num_rows == full.shape[0]:
        return full  # the largest weight of most models is not copied
    padding = full.new_zeros((num_rows - full.shape[0], *full.shape[1:]))
    return torch.cat([full, padding], dim=0)


def shard(kind: Kind, full: Tensor, *, rank: int, size: int) -> Tensor:
    """Return the part of a whole Megatron weight that tensor-parallel ``rank`` of ``size`` holds.

    Raises:
        ValueError: if the weight does not divide by ``size``.
    """
    if kind == "replicated" or size == 1:
        return full
    if kind == "glu":
        return torch.cat([_part(half, 0, rank, size) for half in full.chunk(2, dim=0)], dim=0)
    return _part(full, 1 if kind == "row" else 0, rank, size)


def merge(kind: Kind, shards: Sequence[Tensor]) -> Tensor:
    """Return the whole Megatron weight from the parts of all tensor-parallel ranks, in order."""
    if kind == "replicated" or len(shards) == 1:
        return shards[0]
    if kind == "glu":
        halves = [part.chunk(2, dim=0) for part in shards]
        return torch.cat([*(gate for gate, _ in halves), *(up for _, up in halves)], dim=0)
    return torch.cat(list(shards), dim=1 if kind == "row" else 0)


def _part(full: Tensor, dim: int, rank: int, size: int) -> Tensor:
    length = full.shape[dim]
    if length % size:
        raise ValueError(
            f"a weight of shape {tuple(full.shape)} cannot be split over {size} tensor-parallel "
            f"ranks: dimension {dim} has {length} entries; choose a size that divides it"
        )
    return full.narrow(dim, rank * (length // size), length // size)
