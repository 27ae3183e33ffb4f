"""The vocabulary over tensor-parallel ranks: which columns are ours, and what ranks exchange.

Shape suffixes: ``R`` rows, ``W`` ranks of the tensor-parallel group, 4 the partial statistics.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from prefixrl_kernels.head_plan import row_stride


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabShard:
    """This rank's part of the vocabulary."""

    start: int
    """Token id of the first column."""

    num_true_columns: int
    """Columns that are tokens; the rest of the shard is padding."""

    num_columns: int
    """Columns that enter the matrix products: the true ones, and as many of the padding ones as
    keep the products aligned. 0 for a shard of nothing but padding."""

    @classmethod
    def build(cls, *, num_columns: int, start: int, true_vocab_size: int) -> "VocabShard":
        """Return the shard that starts at token ``start`` and has ``num_columns`` columns."""
        num_true = min(max(true_vocab_size - start, 0), num_columns)
        num_aligned = min(row_stride(num_true), num_columns)
        return cls(start=start, num_true_columns=num_true, num_columns=num_aligned)

    @property
    def row_stride(self) -> int:
        """Elements from one row of a logits buffer to the next."""
        return row_stride(self.num_columns)


def gather_partials(partials_4R: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Return [W, 4, R]: every rank's partial statistics, in rank order, on every rank.

    All ranks of ``tp_group`` must call this. The merge that follows is then the same arithmetic
    in the same order everywhere, so that its result is bitwise equal on all ranks.
    """
    if tp_group is None:
        return partials_4R[None]
    num_fields, num_rows = partials_4R.shape
    gathered = partials_4R.new_empty((tp_group.size() * num_fields, num_rows))
    dist.all_gather_into_tensor(gathered, partials_4R.contiguous(), group=tp_group)
    return gathered.view(tp_group.size(), num_fields, num_rows)


def gather_sequence(hidden_SH: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Return [T, H]: the ranks' shares of the sequence one after another, on every rank.

    All ranks of ``tp_group`` must call this, with shares of one length.
    """
    shape = (hidden_SH.size(0) * tp_group.size(), hidden_SH.size(1))
    gathered_TH = hidden_SH.new_empty(shape)
    dist.all_gather_into_tensor(gathered_TH, hidden_SH.contiguous(), group=tp_group)
    return gathered_TH


class PendingSum:
    """A sum over the tensor-parallel group that is on its way while something else computes."""

    def __init__(self, values: Tensor, work: dist.Work | None) -> None:
        self._values = values
        self._work = work

    def wait(self) -> Tensor:
        """Return the finished sum."""
        if self._work is not None:
            self._work.wait()
        return self._values


def start_sum(values: Tensor, tp_group: dist.ProcessGroup | None) -> PendingSum:
    """Start summing ``values`` in place over the group; all its ranks must call this."""
    if tp_group is None:
        return PendingSum(values, None)
    return PendingSum(values, dist.all_reduce(values, group=tp_group, async_op=True))


def start_sequence_sum(values_TH: Tensor, tp_group: dist.ProcessGroup) -> PendingSum:
    """Start summing over the group, each rank receiving its share of the sequence.

    All ranks of ``tp_group`` must call this.
    """
    num_rows = values_TH.size(0) // tp_group.size()
    share_SH = torch.empty(
        (num_rows, values_TH.size(1)), dtype=values_TH.dtype, device=values_TH.device
    )
    work = dist.reduce_scatter_tensor(share_SH, values_TH, group=tp_group, async_op=True)
    return PendingSum(share_SH, work)
