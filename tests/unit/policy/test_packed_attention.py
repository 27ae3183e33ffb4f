"""The padded layout of packed streams, attention on it, and rotary angles."""

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prefixrl_mcore.policy.attention import PackedCausalAttention
from prefixrl_mcore.policy.packed import (
    Bucket,
    FromSlots,
    PackedRotaryEmbedding,
    PackedStream,
    ToSlots,
    build_packed_stream,
)

CPU = torch.device("cpu")


def _packed(lengths: list[int]) -> PackedStream:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    return build_packed_stream(sequence_starts=starts, position_ids_T=positions_T, device=CPU)


def test_layout_of_four_sequences_worked_by_hand() -> None:
    # Longest first: 4 and 3 share a bucket (3 >= 0.75 * 4); 1 and 1 are another.
    packed = _packed([1, 4, 3, 1])
    assert packed.buckets == (Bucket(2, 4), Bucket(2, 1))
    assert packed.slot_tokens_P.tolist() == [1, 2, 3, 4, 5, 6, 7, 5, 0, 8]
    assert packed.token_slots_T.tolist() == [8, 0, 1, 2, 3, 4, 5, 6, 9]


@pytest.mark.parametrize("starts", [[0, 3], [1, 5], [0, 3, 3, 5]], ids=["short", "late", "empty"])
def test_starts_that_do_not_cover_the_stream_are_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend from 0 to 5"):
        build_packed_stream(
            sequence_starts=np.array(starts), position_ids_T=torch.arange(5), device=CPU
        )


def test_padding_slots_carry_no_gradient_either_way() -> None:
    packed = _packed([4, 3])
    values_T = torch.arange(7.0).reshape(7, 1).requires_grad_()
    slots_P: Tensor = ToSlots.apply(values_T, packed)
    (slots_P * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 1000])[:, None]).sum().backward()
    assert values_T.grad is not None
    assert values_T.grad[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    filled_P = torch.zeros(8, 1, requires_grad=True)
    FromSlots.apply(filled_P, packed).sum().backward()
    assert filled_P.grad is not None
    assert filled_P.grad[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0]


def _attention(num_heads: int, num_groups: int) -> PackedCausalAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=num_heads * 8,
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        kv_channels=8,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    return PackedCausalAttention(config, 1, AttnMaskType.causal, "self")


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """[T, N, K] tensors, one sequence after the other, softmax written out."""
    repeats = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    outputs = []
    first = 0
    for length in lengths:
        q, k, v = (t[first : first + length].transpose(0, 1) for t in (query, key, value))
        scores = (q @ k.transpose(1, 2)) / q.size(-1) ** 0.5
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
        outputs.append((weights @ v).transpose(0, 1).flatten(1))
        first += length
    return torch.cat(outputs)


@pytest.mark.parametrize("num_groups", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[5], [7, 7], [2, 9, 1, 8, 3, 1], [1, 1]], ids=str)
def test_attention_and_its_gradients_equal_the_plain_formula(
    lengths: list[int], num_groups: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(lengths)
    query, key, value = (
        torch.randn(num_tokens, 1, heads, 8, generator=generator).requires_grad_()
        for heads in (4, num_groups, num_groups)
    )
    mine = _attention(4, num_groups)(query, key, value, None, packed_seq_params=_packed(lengths))
    plain = _plain_attention(query.squeeze(1), key.squeeze(1), value.squeeze(1), lengths)
    assert mine.shape == (num_tokens, 1, 32)
    torch.testing.assert_close(mine.squeeze(1), plain, atol=1e-6, rtol=0)
    weight = torch.randn(num_tokens, 32, generator=generator)
    grads = torch.autograd.grad((mine.squeeze(1) * weight).sum(), (query, key, value))
    plain_grads = torch.autograd.grad((plain * weight).sum(), (query, key, value))
    for one, other in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(one, other, atol=3e-6, rtol=0)


def test_attention_refuses_masks_and_unpacked_input() -> None:
    attention = _attention(2, 2)
    tensor = torch.zeros(3, 1, 2, 8)
    with pytest.raises(ValueError, match="no mask"):
        attention(tensor, tensor, tensor, torch.ones(3, 3), packed_seq_params=_packed([3]))
    with pytest.raises(ValueError, match="needs a PackedStream, got NoneType"):
        attention(tensor, tensor, tensor, None)


def test_rotary_angles_follow_the_positions_inside_each_sequence() -> None:
    rotary = PackedRotaryEmbedding(
        kv_channels=4, rotary_percent=1.0, rotary_base=100, use_cpu_initialization=True
    )
    positions_T = rotary.get_rotary_seq_len(None, None, None, None, _packed([3, 2]))
    angles = rotary(positions_T, packed_seq=False, cp_group=None)
    assert angles.shape == (5, 1, 1, 4)
    # Frequencies 1 and 1 / sqrt(100), repeated for the two halves of a head.
    expected = torch.outer(torch.tensor([0.0, 1, 2, 0, 1]), torch.tensor([1.0, 0.1, 1.0, 0.1]))
    torch.testing.assert_close(angles[:, 0, 0], expected)
    with pytest.raises(ValueError, match="packed streams only"):
        rotary.get_rotary_seq_len(None, None, None, None, None)
