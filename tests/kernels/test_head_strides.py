"""Per-row inputs of any strides; and gradients made in the forward pass are given only once."""

from typing import Any

import pytest
import torch
from prefixrl_kernels import reinforce_head
from prefixrl_kernels.head.row_kernels import RowKernels
from torch import Tensor

from tests.support.head_cases import DEVICE

ROWS, HIDDEN, VOCAB = 6, 8, 19


def _operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_RH = torch.randn(ROWS, HIDDEN, generator=generator).to(DEVICE).requires_grad_()
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator).to(DEVICE).requires_grad_()
    return hidden_RH, weight_VH


def _loss(kernels: RowKernels, row_inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    hidden_RH, weight_VH = _operands()
    inputs = dict(row_inputs)
    targets_R, advantages_R = inputs.pop("targets_R"), inputs.pop("advantages_R")
    options: dict[str, Any] = {"importance": "truncated", "kl": "k3", "kl_coefficient": 0.1}
    loss, _ = reinforce_head(
        hidden_RH,
        weight_VH,
        targets_R,
        None,
        advantages_R,
        true_vocab_size=VOCAB,
        backend=kernels,
        **inputs,
        **options,
    )
    loss.backward()
    assert hidden_RH.grad is not None
    return loss.detach(), hidden_RH.grad


def test_columns_of_a_matrix_are_read_as_columns(kernels: RowKernels) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix_R4 = torch.randn(ROWS, 4, generator=generator).to(DEVICE)
    ids_R3 = torch.randint(0, VOCAB, (ROWS, 3), generator=generator).to(DEVICE)
    names = ("advantages_R", "weights_R", "rollout_logprobs_R", "reference_logprobs_R")
    columns = {name: matrix_R4[:, index] for index, name in enumerate(names)}
    columns["targets_R"] = ids_R3[:, 1]
    assert not any(column.is_contiguous() for column in columns.values())
    packed = {name: column.clone() for name, column in columns.items()}
    for mine, expected in zip(_loss(kernels, columns), _loss(kernels, packed), strict=True):
        assert torch.equal(mine, expected)


def test_one_value_for_all_rows_may_be_expanded(kernels: RowKernels) -> None:
    one = torch.tensor(0.5, device=DEVICE)
    targets_R = torch.arange(ROWS, device=DEVICE)
    logprobs_R = torch.full((ROWS,), -3.0, device=DEVICE)
    others = {
        "targets_R": targets_R,
        "rollout_logprobs_R": logprobs_R,
        "reference_logprobs_R": logprobs_R,
        "weights_R": torch.ones(ROWS, device=DEVICE),
    }
    expanded = _loss(kernels, {"advantages_R": one.expand(ROWS), **others})
    filled = _loss(kernels, {"advantages_R": torch.full((ROWS,), 0.5, device=DEVICE), **others})
    for mine, expected in zip(expanded, filled, strict=True):
        assert torch.equal(mine, expected)


def _retained_twice(mode: Any, **options: Any) -> tuple[Tensor, Tensor]:
    hidden_RH, weight_VH = _operands()
    weight_VH.main_grad = torch.zeros_like(weight_VH)  # pyright: ignore[reportAttributeAccessIssue]
    loss, _ = reinforce_head(
        hidden_RH,
        weight_VH,
        torch.arange(ROWS, device=DEVICE),
        [0, 1, 2, 3, 4, 4],
        torch.ones(ROWS, device=DEVICE),
        true_vocab_size=VOCAB,
        num_global_loss_tokens=ROWS,
        mode=mode,
        **options,
    )
    loss.backward(retain_graph=True)
    assert hidden_RH.grad is not None
    once_RH = hidden_RH.grad.clone()
    loss.backward()
    return once_RH, hidden_RH.grad


@pytest.mark.parametrize("mode", ["save_dlogits", "recompute"])
def test_a_retained_graph_gives_the_gradient_again(mode: str) -> None:
    once_RH, twice_RH = _retained_twice(mode)
    torch.testing.assert_close(twice_RH, 2.0 * once_RH, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("promise", [None, 1.0])
def test_gradients_made_in_the_forward_pass_are_given_once(promise: float | None) -> None:
    options = {"weight_grad": "main_grad", "promised_upstream": promise}
    with pytest.raises(RuntimeError, match="second backward pass"):
        _retained_twice("grad_in_forward", **options)
