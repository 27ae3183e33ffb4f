"""The real judge, and what a child has imported because of it."""

import sys

from prefixrl_mcore.rewards.math_judge import judge
from prefixrl_mcore.rewards.wire import Json


def judge_and_list_modules(payload: Json) -> Json:
    """Judge, then return the verdict and the top-level modules of this process."""
    return [judge(payload), *sorted({name.partition(".")[0] for name in sys.modules})]
