"""Context parallelism without processes: who holds which token, attention over gathered keys."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from prefixrl_mcore.policy.context import (
    EqualSequences,
    attend_to_gathered,
    build_context_share,
    share_tokens,
)

CPU = torch.device("cpu")


def test_zigzag_of_two_sequences_over_two_ranks_by_hand() -> None:
    # Eight tokens in chunks of two, four in chunks of one: chunks 0 and 3 to rank 0.
    shares = share_tokens(np.array([0, 8, 12]), 2)
    assert shares.rank_T.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0]
    assert shares.place_T.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4, 5, 5]
    assert shares.tokens(0).tolist() == [0, 1, 6, 7, 8, 11]
    assert shares.tokens(1).tolist() == [2, 3, 4, 5, 9, 10]


def test_places_of_keys_and_queries_by_hand() -> None:
    starts = np.array([0, 4, 12, 16])
    shares = share_tokens(starts, 2)
    share = build_context_share(starts, shares, 1, device=CPU)
    assert share.groups == (EqualSequences(1, 2), EqualSequences(2, 1))
    # Rank 1 holds tokens 1 2 | 6 7 8 9 | 13 14; the sequence of eight comes first.
    assert share.queries_S.tolist() == [2, 3, 4, 5, 0, 1, 6, 7]
    assert share.outputs_S.tolist() == [4, 5, 0, 1, 2, 3, 6, 7]
    # Gathered: rank 0's tokens 0 3 | 4 5 10 11 | 12 15, then rank 1's.
    assert share.keys_T.tolist() == [2, 3, 10, 11, 12, 13, 4, 5, 0, 8, 9, 1, 6, 14, 15, 7]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_is_held_once_and_all_ranks_have_equal_work(size: int) -> None:
    lengths = 2 * size * np.array([3, 1, 7, 1])
    starts = np.concatenate(([0], np.cumsum(lengths)))
    shares = share_tokens(starts, size)
    held = [shares.tokens(rank) for rank in range(size)]
    assert sorted(np.concatenate(held).tolist()) == list(range(starts[-1]))
    positions_T = np.concatenate([np.arange(length) for length in lengths])
    visible = [int((positions_T[tokens] + 1).sum()) for tokens in held]
    assert len(set(visible)) == 1  # keys seen by the queries of a rank


def test_sequences_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 x 2 = 4 tokens, got lengths \[6\]; pass sequence_mul"):
        share_tokens(np.array([0, 4, 10]), 2)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, starts: np.ndarray) -> Tensor:
    """[T, heads, width] tensors; softmax written out, one sequence after the other."""
    repeats = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    outputs = []
    for first, last in itertools.pairwise(starts.tolist()):
        q, k, v = (tensor[first:last].transpose(0, 1) for tensor in (query, key, value))
        scores = (q @ k.transpose(1, 2)) / q.size(-1) ** 0.5
        mask = torch.ones(last - first, last - first, dtype=torch.bool).tril()
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
        outputs.append((weights @ v).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_groups", [4, 2], ids=["multi-head", "grouped"])
def test_attention_of_all_ranks_and_its_gradients_equal_the_plain_formula(
    size: int, num_groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    starts = np.concatenate(([0], np.cumsum(2 * size * np.array([2, 1, 5, 2, 1]))))
    num_tokens = int(starts[-1])
    query, key, value = (
        torch.randn(num_tokens, heads, 8, generator=generator).requires_grad_()
        for heads in (4, num_groups, num_groups)
    )
    shares = share_tokens(starts, size)
    rank_order_T = np.concatenate([shares.tokens(rank) for rank in range(size)])
    gathered = torch.cat((key, value), dim=-1)[rank_order_T]
    parts = []
    for rank in range(size):
        share = build_context_share(starts, shares, rank, device=CPU)
        part = attend_to_gathered(query[shares.tokens(rank)], gathered, share, softmax_scale=None)
        parts.append(part)
    mine = torch.cat(parts)[np.argsort(rank_order_T)]
    plain = _plain_attention(query, key, value, starts)
    torch.testing.assert_close(mine, plain, atol=1e-6, rtol=0)
    weight = torch.randn(plain.shape, generator=generator)
    grads = torch.autograd.grad((mine * weight).sum(), (query, key, value))
    plain_grads = torch.autograd.grad((plain * weight).sum(), (query, key, value))
    for one, other in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, atol=3e-6, rtol=0)
