"""Context parallelism: which tokens of a packed stream a rank holds, and attention over all.

Shape suffixes: ``T`` tokens of a stream, ``S`` = T / ranks, this rank's share of them, ``R`` rows
of a stream, ``N`` sequences of one length, ``K`` width of a head.

Megatron's zigzag: each sequence is cut into ``2 x ranks`` equal chunks, and rank r holds chunks r
and ``2 x ranks - 1 - r``. A late chunk attends to many keys and an early one to few, so that all
ranks have the same work. Everything that acts on single tokens runs on the share; attention gathers
the keys and values of all ranks, lays them out in stream order, and lets each chunk of queries see
the keys of its own sequence up to itself.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  (torch's own alias)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


@dataclass(frozen=True, slots=True)
class EqualSequences:
    """Sequences of one length, side by side."""

    num_sequences: int
    """N."""

    chunk: int
    """Tokens of one chunk; a sequence has ``2 x ranks`` of them."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ContextShare:
    """The share of one context-parallel rank in the attention of one stream."""

    rank: int
    """Which rank of the context-parallel group."""

    size: int
    """Ranks of the group."""

    groups: tuple[EqualSequences, ...]
    """All sequences, by length."""

    queries_S: Tensor
    """[S] int64 tokens of the share, group after group; in a group [N, 2 chunks, chunk]."""

    outputs_S: Tensor
    """[S] int64 the way back: the place among ``queries_S`` of each token of the share."""

    keys_T: Tensor
    """[T] int64 places among the gathered shares of all ranks, group after group; in a group
    [N, 2 x size chunks, chunk]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenShares:
    """Where each token of a stream is (host side)."""

    rank_T: np.ndarray
    """[T] int64 context-parallel rank that holds the token."""

    place_T: np.ndarray
    """[T] int64 its place in that rank's share."""

    size: int
    """Ranks."""

    def tokens(self, rank: int) -> np.ndarray:
        """Return the [S] int64 tokens of a rank, in the order of its share."""
        mine = np.flatnonzero(self.rank_T == rank)
        return mine[np.argsort(self.place_T[mine], kind="stable")]


def share_tokens(sequence_starts: np.ndarray, size: int) -> TokenShares:
    """Return who holds which token of a stream, and where.

    Args:
        sequence_starts: [num_sequences + 1] int, cumulative, from 0 to T.
        size: context-parallel ranks.

    Raises:
        ValueError: if a sequence does not divide into ``2 * size`` chunks.
    """
    starts = np.asarray(sequence_starts, dtype=np.int64)
    lengths = np.diff(starts)
    if (lengths % (2 * size)).any():
        uncut = sorted({int(length) for length in lengths if length % (2 * size)})
        raise ValueError(
            f"context parallelism over {size} ranks needs sequences of a multiple of 2 x {size} = "
            f"{2 * size} tokens, got lengths {uncut}; "
            f"pass sequence_multiple={2 * size} to pack()"
        )
    chunk_T = np.repeat(lengths // (2 * size), lengths)
    start_T = np.repeat(starts[:-1], lengths)
    number_T, offset_T = np.divmod(np.arange(starts[-1]) - start_T, np.maximum(chunk_T, 1))
    is_early_T = number_T < size
    return TokenShares(
        rank_T=np.where(is_early_T, number_T, 2 * size - 1 - number_T),
        place_T=start_T // size + np.where(is_early_T, 0, chunk_T) + offset_T,
        size=size,
    )


def build_context_share(
    sequence_starts: np.ndarray, shares: TokenShares, rank: int, *, device: torch.device
) -> ContextShare:
    """Return what ``context_attention`` needs of one stream on one rank.

    Args:
        sequence_starts: [num_sequences + 1] int, cumulative, from 0 to T.
        shares: who holds which of its tokens.
        rank: this rank.
        device: where the model's activations live.
    """
    starts = np.asarray(sequence_starts, dtype=np.int64)
    lengths = np.diff(starts)
    groups: list[EqualSequences] = []
    tokens: list[np.ndarray] = []
    for length in np.unique(lengths)[::-1]:
        members = starts[:-1][lengths == length]
        groups.append(EqualSequences(len(members), int(length) // (2 * shares.size)))
        tokens.append((members[:, None] + np.arange(length)).reshape(-1))
    in_group_order_T = np.concatenate(tokens)
    num_mine = len(in_group_order_T) // shares.size
    is_mine_T = shares.rank_T[in_group_order_T] == rank
    queries_S = shares.place_T[in_group_order_T[is_mine_T]]
    keys_T = shares.rank_T[in_group_order_T] * num_mine + shares.place_T[in_group_order_T]
    return ContextShare(
        rank=rank,
        size=shares.size,
        groups=tuple(groups),
        queries_S=torch.from_numpy(queries_S).to(device),
        outputs_S=torch.from_numpy(np.argsort(queries_S, kind="stable")).to(device),
        keys_T=torch.from_numpy(keys_T).to(device),
    )


def context_attention(
    query_SNK: Tensor,
    key_SGK: Tensor,
    value_SGK: Tensor,
    share: ContextShare,
    *,
    group: dist.ProcessGroup,
    softmax_scale: float | None,
) -> Tensor:
    """Return this rank's [S, heads * width] causal attention inside each sequence.

    All ranks of ``group`` must call this, and its backward pass: keys and values are gathered in
    the forward pass, and their gradients reduce-scattered in the backward pass.

    Args:
        query_SNK: [S, heads, width] rotated queries of this rank's tokens.
        key_SGK: [S, key-value heads, width] rotated keys.
        value_SGK: [S, key-value heads, width] values.
        share: this rank's share of the stream.
        group: the context-parallel ranks.
        softmax_scale: multiplies the scores; None is ``width ** -0.5``.
    """
    both_SG2K = torch.cat((key_SGK, value_SGK), dim=-1).contiguous()
    gathered = gather_from_sequence_parallel_region(both_SG2K, group=group)
    return attend_to_gathered(query_SNK, cast(Tensor, gathered), share, softmax_scale=softmax_scale)


def attend_to_gathered(
    query_SNK: Tensor, both_TG2K: Tensor, share: ContextShare, *, softmax_scale: float | None
) -> Tensor:
    """Return [S, heads * width]; ``both_TG2K`` holds keys and values, rank after rank."""
    query_SNK = query_SNK.index_select(0, share.queries_S)
    both_TG2K = both_TG2K.index_select(0, share.keys_T)
    outputs: list[Tensor] = []
    first = 0
    for group in share.groups:
        own, whole = 2 * group.chunk, 2 * share.size * group.chunk
        last = first + group.num_sequences * own
        queries = query_SNK[first:last].unflatten(0, (group.num_sequences, own))
        both = both_TG2K[first * share.size : last * share.size]
        keys, values = both.unflatten(0, (group.num_sequences, whole)).chunk(2, dim=-1)
        chunks = [
            _attend(half, keys[:, :visible], values[:, :visible], softmax_scale)
            for half, visible in zip(
                queries.chunk(2, dim=1), _visible_keys(share, group.chunk), strict=True
            )
        ]
        outputs.append(torch.cat(chunks, dim=1).flatten(0, 1))
        first = last
    output_S = torch.cat(outputs).index_select(0, share.outputs_S)
    return output_S.flatten(1)


def _visible_keys(share: ContextShare, chunk: int) -> tuple[int, int]:
    """Return how many keys of a sequence the rank's early and late chunk see at most."""
    return (share.rank + 1) * chunk, (2 * share.size - share.rank) * chunk


def _attend(query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None) -> Tensor:
    """Return [N, chunk, heads, width]: the queries are the last ones of the keys' positions."""
    num_queries, num_keys = query.size(1), key.size(1)
    if query.is_cuda:  # stands for the mask, so that the flash kernel can do without it
        mask = causal_lower_right(num_queries, num_keys)
    else:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        scale=softmax_scale,
        enable_gqa=key.size(2) != query.size(2),
    )
    return output.transpose(1, 2)
