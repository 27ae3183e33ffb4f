"""GPU kernels of PrefixRL, usable without the trainer; ``kernels/README.md`` explains them.

Names are imported when they are first asked for: ``prefixrl_kernels.head_plan`` is arithmetic that
programs without torch use too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixrl_kernels.head import head_logprobs, reinforce_head
    from prefixrl_kernels.head.linear_logprob import linear_logprob_forward
    from prefixrl_kernels.head.row_index import RowIndex
    from prefixrl_kernels.head.table import HeadStatistics
    from prefixrl_kernels.head_plan import HeadPlan, HeadShape, plan_head

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

_MODULES = {
    "HeadPlan": "head_plan",
    "HeadShape": "head_plan",
    "HeadStatistics": "head.table",
    "RowIndex": "head.row_index",
    "head_logprobs": "head",
    "linear_logprob_forward": "head.linear_logprob",
    "plan_head": "head_plan",
    "reinforce_head": "head",
}


def __getattr__(name: str) -> object:
    """Return a public name from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
