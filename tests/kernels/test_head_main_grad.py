"""The weight's gradient in Megatron's ``main_grad``: protocol, promise, float32 accumulation."""

from dataclasses import replace

import pytest
import torch
from prefixrl_kernels import head_logprobs, reinforce_head
from prefixrl_kernels.head.reference import TorchRows
from prefixrl_kernels.head.row_kernels import RowKernels
from prefixrl_kernels.head_plan import Mode
from torch import Tensor

from tests.support.head_cases import (
    DEVICE,
    TRAINING_MODES,
    HeadCase,
    assert_matches,
    make_case,
    row_tolerance,
    run_head,
    run_oracle,
)
from tests.support.head_oracle import OracleLoss, assert_bitwise, assert_relative_norm

LOSS = OracleLoss(importance="truncated", kl="k1", kl_coefficient=0.1, entropy_coefficient=0.2)

PROMISES = [pytest.param(None, id="no-promise"), pytest.param(0.25, id="promise")]


def _with_main_grad(case: HeadCase, *, content: float = 0.0) -> tuple[HeadCase, Tensor]:
    """Return the case with a leaf weight that has a ``main_grad``, and that buffer."""
    weight_VH = case.weight_VH.detach().clone().requires_grad_()
    main_grad_VH = torch.full(weight_VH.shape, content, device=DEVICE)
    weight_VH.main_grad = main_grad_VH  # pyright: ignore[reportAttributeAccessIssue]  # Megatron's
    return replace(case, weight_VH=weight_VH), main_grad_VH


@pytest.mark.parametrize("promised", PROMISES)
@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("rows_R", [(0, 3, 3, 1, 2), ()])
def test_the_gradient_is_added_to_main_grad_and_to_nothing_else(
    kernels: RowKernels, mode: Mode, promised: float | None, rows_R: tuple[int, ...]
) -> None:
    plain = make_case(rows_R=rows_R, num_hidden_rows=4, vocab=80, true_vocab_size=19)
    case, main_grad_VH = _with_main_grad(plain, content=0.5)
    result = run_head(
        case,
        kernels,
        mode,
        LOSS,
        plan_rows=(3, 2),
        upstream=0.25,
        weight_grad="main_grad",
        promised_upstream=promised,
    )
    assert result.grad_weight_VH.shape == ()  # autograd was given nothing
    expected = run_oracle(plain, LOSS)
    got = replace(
        result,
        grad_hidden_TH=result.grad_hidden_TH * 4.0,
        grad_weight_VH=(main_grad_VH - 0.5) * 4.0,
    )
    assert_matches(got, expected, row_tolerance=row_tolerance(plain), gradient_tolerance=2e-5)
    assert bool((main_grad_VH[19:] == 0.5).all())


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_modes_agree_on_main_grad(kernels: RowKernels, mode: Mode) -> None:
    plain = make_case(num_rows=5, vocab=19)
    reference = run_head(plain, kernels, "recompute", LOSS)
    for promised in (None, 1.0):
        case, main_grad_VH = _with_main_grad(plain)
        result = run_head(
            case, kernels, mode, LOSS, weight_grad="main_grad", promised_upstream=promised
        )
        assert_relative_norm("hidden", result.grad_hidden_TH, reference.grad_hidden_TH, 1e-6)
        assert_relative_norm("main_grad", main_grad_VH, reference.grad_weight_VH, 1e-6)


def _backward(case: HeadCase, hidden_TH: Tensor, mode: Mode, **options: object) -> None:
    loss, _ = reinforce_head(
        hidden_TH,
        case.weight_VH,
        case.targets_R,
        None,
        case.loss_rows.advantages,
        num_global_loss_tokens=case.num_rows,
        true_vocab_size=case.true_vocab_size,
        mode=mode,
        weight_grad="main_grad",
        backend="torch",
        **options,  # pyright: ignore[reportArgumentType]  # by name
    )
    loss.backward()


@pytest.mark.parametrize("promised", [None, 1.0])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_megatron_is_told_that_the_gradient_is_in_place(mode: Mode, promised: float | None) -> None:
    plain = make_case(num_rows=4, vocab=19, has_all_inputs=False)
    expected = run_oracle(
        replace(plain, loss_rows=replace(plain.loss_rows, num_global_loss_tokens=4.0))
    )
    case, main_grad_VH = _with_main_grad(plain)
    weight_VH = case.weight_VH
    calls: list[bool] = []
    weight_VH.grad_added_to_main_grad = False  # pyright: ignore[reportAttributeAccessIssue]
    # Megatron's hook reads the flag when autograd has delivered the (dummy) gradient.
    weight_VH.register_post_accumulate_grad_hook(
        lambda weight: calls.append(weight.grad_added_to_main_grad)  # pyright: ignore[reportAttributeAccessIssue]
    )
    _backward(case, case.hidden_TH.requires_grad_(), mode, promised_upstream=promised)
    assert calls == [True]
    assert weight_VH.grad is not None
    assert weight_VH.grad.shape == weight_VH.shape
    assert weight_VH.grad.dtype == weight_VH.dtype
    assert_relative_norm("main_grad", main_grad_VH, expected.grad_weight_VH, 1e-5)


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_a_tied_embedding_gets_its_own_share_through_autograd(mode: Mode) -> None:
    plain = make_case(num_rows=4, vocab=19, has_all_inputs=False)
    case, main_grad_VH = _with_main_grad(plain)
    weight_VH = case.weight_VH
    weight_VH.grad_added_to_main_grad = False  # pyright: ignore[reportAttributeAccessIssue]
    weight_VH.zero_out_wgrad = True  # pyright: ignore[reportAttributeAccessIssue]
    tokens_T = torch.tensor([2, 5, 2, 7], device=DEVICE)
    _backward(case, torch.nn.functional.embedding(tokens_T, weight_VH), mode)

    wide_VH = plain.weight_VH.double().cpu()
    embedded_TH = wide_VH[tokens_T.cpu()].requires_grad_()
    untied_VH = wide_VH.requires_grad_()
    logprobs_R = torch.log_softmax(embedded_TH @ untied_VH.T, -1).gather(
        1, plain.targets_R.cpu()[:, None]
    )[:, 0]
    loss = -(plain.loss_rows.advantages.cpu().double() * logprobs_R).sum() / 4
    grad_TH, grad_VH = torch.autograd.grad(loss, (embedded_TH, untied_VH))
    share_VH = torch.zeros_like(untied_VH).index_add_(0, tokens_T.cpu(), grad_TH)
    assert_relative_norm("main_grad", main_grad_VH, grad_VH, 1e-5)
    assert weight_VH.grad is not None
    assert_relative_norm("embedding", weight_VH.grad, share_VH, 1e-5)


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_only_the_mode_that_relies_on_a_promise_notices_when_it_is_broken(mode: Mode) -> None:
    plain = make_case(num_rows=4, vocab=19)
    for upstream, is_kept in ((0.5, True), (0.25, False)):
        case, main_grad_VH = _with_main_grad(plain)
        result = run_head(
            case,
            TorchRows(),
            mode,
            upstream=upstream,
            weight_grad="main_grad",
            promised_upstream=0.5,
        )
        expected = run_head(plain, TorchRows(), mode, upstream=upstream)
        if is_kept or mode != "grad_in_forward":
            assert_relative_norm("hidden", result.grad_hidden_TH, expected.grad_hidden_TH, 1e-6)
            assert_relative_norm("weight", main_grad_VH, expected.grad_weight_VH, 1e-6)
        else:
            assert result.grad_hidden_TH.isnan().all()


def test_a_promise_puts_the_gradient_in_place_in_the_forward_pass() -> None:
    case, main_grad_VH = _with_main_grad(make_case(num_rows=4, vocab=19))
    hidden_TH = case.hidden_TH.requires_grad_()
    arguments = (hidden_TH, case.weight_VH, case.targets_R, None, case.loss_rows.advantages)
    options = {
        "num_global_loss_tokens": 4,
        "true_vocab_size": 19,
        "mode": "grad_in_forward",
        "weight_grad": "main_grad",
        "promised_upstream": 1.0,
    }
    with torch.no_grad():
        reinforce_head(*arguments, **options)  # pyright: ignore[reportArgumentType]
        assert not main_grad_VH.any()
    loss, _ = reinforce_head(*arguments, **options)  # pyright: ignore[reportArgumentType]
    before_VH = main_grad_VH.clone()
    assert before_VH.any()
    loss.backward()
    assert_bitwise("main_grad", main_grad_VH, before_VH)


def test_without_a_hidden_gradient_to_spoil_a_promise_is_not_relied_on() -> None:
    case, main_grad_VH = _with_main_grad(make_case(num_rows=4, vocab=19, has_all_inputs=False))
    loss, _ = reinforce_head(
        case.hidden_TH,
        case.weight_VH,
        case.targets_R,
        None,
        case.loss_rows.advantages,
        num_global_loss_tokens=case.loss_rows.num_global_loss_tokens,
        true_vocab_size=19,
        mode="grad_in_forward",
        weight_grad="main_grad",
        promised_upstream=1.0,
    )
    assert not main_grad_VH.any()
    (loss * 0.5).backward()  # the promise is broken, and nothing relied on it
    expected = run_oracle(case)
    assert_relative_norm("main_grad", main_grad_VH, expected.grad_weight_VH * 0.5, 1e-5)


def test_head_logprobs_adds_to_main_grad(kernels: RowKernels) -> None:
    plain = make_case(num_rows=4, vocab=19)
    case, main_grad_VH = _with_main_grad(plain, content=1.0)
    sums = []
    for weight_VH, weight_grad in ((case.weight_VH, "main_grad"), (plain.weight_VH, "autograd")):
        logprobs_R, _ = head_logprobs(
            plain.hidden_TH,
            weight_VH.requires_grad_(),
            plain.targets_R,
            true_vocab_size=19,
            weight_grad=weight_grad,  # pyright: ignore[reportArgumentType]  # literals in a loop
            backend=kernels,
        )
        logprobs_R.sum().backward()
        sums.append(weight_VH.grad)
    assert sums[0] is None
    assert_relative_norm("main_grad", main_grad_VH - 1.0, sums[1], 1e-5)


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_64_microbatches_add_up_in_float32(mode: Mode) -> None:
    # bfloat16 operands: each gradient is a product that is exact but for the rounding of the
    # gradient of the logits, and that rounding does not grow with the number of summands. A sum in
    # bfloat16 loses a summand that is 1/256 of it, and grows worse with each.
    first = make_case(num_rows=8, vocab=19, hidden_size=16, dtype=torch.bfloat16)
    main_case, main_grad_VH = _with_main_grad(first)
    exact_VH = torch.zeros(first.weight_VH.shape, dtype=torch.float64)
    rounded_VH = torch.zeros_like(first.weight_VH)
    errors = []
    for seed in range(64):
        batch = make_case(
            num_rows=8,
            vocab=19,
            hidden_size=16,
            dtype=torch.bfloat16,
            seed=seed,
            has_all_inputs=False,
        )
        batch = replace(batch, weight_VH=first.weight_VH)
        grad_VH = run_oracle(batch).grad_weight_VH
        exact_VH += grad_VH
        rounded_VH += grad_VH.to(DEVICE, torch.bfloat16)
        run_head(
            replace(batch, weight_VH=main_case.weight_VH),
            TorchRows(),
            mode,
            plan_rows=(3, 2),
            weight_grad="main_grad",
            promised_upstream=1.0,
        )
        errors.append(float((main_grad_VH.double().cpu() - exact_VH).norm() / exact_VH.norm()))
    assert max(errors) < 3e-3
    assert errors[-1] < 1.5 * errors[0]
    in_bfloat16 = float((rounded_VH.double().cpu() - exact_VH).norm() / exact_VH.norm())
    assert errors[-1] < 0.5 * in_bfloat16
