"""FLOPs of a model's matrix products against numbers worked out by hand."""

from dataclasses import replace

from prefixrl_mcore.accounting.model_flops import NO_WORK, ModelFlops, Work, sequence_work
from prefixrl_mcore.config.model_shape import MixtureShape
from tests.support.shapes import SMALL

SHAPE = replace(
    SMALL,
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    vocab_size=100,
    tie_word_embeddings=True,
)
"""Attention weights of a layer: queries and output 2 x 8 x 12, keys and values 2 x 8 x 6: 288.
Feed-forward: 3 x 8 x 16 = 384."""


def test_dense_model() -> None:
    flops = ModelFlops.of(SHAPE)
    assert flops.per_token == 2 * 2 * (288 + 384)
    assert flops.per_row == 2 * 8 * 100
    assert flops.per_pair == 4 * 2 * 4 * 3


def test_a_token_meets_the_router_and_its_own_experts_only() -> None:
    mixture = MixtureShape(num_experts=10, num_experts_per_token=2, is_renormalized=True)
    flops = ModelFlops.of(replace(SHAPE, mixture=mixture))
    assert flops.per_token == 2 * 2 * (288 + 2 * 384 + 8 * 10)


def test_a_sequence_sees_half_of_its_square() -> None:
    assert sequence_work(1, 1) == Work(num_tokens=1, num_rows=1, num_pairs=1)
    assert sequence_work(4, 2) == Work(num_tokens=4, num_rows=2, num_pairs=1 + 2 + 3 + 4)


def test_work_adds_up_and_packing_does_not_square_the_sum() -> None:
    both = NO_WORK + sequence_work(3, 1) + sequence_work(3, 2)
    assert both == Work(num_tokens=6, num_rows=3, num_pairs=12)


def test_a_backward_pass_costs_twice_the_forward_pass() -> None:
    flops = ModelFlops(per_token=5.0, per_row=7.0, per_pair=11.0)
    work = sequence_work(4, 2)
    assert flops.forward(work) == 4 * 5 + 2 * 7 + 10 * 11
    assert flops.forward_backward(work) == 3 * flops.forward(work)
