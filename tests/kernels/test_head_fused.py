"""``head_logprobs(fused=True)``: the same logprobs from the product that stores no logits."""

import pytest
import torch
from prefixrl_kernels import head_logprobs
from torch import Tensor

from tests.support.head_cases import DEVICE

TOLERANCE = 2e-5
"""Nats; two orders of summation in float32, logits below 10."""

VOCAB = 40


def _operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(12, 16, generator=generator).to(DEVICE)
    return hidden_TH, torch.randn(48, 16, generator=generator).to(DEVICE)


def test_it_takes_rows_and_padding_as_the_chunked_path_does() -> None:
    hidden_TH, weight_VH = _operands()
    rows_R, targets_R = [3, 4, 4, 11], torch.tensor([0, 7, VOCAB - 1, 20], device=DEVICE)
    chunked, fused = (
        head_logprobs(
            hidden_TH,
            weight_VH,
            targets_R,
            rows_R=rows_R,
            true_vocab_size=VOCAB,
            temperature=0.7,
            fused=is_fused,
        )
        for is_fused in (False, True)
    )
    for mine, expected in zip(fused, chunked, strict=True):
        torch.testing.assert_close(mine, expected, atol=TOLERANCE, rtol=0)
    assert fused[0][1] != fused[0][2]  # one hidden row, two targets


def test_it_is_refused_where_a_gradient_is_wanted() -> None:
    hidden_TH, weight_VH = _operands()
    targets_R = torch.zeros(12, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="fused=True has no backward pass"):
        head_logprobs(
            hidden_TH, weight_VH.requires_grad_(), targets_R, true_vocab_size=VOCAB, fused=True
        )
