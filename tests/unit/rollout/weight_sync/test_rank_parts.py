"""Which part of a weight each tensor-parallel rank of a server on GPUs holds."""

import pytest
import torch

from prefixrl_mcore.rollout.weight_sync.checksums import Digests
from tests.support.digests import gpu_digest

ATTENTION = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("num_ranks", "rank", "query", "head"),
    [
        (2, 1, slice(4, 8), slice(2, 4)),
        (4, 1, slice(2, 4), slice(0, 2)),
        (4, 2, slice(4, 6), slice(2, 4)),
    ],
    ids=[
        "a head for each rank",
        "the second copy of the first head",
        "the first copy of the second",
    ],
)
def test_ranks_beyond_the_number_of_heads_of_keys_and_values_hold_copies(
    num_ranks: int, rank: int, query: slice, head: slice
) -> None:
    torch.manual_seed(0)
    # Four query heads and two of keys and values, of two rows each.
    weights = {"q": torch.randn(8, 3), "k": torch.randn(4, 3), "v": torch.randn(4, 3)}
    digests = Digests({num_ranks}, dtype=torch.float32, num_key_value_heads=2, is_cuda=True)
    for part, weight in weights.items():
        digests.add(f"{ATTENTION}{part}_proj.weight", weight)

    held = digests.of_rank(num_ranks, rank)

    expected = gpu_digest(weights["q"][query], weights["k"][head], weights["v"][head])
    assert held == {f"{ATTENTION}qkv_proj.weight": expected}


def test_ranks_cut_rows_or_columns_and_pad_the_vocabulary() -> None:
    weights = {
        "model.embed_tokens.weight": torch.randn(33, 4),
        f"{ATTENTION}o_proj.weight": torch.randn(4, 6),
        "model.norm.weight": torch.randn(4),
    }
    digests = Digests({2}, dtype=torch.float32, num_key_value_heads=2, is_cuda=True)
    for name, weight in weights.items():
        digests.add(name, weight)

    embedding, output, norm = weights.values()
    assert (
        list(digests.of_rank(2, 0).values())
        == [
            gpu_digest(embedding[:32]),  # of 33 rows, padded to 64
            gpu_digest(output[:, :3]),
            gpu_digest(norm),
        ]
    )
    assert list(digests.of_rank(2, 1).values()) == [
        gpu_digest(torch.cat([embedding[32:], torch.zeros(31, 4)])),
        gpu_digest(output[:, 3:]),
        gpu_digest(norm),
    ]
