"""GPU kernels of PrefixRL, usable without the trainer; ``kernels/README.md`` explains them."""

from prefixrl_kernels.head import head_logprobs, reinforce_head
from prefixrl_kernels.head.linear_logprob import linear_logprob_forward
from prefixrl_kernels.head.plan import HeadPlan, HeadShape, plan_head
from prefixrl_kernels.head.row_index import RowIndex
from prefixrl_kernels.head.table import HeadStatistics

__all__ = [
    "HeadPlan",
    "HeadShape",
    "HeadStatistics",
    "RowIndex",
    "head_logprobs",
    "linear_logprob_forward",
    "plan_head",
    "reinforce_head",
]
