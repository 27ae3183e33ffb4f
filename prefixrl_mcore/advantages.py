"""Group baselines: from the rewards of one group to the advantages of its rollouts.

A group shares prompt *and* prefix; the baseline is never taken over different prefixes.
"""

import math
from collections.abc import Sequence
from typing import Literal

Baseline = Literal["mean", "leave_one_out", "none"]


def group_advantages(
    rewards_G: Sequence[float], *, baseline: Baseline, normalize_std: bool
) -> tuple[float, ...]:
    """Return each rollout's reward minus the group's baseline.

    ``mean`` subtracts the mean of all rewards; ``leave_one_out`` the mean of the other rewards
    (arXiv:2402.14740), which is ``mean`` times G / (G - 1); ``none`` subtracts nothing. With
    ``normalize_std`` the result is divided by the sample standard deviation of the rewards
    (divisor G - 1) without any offset. A group of equal rewards has exactly zero advantages,
    except for ``none`` without normalisation.

    Args:
        rewards_G: [group_size] the verifier's rewards of one group.
        baseline: what is subtracted.
        normalize_std: divide by the standard deviation.

    Raises:
        ValueError: if the group is empty, a reward is not finite, or one rollout is not enough
            for the chosen options.
    """
    num_rollouts = len(rewards_G)
    needed = 2 if baseline == "leave_one_out" or normalize_std else 1
    if num_rollouts < needed:
        raise ValueError(
            f"group: baseline {baseline!r} with normalize_std={normalize_std} needs at least "
            f"{needed} rollouts, got {num_rollouts}; raise batch.group_size"
        )
    if not all(math.isfinite(reward) for reward in rewards_G):
        raise ValueError(f"group: rewards must be finite, got {tuple(rewards_G)}")
    is_constant = max(rewards_G) == min(rewards_G)
    if is_constant and (baseline != "none" or normalize_std):
        return (0.0,) * num_rollouts

    mean = math.fsum(rewards_G) / num_rollouts
    if baseline == "none":
        advantages = tuple(float(reward) for reward in rewards_G)
    elif baseline == "mean":
        advantages = tuple(reward - mean for reward in rewards_G)
    elif baseline == "leave_one_out":
        scale = num_rollouts / (num_rollouts - 1)
        advantages = tuple(scale * (reward - mean) for reward in rewards_G)
    else:
        raise ValueError(f"baseline must be mean, leave_one_out or none, got {baseline!r}")
    if not normalize_std:
        return advantages
    variance = math.fsum((reward - mean) ** 2 for reward in rewards_G) / (num_rollouts - 1)
    return tuple(advantage / math.sqrt(variance) for advantage in advantages)
