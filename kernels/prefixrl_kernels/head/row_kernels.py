"""What the head needs done to rows of logits: the interface of its two implementations.

Shape suffixes: ``R`` rows of a block, ``V`` columns as stored, ``W`` tensor-parallel ranks, ``K``
fields of the result table, ``T`` hidden rows, ``H`` hidden size.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prefixrl_kernels.head.estimators import Estimator
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.vocab import VocabShard


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What enters the loss beside the logits, per row."""

    advantages_R: Tensor
    """[R] float32."""

    weights_R: Tensor | None
    """[R] float32 aggregation weights; None is 1 everywhere."""

    rollout_logprobs_R: Tensor | None
    """[R] float32, nats; None leaves the ratio at 1."""

    reference_logprobs_R: Tensor | None
    """[R] float32, nats; None leaves the divergence at 0."""

    num_global_loss_tokens: float
    """What the sum is divided by."""

    @classmethod
    def build(cls, *, num_global_loss_tokens: float, **values: Tensor | None) -> "LossInputs":
        """Return inputs whose tensors are contiguous, as the kernels read them."""
        packed = {name: None if row is None else row.contiguous() for name, row in values.items()}
        return cls(num_global_loss_tokens=num_global_loss_tokens, **packed)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, rows: slice) -> "LossInputs":
        """Return the inputs of some rows."""

        def cut(values_R: Tensor | None) -> Tensor | None:
            return None if values_R is None else values_R[rows]

        return LossInputs(
            advantages_R=self.advantages_R[rows],
            weights_R=cut(self.weights_R),
            rollout_logprobs_R=cut(self.rollout_logprobs_R),
            reference_logprobs_R=cut(self.reference_logprobs_R),
            num_global_loss_tokens=self.num_global_loss_tokens,
        )


class RowKernels(Protocol):
    """Row-wise work. No method reads anything back from the device."""

    def statistics(
        self, logits_RV: Tensor, targets_R: Tensor, *, shard: VocabShard, temperature: float
    ) -> Tensor:
        """Return this shard's partial statistics of ``z = logits / temperature``.

        Returns:
            [4, R] float32: ``m = max z``, ``sum exp(z - m)``, ``sum exp(z - m) (z - m)`` and
            ``z[target]``, over the shard's true columns. A column at -inf adds nothing. Without
            any finite column m is -inf and the sums are 0. ``z[target]`` is NaN where the target
            is not among the true columns.
        """
        ...

    def merge(self, partials_W4R: Tensor, table_KR: Tensor) -> None:
        """Merge the ranks' statistics in rank order into MAXIMUM, LOG_SUM, LOGPROB and ENTROPY."""
        ...

    def weigh(self, table_KR: Tensor, inputs: LossInputs, estimator: Estimator) -> None:
        """Fill the table's other fields from LOGPROB, ENTROPY and the inputs of the loss."""
        ...

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
        """Write the loss's derivative by the logits; ``out_RV`` may be ``logits_RV`` itself.

        With ``g`` = LOGPROB_GRAD, ``e`` = ENTROPY_GRAD, ``log p = z - maximum - log_sum``:
        ``(g (onehot - p) - e p (log p + entropy)) / temperature``, computed in float32 and rounded
        once, to the dtype of ``out_RV``. Padding columns get 0, and so may what the row's stride
        leaves between its last column and the next multiple of ``COLUMN_MULTIPLE``.
        """
        ...

    def scatter(self, grad_RH: Tensor, index: RowIndex, out_TH: Tensor, scale: Tensor) -> None:
        """Set ``out`` to ``scale`` times the sum over each hidden row's uses, and 0 elsewhere.

        Sums in the order of the index, in float32, and rounds once. ``scale`` is a [] tensor.
        """
        ...
