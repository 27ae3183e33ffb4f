"""The rows of the head's result table, one float32 value per row of the batch and quantity.

Every row kernel reads and writes the same ``[NUM_FIELDS, R]`` table, so that one pointer carries
what belongs to a row. Shape suffixes: ``K`` fields, ``R`` rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAXIMUM = 0
"""Largest logit of the row, over all vocabulary shards."""
LOG_SUM = 1
"""``log sum exp(z - maximum)``. Kept apart from the maximum: their sum would round to the spacing
of the maximum, 1e-3 nats at logits of 1e4."""
LOGPROB = 2
ENTROPY = 3
RATIO = 4
"""``exp(logprob - rollout_logprob)``, bounded."""
K1 = 5
K3 = 6
REFERENCE_K1 = 7
REFERENCE_K3 = 8
IS_CLIPPED = 9
IS_EXTREME = 10
LOSS = 11
"""The row's term of the loss."""
LOGPROB_GRAD = 12
"""Derivative of the loss by the row's logprob."""
ENTROPY_GRAD = 13
"""Derivative of the loss by the row's entropy."""
NUM_FIELDS = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadStatistics:
    """What the head knows about each row, without gradient."""

    logprobs_R: Tensor  # noqa: N815  (shape suffix)
    """[R] float32, nats: logprob of the target at the given temperature."""

    entropies_R: Tensor  # noqa: N815
    """[R] float32, nats: entropy of the whole distribution."""

    ratios_R: Tensor  # noqa: N815
    """[R] float32: ``exp(logprob - rollout_logprob)``, the log bounded by +-20; 1 without rollout
    logprobs."""

    k1_R: Tensor  # noqa: N815
    """[R] float32, nats: ``rollout_logprob - logprob``; its mean over tokens that the rollout
    policy sampled estimates KL(rollout policy || policy). 0 without rollout logprobs."""

    k3_R: Tensor  # noqa: N815
    """[R] float32, nats: ``ratio - 1 - log ratio``, the same estimate with less variance and never
    negative. 0 without rollout logprobs."""

    reference_k1_R: Tensor  # noqa: N815
    """[R] float32, nats: ``logprob - reference_logprob``, an estimate of
    KL(policy || reference). 0 without reference logprobs."""

    reference_k3_R: Tensor  # noqa: N815
    """[R] float32, nats: ``exp(-d) - 1 + d`` with ``d = logprob - reference_logprob``."""

    is_clipped_R: Tensor  # noqa: N815
    """[R] bool: the importance weight was cut or masked, or the surrogate's clip took the row's
    gradient away. Rows whose ratio is beyond the bound are in ``is_extreme_R``."""

    is_extreme_R: Tensor  # noqa: N815
    """[R] bool: a log ratio (to rollout or reference) was beyond +-20 and entered as +-20."""

    @classmethod
    def from_table(cls, table_KR: Tensor) -> "HeadStatistics":
        """Return the statistics in a table; float fields are views of it."""
        return cls(
            logprobs_R=table_KR[LOGPROB],
            entropies_R=table_KR[ENTROPY],
            ratios_R=table_KR[RATIO],
            k1_R=table_KR[K1],
            k3_R=table_KR[K3],
            reference_k1_R=table_KR[REFERENCE_K1],
            reference_k3_R=table_KR[REFERENCE_K3],
            is_clipped_R=table_KR[IS_CLIPPED] != 0,
            is_extreme_R=table_KR[IS_EXTREME] != 0,
        )

    def num_nonfinite(self) -> Tensor:
        """Return how many rows have a logprob or an entropy that is NaN or infinite ([] int64)."""
        return (~torch.isfinite(self.logprobs_R) | ~torch.isfinite(self.entropies_R)).sum()
