"""The row kernels in Triton: each reads its logits from memory once.

No atomics and no autotuning: equal inputs give equal bits. Shape suffixes: ``R`` rows, ``V``
columns as stored, ``W`` tensor-parallel ranks, ``K`` table fields, ``T`` hidden rows, ``H`` hidden
size.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false
# (a launch passes Python values for constexpr parameters, and options the kernel does not name)

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from prefixrl_kernels.head.estimators import IMPORTANCES, KLS, Estimator
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.row_kernels import LossInputs
from prefixrl_kernels.head.triton_row_kernels import (
    grad_logits_kernel,
    merge_kernel,
    scatter_kernel,
    statistics_kernel,
    weigh_kernel,
)
from prefixrl_kernels.head.vocab import VocabShard
from prefixrl_kernels.head_plan import row_stride


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonRows:
    """Row kernels in Triton, in float32; block sizes are those of an H100.

    No autotuning: another block size is another order of summation.
    """

    columns_at_once: int = 8192
    """Columns that a program reads at once; a power of two."""

    rows_at_once: int = 128
    """Rows of a program that needs no logits; a power of two."""

    hidden_at_once: int = 1024
    """Hidden columns that a program of the scatter adds up; a power of two."""

    num_warps: int = 16
    """Warps of a program that reads logits."""

    def statistics(
        self, logits_RV: Tensor, targets_R: Tensor, *, shard: VocabShard, temperature: float
    ) -> Tensor:
        """Return this shard's [4, R] partial statistics."""
        num_rows = logits_RV.size(0)
        partials_4R = torch.empty((4, num_rows), dtype=torch.float32, device=logits_RV.device)
        statistics_kernel[(num_rows,)](
            logits_RV,
            targets_R,
            partials_4R,
            num_rows,
            logits_RV.stride(0),
            shard.num_true_columns,
            shard.start,
            temperature,
            HAS_TEMPERATURE=temperature != 1.0,
            BLOCK=self._column_block(shard.num_true_columns),
            num_warps=self.num_warps,
        )
        return partials_4R

    def merge(self, partials_W4R: Tensor, table_KR: Tensor) -> None:
        """Merge the ranks' statistics into the table."""
        num_ranks, _, num_rows = partials_W4R.shape
        merge_kernel[(triton.cdiv(num_rows, self.rows_at_once),)](
            partials_W4R,
            table_KR,
            num_ranks,
            num_rows,
            table_KR.stride(0),
            BLOCK=self.rows_at_once,
        )

    def weigh(self, table_KR: Tensor, inputs: LossInputs, estimator: Estimator) -> None:
        """Fill in loss, derivatives and statistics of each row."""
        num_rows = table_KR.size(1)
        present = inputs.advantages_R  # stands in for what the kernel does not read
        weigh_kernel[(triton.cdiv(num_rows, self.rows_at_once),)](
            table_KR,
            inputs.advantages_R,
            _or(inputs.weights_R, present),
            _or(inputs.rollout_logprobs_R, present),
            _or(inputs.reference_logprobs_R, present),
            num_rows,
            table_KR.stride(0),
            float(inputs.num_global_loss_tokens),
            float(estimator.min_importance),
            float(estimator.max_importance),
            float(estimator.clip_low),
            float(estimator.clip_high),
            float(estimator.kl_coefficient),
            float(estimator.entropy_coefficient),
            IMPORTANCE=IMPORTANCES.index(estimator.importance),
            KL=KLS.index(estimator.kl if estimator.kl_coefficient else "none"),
            HAS_WEIGHTS=inputs.weights_R is not None,
            HAS_ROLLOUT=inputs.rollout_logprobs_R is not None,
            HAS_REFERENCE=inputs.reference_logprobs_R is not None,
            BLOCK=self.rows_at_once,
        )

    def grad_logits(
        self,
        logits_RV: Tensor,
        table_KR: Tensor,
        targets_R: Tensor,
        out_RV: Tensor,
        *,
        shard: VocabShard,
        temperature: float,
        has_entropy_grad: bool,
    ) -> None:
        """Write the derivative of the loss by the logits."""
        num_rows, num_stored = out_RV.shape
        if not num_stored:  # a shard of nothing but padding
            return
        # An aligned end makes vector stores; what lies between it and the last column is padding.
        num_written = min(row_stride(num_stored), out_RV.stride(0))
        block = self._column_block(num_written)
        grad_logits_kernel[(num_rows, triton.cdiv(num_written, block))](
            logits_RV,
            out_RV,
            table_KR,
            targets_R,
            logits_RV.stride(0),
            out_RV.stride(0),
            table_KR.stride(0),
            shard.num_true_columns,
            num_written,
            shard.start,
            temperature,
            HAS_TEMPERATURE=temperature != 1.0,
            HAS_ENTROPY_GRAD=has_entropy_grad,
            BLOCK=block,
            num_warps=self.num_warps,
        )

    def scatter(self, grad_RH: Tensor, index: RowIndex, out_TH: Tensor, scale: Tensor) -> None:
        """Add the gradient of the rows up into the hidden rows."""
        if index.unique_rows_U is None:
            torch.mul(grad_RH, scale, out=out_TH)
            return
        out_TH.zero_()
        hidden_size = grad_RH.size(1)
        block = min(self.hidden_at_once, triton.next_power_of_2(hidden_size))
        grid = (index.unique_rows_U.size(0), triton.cdiv(hidden_size, block))
        scatter_kernel[grid](
            grad_RH,
            out_TH,
            scale,
            index.unique_rows_U,
            index.members_R,
            index.starts_U1,
            out_TH.stride(0),
            hidden_size,
            BLOCK=block,
        )

    def _column_block(self, num_columns: int) -> int:
        """Return the columns per program for a row of ``num_columns``."""
        return min(self.columns_at_once, triton.next_power_of_2(max(num_columns, 1)))


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, which needs no GPU."""
    return not isinstance(statistics_kernel, triton.JITFunction)


def _or(values_R: Tensor | None, substitute_R: Tensor) -> Tensor:
    """Return the values, or a tensor of the same shape that stands for their absence."""
    return substitute_R if values_R is None else values_R
