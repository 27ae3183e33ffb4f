"""Every Triton kernel of the head compiles for an H100, from its real launches, without spills."""

import pytest
import torch
from prefixrl_kernels.head import table
from prefixrl_kernels.head.estimators import IMPORTANCES, KLS, Estimator
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.row_kernels import LossInputs
from prefixrl_kernels.head.triton_rows import TritonRows
from prefixrl_kernels.head.vocab import VocabShard

from tests.support.triton_compile import SHARED_BYTES, compile_launches

pytestmark = pytest.mark.slow  # a process that runs the compiler


def launch_logit_kernels() -> None:
    """Launch what reads logits, in every dtype and with every switch."""
    kernels = TritonRows()
    num_columns = 18_992  # Qwen3's vocabulary over 8 ranks
    shard = VocabShard(start=num_columns, num_true_columns=num_columns, num_columns=num_columns)
    targets_R = torch.zeros(4, dtype=torch.int64)
    table_KR = torch.zeros(table.NUM_FIELDS, 4)
    for logits_dtype, out_dtype in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        logits_RV = torch.zeros(4, num_columns, dtype=logits_dtype)
        out_RV = logits_RV if logits_dtype == out_dtype else logits_RV.to(out_dtype)
        for temperature in (1.0, 0.7):
            kernels.statistics(logits_RV, targets_R, shard=shard, temperature=temperature)
            for has_entropy_grad in (False, True):
                kernels.grad_logits(
                    logits_RV,
                    table_KR,
                    targets_R,
                    out_RV,
                    shard=shard,
                    temperature=temperature,
                    has_entropy_grad=has_entropy_grad,
                )


def launch_row_kernels() -> None:
    """Launch what reads no logits: the merge, every estimator, the scatter."""
    kernels = TritonRows()
    table_KR = torch.zeros(table.NUM_FIELDS, 300)
    for num_ranks in (1, 8):
        kernels.merge(torch.zeros(num_ranks, 4, 300), table_KR)
    values_R = torch.zeros(300)
    for importance in IMPORTANCES:
        for kl in KLS:
            inputs = LossInputs(
                advantages_R=values_R,
                weights_R=values_R if kl == "none" else None,
                rollout_logprobs_R=values_R,
                reference_logprobs_R=None if kl == "none" else values_R,
                num_global_loss_tokens=7.0,
            )
            coefficient = 0.0 if kl == "none" else 0.1
            kernels.weigh(
                table_KR,
                inputs,
                Estimator(importance=importance, kl=kl, kl_coefficient=coefficient),
            )
    index = RowIndex.build([1, 0, 1], num_hidden_rows=3, device=torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        for source in (torch.float32, dtype):
            grad_RH = torch.zeros(3, 4096, dtype=source)
            out_TH = torch.zeros(3, 4096, dtype=dtype)
            kernels.scatter(grad_RH, index, out_TH, torch.ones(()))


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        (launch_logit_kernels, {"statistics_kernel": 4, "grad_logits_kernel": 12}),
        (launch_row_kernels, {"merge_kernel": 1, "weigh_kernel": 20, "scatter_kernel": 3}),
    ],
)
def test_kernels_compile_for_an_h100(launch: object, expected: dict[str, int]) -> None:
    compiled = compile_launches(launch)  # pyright: ignore[reportArgumentType]  # a function
    counts = {name: sum(k.name == name for k in compiled) for name in expected}
    assert counts == expected
    assert {kernel.name for kernel in compiled} == set(expected)
    for kernel in compiled:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.shared_bytes <= SHARED_BYTES[90], kernel
        assert kernel.registers <= 128, kernel  # 512 threads of 128 registers fill an SM
