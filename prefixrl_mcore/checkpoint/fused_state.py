"""Optimizer state of other optimizers than torch's AdamW, before their first step.

Not run on a GPU yet: written from the sources of megatron-core 0.19.2 (``HybridDeviceOptimizer``)
and Transformer Engine 2.20 (``FusedAdam``).
"""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def complete_fused_state(part: Any) -> None:  # noqa: ANN401  (untyped upstream)
    """Give every parameter the state that the optimizer's first step would begin with.

    Zero moments, main weights equal to the weights, step 0. Without it a policy that has not
    stepped yet could be neither saved nor loaded into.

    Args:
        part: one of Megatron's optimizers, around a hybrid or fused one.
    """
    inner = part.optimizer
    if isinstance(inner, HybridDeviceOptimizer):
        if not inner.state:
            _begin_hybrid(inner)
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            if state:
                continue
            if part.config.use_precision_aware_optimizer:
                has_remainders = inner.store_param_remainders and parameter.dtype == torch.bfloat16
                inner.initialize_state(parameter, has_remainders)
            else:
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter.data)
        group.setdefault("step", 0)


def _begin_hybrid(inner: HybridDeviceOptimizer) -> None:
    """Let the parts on host and device make their state by a step that changes nothing.

    (``dummy_step`` of the class itself steps along a random gradient.)
    """
    kept = [(group["lr"], group["weight_decay"]) for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.decoupled_grad = torch.zeros_like(parameter, dtype=torch.float32)
    inner.step()
    inner.zero_grad()
    for group, (lr, weight_decay) in zip(inner.param_groups, kept, strict=True):
        group["lr"], group["weight_decay"] = lr, weight_decay
    for optimizer in inner.sub_optimizers:
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        for group in (*optimizer.param_groups, *inner.param_groups):
            if "step" in group:
                group["step"] = 0
