"""What all modes share: one answer, one rounding, no side effects; and what autograd is given."""

from collections.abc import Callable
from dataclasses import asdict, fields, replace

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
    case_of_logits,
    make_case,
    row_tolerance,
    run_head,
    run_oracle,
)
from tests.support.head_oracle import (
    OracleLoss,
    OracleRows,
    assert_bitwise,
    assert_close,
    assert_relative_norm,
    oracle_logprobs,
)

LOSS = OracleLoss(importance="cispo", kl="k2", kl_coefficient=0.1, entropy_coefficient=0.2)


def _loss_of(case: HeadCase, kernels: RowKernels, **changes: object) -> Tensor:
    arguments: dict[str, object] = {
        "hidden_TH": case.hidden_TH,
        "weight_VH": case.weight_VH,
        "targets_R": case.targets_R,
        "rows_R": case.rows_R,
        "advantages_R": case.loss_rows.advantages,
        "num_global_loss_tokens": case.num_rows,
        "true_vocab_size": case.true_vocab_size,
        "backend": kernels,
        **changes,
    }
    return reinforce_head(**arguments)[0]  # pyright: ignore[reportArgumentType]  # by name


def test_modes_agree_and_their_statistics_are_the_same_bits(kernels: RowKernels) -> None:
    case = make_case(rows_R=(0, 3, 3, 5, 1, 3, 4), num_hidden_rows=6, vocab=19)
    first, *others = (
        run_head(case, kernels, mode, LOSS, plan_rows=(4, 2)) for mode in TRAINING_MODES
    )  # in equal blocks: a product of one row may add up in another order than one of two
    with torch.no_grad():
        loss = _loss_of(
            case,
            kernels,
            rollout_logprobs_R=case.loss_rows.rollout_logprobs,
            reference_logprobs_R=case.loss_rows.reference_logprobs,
            weights_R=case.loss_rows.weights,
            num_global_loss_tokens=case.loss_rows.num_global_loss_tokens,
            **asdict(LOSS),
        )
    assert_close("no grad", loss, first.loss, atol=1e-6)
    assert not loss.requires_grad
    for other in others:
        assert_bitwise("loss", first.loss, other.loss)
        for name, values_R in first.statistics.items():
            assert_bitwise(name, values_R, other.statistics[name])
        assert_relative_norm("hidden", other.grad_hidden_TH, first.grad_hidden_TH, 1e-6)
        assert_relative_norm("weight", other.grad_weight_VH, first.grad_weight_VH, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_equal_inputs_give_equal_bits(kernels: RowKernels, mode: Mode, dtype: torch.dtype) -> None:
    case = make_case(rows_R=(2, 0, 2, 1, 2), num_hidden_rows=3, vocab=19, dtype=dtype)
    one, other = (run_head(case, kernels, mode, LOSS, plan_rows=(2, 1)) for _ in range(2))
    assert_bitwise("loss", one.loss, other.loss)
    assert_bitwise("hidden", one.grad_hidden_TH, other.grad_hidden_TH)
    assert_bitwise("weight", one.grad_weight_VH, other.grad_weight_VH)
    for name, values_R in one.statistics.items():
        assert_bitwise(name, values_R, other.statistics[name])


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("exponent", [-20, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_scale_of_a_power_of_two_scales_the_gradients_exactly(
    kernels: RowKernels, mode: Mode, exponent: int, dtype: torch.dtype
) -> None:
    case = make_case(num_rows=5, vocab=19, dtype=dtype)
    plain = run_head(case, kernels, mode, LOSS, plan_rows=(3, 2))
    scaled = run_head(case, kernels, mode, LOSS, plan_rows=(3, 2), upstream=2.0**exponent)
    assert_bitwise("hidden", plain.grad_hidden_TH * 2.0**exponent, scaled.grad_hidden_TH)
    assert_bitwise("weight", plain.grad_weight_VH * 2.0**exponent, scaled.grad_weight_VH)


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_any_upstream_scales_both_gradients(kernels: RowKernels, mode: Mode) -> None:
    case = make_case(num_rows=5, vocab=19)
    plain = run_head(case, kernels, mode, LOSS, plan_rows=(3, 2))
    scaled = run_head(case, kernels, mode, LOSS, plan_rows=(3, 2), upstream=-0.37)
    assert_relative_norm("hidden", scaled.grad_hidden_TH, plain.grad_hidden_TH * -0.37, 1e-6)
    assert_relative_norm("weight", scaled.grad_weight_VH, plain.grad_weight_VH * -0.37, 1e-6)


def test_a_gradient_per_row_reaches_its_own_row(kernels: RowKernels) -> None:
    # Scaling every row by the first row's gradient is a bug that a published kernel had.
    case = make_case(num_rows=6, vocab=19)
    hidden_TH, weight_VH = case.hidden_TH.requires_grad_(), case.weight_VH.requires_grad_()
    upstream_R = torch.arange(1.0, 7.0)
    logprobs_R, entropies_R = head_logprobs(
        hidden_TH, weight_VH, case.targets_R, true_vocab_size=19, backend=kernels
    )
    entropy_upstream_R = torch.ones(1, device=DEVICE).expand(6)  # stride 0
    ours = torch.autograd.grad(
        (logprobs_R, entropies_R),
        (hidden_TH, weight_VH),
        (upstream_R.to(DEVICE), entropy_upstream_R),
    )
    wide = (
        hidden_TH.detach().cpu().double().requires_grad_(),
        weight_VH.detach().cpu().double().requires_grad_(),
    )
    expected = torch.autograd.grad(
        oracle_logprobs(*wide, case.targets_R.cpu(), true_vocab_size=19),
        wide,
        (upstream_R.double(), torch.ones(6, dtype=torch.float64)),
    )
    for name, mine, theirs in zip(("hidden", "weight"), ours, expected, strict=True):
        assert_relative_norm(name, mine, theirs, 1e-5)


def test_the_loss_is_a_scalar_and_statistics_carry_no_gradient(kernels: RowKernels) -> None:
    case = make_case(num_rows=3, vocab=19)
    loss, statistics = reinforce_head(
        case.hidden_TH.requires_grad_(),
        case.weight_VH,
        case.targets_R,
        None,
        case.loss_rows.advantages,
        num_global_loss_tokens=3,
        true_vocab_size=19,
        backend=kernels,
    )
    assert loss.shape == ()
    assert loss.requires_grad
    for name in run_oracle(case).statistics:
        values_R = getattr(statistics, name)
        assert not values_R.requires_grad, name
        assert values_R.shape == (3,), name
        assert values_R.dtype == (torch.bool if name.startswith("is_") else torch.float32), name
    with pytest.raises(RuntimeError, match="does not require grad"):
        statistics.logprobs_R.sum().backward()
    with pytest.raises(RuntimeError, match=r"[Mm]ismatch in shape"):
        loss.backward(torch.ones(3, device=DEVICE))


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_a_second_backward_pass_is_refused(kernels: RowKernels, mode: Mode) -> None:
    case = make_case(num_rows=3, vocab=19)
    case.weight_VH.requires_grad_()
    loss = _loss_of(case, kernels, hidden_TH=case.hidden_TH.requires_grad_(), mode=mode)
    loss.backward()
    with pytest.raises(
        RuntimeError, match=r"backward through the graph a second time|second backward pass"
    ):
        loss.backward()


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_a_retained_graph_gives_the_same_gradient_or_refuses(
    kernels: RowKernels, mode: Mode
) -> None:
    case = make_case(num_rows=3, vocab=19)
    leaves = case.hidden_TH.requires_grad_(), case.weight_VH.requires_grad_()
    loss = _loss_of(case, kernels, mode=mode) * 0.5
    first = [grad.clone() for grad in torch.autograd.grad(loss, leaves, retain_graph=True)]
    if mode == "grad_in_forward":
        with pytest.raises(RuntimeError, match=r"given away|modified by an inplace operation"):
            torch.autograd.grad(loss, leaves)
        return
    second = torch.autograd.grad(loss, leaves)
    for name, one, other in zip(("hidden", "weight"), first, second, strict=True):
        assert_bitwise(name, one, other)


def test_a_second_derivative_is_refused(kernels: RowKernels) -> None:
    case = make_case(num_rows=3, vocab=19)
    hidden_TH = case.hidden_TH.requires_grad_()
    for output in (
        _loss_of(case, kernels, mode="recompute"),
        head_logprobs(
            hidden_TH, case.weight_VH, case.targets_R, true_vocab_size=19, backend=kernels
        )[0].sum(),
    ):
        scale = torch.ones((), device=DEVICE, requires_grad=True)
        (grad_TH,) = torch.autograd.grad(output * scale, hidden_TH, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad_TH.sum().backward()


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_left_as_they_were(kernels: RowKernels, mode: Mode, dtype: torch.dtype) -> None:
    case = make_case(num_rows=5, vocab=19, dtype=dtype)
    given = {field.name: getattr(case.loss_rows, field.name) for field in fields(OracleRows)}
    inputs: dict[str, Tensor] = {
        "hidden": case.hidden_TH,
        "weight": case.weight_VH,
        "targets": case.targets_R,
        **{name: value for name, value in given.items() if isinstance(value, Tensor)},
    }
    before = {name: values.clone() for name, values in inputs.items()}
    assert len(before) == 7
    run_head(case, kernels, mode, LOSS, plan_rows=(3, 2), upstream=3.0)
    for name, values in before.items():
        assert_bitwise(name, values, inputs[name])


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_a_gradient_that_is_not_needed_is_not_made(
    kernels: RowKernels, mode: Mode, needed: str
) -> None:
    case = make_case(num_rows=5, vocab=19)
    both = run_head(case, kernels, mode, plan_rows=None)
    leaf = case.hidden_TH if needed == "hidden" else case.weight_VH
    leaf.requires_grad_()
    rows = case.loss_rows
    loss = _loss_of(
        case,
        kernels,
        mode=mode,
        weights_R=rows.weights,
        num_global_loss_tokens=rows.num_global_loss_tokens,
    )
    loss.backward()
    assert leaf.grad is not None
    expected = both.grad_hidden_TH if needed == "hidden" else both.grad_weight_VH
    assert_bitwise(needed, leaf.grad, expected)
    logprobs_R, entropies_R = head_logprobs(
        case.hidden_TH, case.weight_VH, case.targets_R, true_vocab_size=19, backend=kernels
    )
    (grad,) = torch.autograd.grad((logprobs_R + entropies_R).sum(), leaf)
    assert grad.abs().max() > 0.0


def _strided(values: Tensor) -> Tensor:
    wide = values.new_full((values.size(0), 2 * values.size(1) + 1), float("nan"))
    wide[:, 1::2] = values
    return wide[:, 1::2]


def _offset(values: Tensor) -> Tensor:
    buffer = values.new_full((values.numel() + 3,), float("nan"))
    buffer[3:] = values.flatten()
    return buffer[3:].view(values.shape)


def _column_major(values: Tensor) -> Tensor:
    return values.T.contiguous().T


@pytest.mark.parametrize("rows_R", [None, (5, 0, 5, 2)])
@pytest.mark.parametrize("change", [_strided, _offset, _column_major])
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_any_strides_and_offsets_will_do(
    kernels: RowKernels, mode: Mode, change: Callable[[Tensor], Tensor], rows_R: tuple | None
) -> None:
    case = make_case(num_rows=6, rows_R=rows_R, num_hidden_rows=6, vocab=19)
    laid_out = replace(case, hidden_TH=change(case.hidden_TH), weight_VH=change(case.weight_VH))
    result = run_head(laid_out, kernels, mode, LOSS, plan_rows=(3, 2))
    assert_matches(result, run_oracle(case, LOSS), row_tolerance=row_tolerance(case))


def test_hidden_states_of_a_transposed_batch(kernels: RowKernels) -> None:
    case = make_case(num_rows=6, vocab=19)
    hidden_SBH = case.hidden_TH.reshape(2, 3, 5).transpose(0, 1)  # [S, B, H], as Megatron has it
    leaf_SBH = hidden_SBH.detach().requires_grad_()
    assert not leaf_SBH.is_contiguous()
    loss = _loss_of(case, kernels, hidden_TH=leaf_SBH.transpose(0, 1).flatten(0, 1))
    loss.backward()
    assert leaf_SBH.grad is not None
    rows = replace(case.loss_rows, weights=None, num_global_loss_tokens=6.0)
    expected = run_oracle(replace(case, loss_rows=rows))
    got_TH = leaf_SBH.grad.transpose(0, 1).flatten(0, 1)
    assert_relative_norm("hidden", got_TH, expected.grad_hidden_TH, 1e-5)


def test_permuted_rows_give_permuted_outputs(kernels: RowKernels) -> None:
    # A unit weight makes the products exact, so what is left is the row kernels' own work.
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(7, 19, generator=generator) * 3.0
    case = case_of_logits(logits_RV, [3, 1, 4, 1, 5, 9, 2], [1.0, -1.0, 2.0, 0.5, 1.5, -2.0, 3.0])
    order = [4, 2, 6, 0, 5, 1, 3]
    permuted = case_of_logits(
        logits_RV[order],
        case.targets_R[order].tolist(),
        case.loss_rows.advantages[order].tolist(),
    )
    one = run_head(case, kernels, "recompute", OracleLoss(entropy_coefficient=0.1))
    other = run_head(permuted, kernels, "recompute", OracleLoss(entropy_coefficient=0.1))
    for name, values_R in one.statistics.items():
        assert_bitwise(name, values_R[order], other.statistics[name])
    assert_bitwise("hidden", one.grad_hidden_TH[order], other.grad_hidden_TH)
    assert_close("loss", one.loss, other.loss, atol=1e-5)
    assert_relative_norm("weight", one.grad_weight_VH, other.grad_weight_VH, 1e-6)


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_a_repeated_row_gets_the_sum_of_its_uses(kernels: RowKernels, mode: Mode) -> None:
    case = make_case(rows_R=(1, 0, 1, 1), num_hidden_rows=2, vocab=19)
    repeated = run_head(case, kernels, mode, LOSS, plan_rows=(3, 2))
    copied = replace(case, hidden_TH=case.hidden_TH[[1, 0, 1, 1]], rows_R=None)
    separate = run_head(copied, kernels, mode, LOSS, plan_rows=(3, 2))
    grads_TH = separate.grad_hidden_TH
    expected_TH = torch.stack((grads_TH[1], grads_TH[0] + grads_TH[2] + grads_TH[3]))
    assert_bitwise("hidden", repeated.grad_hidden_TH, expected_TH)
    assert_bitwise("weight", repeated.grad_weight_VH, separate.grad_weight_VH)


@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_chunks_change_nothing_but_the_order_of_additions(mode: Mode) -> None:
    case = make_case(num_rows=300, vocab=83)
    whole = run_head(case, TorchRows(), mode, LOSS)
    for plan_rows in ((128, 128), (7, 7), (64, 5)):
        parts = run_head(case, TorchRows(), mode, LOSS, plan_rows=plan_rows)
        for name, values_R in whole.statistics.items():
            if not name.startswith("is_"):
                assert_close(name, parts.statistics[name], values_R, atol=2e-5, rtol=2e-5)
        assert_relative_norm("hidden", parts.grad_hidden_TH, whole.grad_hidden_TH, 2e-6)
        assert_relative_norm("weight", parts.grad_weight_VH, whole.grad_weight_VH, 2e-6)


def test_the_backend_follows_device_and_dtype(device: torch.device) -> None:
    case = make_case(num_rows=3, vocab=19, dtype=torch.float64)
    with pytest.raises(ValueError, match="Triton kernels compute in float32"):
        _loss_of(case, "triton")  # pyright: ignore[reportArgumentType]  # a name is a backend too
    auto = _loss_of(case, "auto")  # pyright: ignore[reportArgumentType]
    assert auto.dtype == torch.float64  # PyTorch everywhere
    single = make_case(num_rows=3, vocab=19)
    name = "triton" if device.type == "cuda" else "torch"
    assert_bitwise("auto", *(_loss_of(single, backend) for backend in ("auto", name)))  # pyright: ignore[reportArgumentType]
