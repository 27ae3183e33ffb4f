"""The plain PyTorch head against ``log_softmax`` on the full logits."""

import pytest
import torch
from prefixrl_kernels.head import head_logprobs
from torch import Tensor

TOLERANCE = 2e-6
"""float32: another order of summation, values below 10."""


def _case(num_rows: int = 7, vocab: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_RH = torch.randn(num_rows, 5, generator=generator).requires_grad_()
    weight_VH = torch.randn(vocab, 5, generator=generator).requires_grad_()
    targets_R = torch.randint(0, 9, (num_rows,), generator=generator)
    return hidden_RH, weight_VH, targets_R


def _plain(
    hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs_RV = torch.log_softmax(hidden_RH @ weight_VH.T / temperature, dim=-1)
    entropies_R = -(logprobs_RV.exp() * logprobs_RV).sum(-1)
    return logprobs_RV.gather(1, targets_R[:, None])[:, 0], entropies_R


def test_a_row_worked_by_hand() -> None:
    # logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    hidden_RH = torch.tensor([[1.0]])
    weight_VH = torch.tensor([[1.0], [2.0], [5.0]]).log()
    logprobs_R, entropies_R = head_logprobs(
        hidden_RH, weight_VH, torch.tensor([1]), true_vocab_size=3
    )
    assert logprobs_R.item() == pytest.approx(-1.386294, abs=1e-6)
    assert entropies_R.item() == pytest.approx(
        (2.079442 + 2 * 1.386294 + 5 * 0.470004) / 8, abs=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 7])
def test_values_and_gradients_equal_plain_log_softmax(
    chunk_rows: int | None, temperature: float
) -> None:
    hidden_RH, weight_VH, targets_R = _case()
    outputs = head_logprobs(
        hidden_RH,
        weight_VH,
        targets_R,
        temperature=temperature,
        true_vocab_size=11,
        chunk_rows=chunk_rows,
    )
    expected = _plain(hidden_RH, weight_VH, targets_R, temperature)
    for mine, plain in zip(outputs, expected, strict=True):
        torch.testing.assert_close(mine, plain, atol=TOLERANCE, rtol=0)
    coefficients = torch.linspace(-1.0, 1.0, 14).reshape(2, 7)
    grads = torch.autograd.grad((torch.stack(outputs) * coefficients).sum(), (hidden_RH, weight_VH))
    plain_grads = torch.autograd.grad(
        (torch.stack(expected) * coefficients).sum(), (hidden_RH, weight_VH)
    )
    for mine, plain in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(mine, plain, atol=5 * TOLERANCE, rtol=0)


def test_padding_columns_change_nothing_and_get_no_gradient() -> None:
    hidden_RH, weight_VH, targets_R = _case()
    padded_VH = weight_VH.detach().clone()
    padded_VH[9:] = 1e4  # would swallow all probability
    padded_VH.requires_grad_()
    mine = head_logprobs(hidden_RH, padded_VH, targets_R, true_vocab_size=9)
    plain = _plain(hidden_RH, padded_VH[:9], targets_R, 1.0)
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)
    (grad_VH,) = torch.autograd.grad(torch.stack(mine).sum(), (padded_VH,))
    assert grad_VH[9:].abs().max() == 0.0
    assert grad_VH[:9].abs().max() > 0.1


def test_no_rows_give_no_logprobs_and_zero_gradients() -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=0)
    logprobs_R, entropies_R = head_logprobs(hidden_RH, weight_VH, targets_R, true_vocab_size=11)
    assert logprobs_R.shape == entropies_R.shape == (0,)
    grads = torch.autograd.grad(logprobs_R.sum() + entropies_R.sum(), (hidden_RH, weight_VH))
    assert [float(grad.abs().sum()) for grad in grads] == [0.0, 0.0]


def test_large_logits_do_not_overflow() -> None:
    hidden_RH = torch.tensor([[200.0]])
    weight_VH = torch.tensor([[1.0], [-1.0]])
    logprobs_R, entropies_R = head_logprobs(
        hidden_RH, weight_VH, torch.tensor([1]), true_vocab_size=2
    )
    assert logprobs_R.item() == -400.0
    assert entropies_R.item() == 0.0


def test_bfloat16_inputs_give_float32_results_and_bfloat16_gradients() -> None:
    hidden_RH, weight_VH, targets_R = _case()
    hidden_RH, weight_VH = (t.detach().bfloat16().requires_grad_() for t in (hidden_RH, weight_VH))
    logprobs_R, _ = head_logprobs(hidden_RH, weight_VH, targets_R, true_vocab_size=11)
    assert logprobs_R.dtype == torch.float32
    plain_R, _ = _plain(hidden_RH.float(), weight_VH.float(), targets_R, 1.0)
    torch.testing.assert_close(logprobs_R, plain_R, atol=0.05, rtol=0)  # bfloat16 logits
    logprobs_R.sum().backward()
    assert weight_VH.grad is not None
    assert weight_VH.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"temperature": 0.0}, "temperature must be positive", id="temperature"),
        pytest.param({"chunk_rows": 0}, "chunk_rows must be at least 1", id="chunk"),
        pytest.param({"true_vocab_size": 0}, "true_vocab_size must be at least 1", id="vocab"),
        pytest.param({"targets_R": torch.zeros(7)}, r"targets \[7\] int64", id="targets"),
        pytest.param({"hidden_RH": torch.zeros(7, 4)}, r"hidden \[R, H\]", id="width"),
        pytest.param({"hidden_RH": torch.zeros(7, 5).half()}, "one floating dtype", id="dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    hidden_RH, weight_VH, targets_R = _case()
    arguments: dict[str, object] = {
        "hidden_RH": hidden_RH,
        "weight_VH": weight_VH,
        "targets_R": targets_R,
        "true_vocab_size": 11,
    }
    with pytest.raises(ValueError, match=message):
        head_logprobs(**{**arguments, **change})
