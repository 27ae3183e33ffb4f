"""What the head asks of one CUDA device: memory, no waiting, no access outside its buffers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from prefixrl_kernels import HeadShape, RowIndex, head_logprobs, plan_head, reinforce_head
from prefixrl_kernels.head.autograd import WeightGrad
from prefixrl_kernels.head_plan import Mode
from torch import Tensor

from tests.support.head_cases import TRAINING_MODES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1800),
]

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda")

SLACK_BYTES = 64 * 2**20
"""Allocations are rounded up, and a product may ask for a workspace."""


def _inputs(num_rows: int, vocab: int, hidden_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states and weight (bfloat16, requiring gradients), targets, advantages."""
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden_TH = torch.randn(num_rows, hidden_size, generator=generator, device=CUDA).bfloat16()
    weight_VH = torch.randn(vocab, hidden_size, generator=generator, device=CUDA)
    weight_VH = (weight_VH * 3.0 / hidden_size**0.5).bfloat16()
    targets_R = torch.randint(0, vocab, (num_rows,), generator=generator, device=CUDA)
    advantages_R = torch.randn(num_rows, generator=generator, device=CUDA)
    weight_VH.main_grad = torch.zeros_like(weight_VH, dtype=torch.float32)  # pyright: ignore[reportAttributeAccessIssue]  # Megatron's
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), targets_R, advantages_R


@pytest.mark.parametrize("mode", [*TRAINING_MODES, "no_grad"])
@pytest.mark.parametrize("weight_grad", ["autograd", "promised"])
@pytest.mark.parametrize("rows", ["all", "repeated"])
def test_peak_memory_is_within_the_plan(mode: Mode, weight_grad: str, rows: str) -> None:
    num_rows, vocab, hidden_size, budget = 6144, 151_936, 2560, 1_500_000_000
    hidden_TH, weight_VH, targets_R, advantages_R = _inputs(num_rows, vocab, hidden_size)
    named = None if rows == "all" else [*range(num_rows - 1), 0]
    index = RowIndex.build(named, num_hidden_rows=num_rows, device=CUDA)
    is_promised = weight_grad == "promised"
    for leaf in (hidden_TH, weight_VH):
        leaf.requires_grad_(mode != "no_grad")
    plan = plan_head(
        HeadShape(
            num_rows=num_rows,
            num_columns=vocab,
            hidden_size=hidden_size,
            operand_bytes=2,
            logit_bytes=4,
            is_copied=named is not None,
            has_duplicates=rows == "repeated",
        ),
        mode=mode,
        memory_budget_bytes=budget,
        has_private_weight_grad=not is_promised,
        is_weight_grad_summed=not is_promised,
    )

    def step() -> None:
        loss, _ = reinforce_head(
            hidden_TH,
            weight_VH,
            targets_R,
            index,
            advantages_R,
            num_global_loss_tokens=num_rows,
            true_vocab_size=vocab,
            mode=mode,
            memory_budget_bytes=budget,
            weight_grad="main_grad" if is_promised else "autograd",
            promised_upstream=1.0 if is_promised else None,
        )
        if loss.requires_grad:
            loss.backward()

    step()  # cuBLAS allocates its workspace once
    hidden_TH.grad = weight_VH.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    returned = sum(leaf.grad.nbytes for leaf in (hidden_TH, weight_VH) if leaf.grad is not None)
    assert peak <= plan.peak_bytes + returned + SLACK_BYTES
    assert peak >= 0.5 * plan.peak_bytes


def _steps(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], mode: Mode, weight_grad: WeightGrad
) -> None:
    """Run both operations forward and backward, with the rows' index built on the way."""
    hidden_TH, weight_VH, targets_R, values_R = inputs
    rows = [*range(1000), *range(1047), 5]
    loss, statistics = reinforce_head(
        hidden_TH,
        weight_VH,
        targets_R,
        rows,
        values_R,
        num_global_loss_tokens=len(rows),
        true_vocab_size=4090,
        rollout_logprobs_R=values_R,
        reference_logprobs_R=values_R,
        weights_R=values_R,
        importance="truncated",
        kl="k3",
        kl_coefficient=0.1,
        entropy_coefficient=0.1,
        temperature=0.9,
        mode=mode,
        memory_budget_bytes=10_000_000,
        weight_grad=weight_grad,
        promised_upstream=1.0 if weight_grad == "main_grad" else None,
    )
    loss.backward()
    statistics.num_nonfinite()  # stays on the device
    logprobs_R, entropies_R = head_logprobs(
        hidden_TH, weight_VH, targets_R, true_vocab_size=4090, weight_grad=weight_grad
    )
    (logprobs_R.sum() + entropies_R.sum()).backward()


@pytest.mark.parametrize("mode", TRAINING_MODES)
@pytest.mark.parametrize("weight_grad", ["autograd", "main_grad"])
def test_the_host_never_waits_for_the_device(mode: Mode, weight_grad: WeightGrad) -> None:
    inputs = _inputs(2048, 4096, 256)
    _steps(inputs, mode, weight_grad)  # compiles, and allocates workspaces
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _steps(inputs, mode, weight_grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_compute_sanitizer_finds_nothing_on_small_shapes() -> None:
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, which the CUDA toolkit brings")
    # Every allocation for itself, so that an access past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    finished = subprocess.run(
        [
            sanitizer,
            "--error-exitcode=9",
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--timeout=1500",
            "tests/kernels/test_head_row_kernels.py",
            "tests/kernels/test_head_values.py::test_hidden_sizes_that_are_no_multiple_of_a_block",
            "-k",
            "triton",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    output = (finished.stdout + finished.stderr)[-6000:]
    assert finished.returncode == 0, output
    assert " passed" in output, output
