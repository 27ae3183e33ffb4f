"""The random generators of a rank: read, restored, or derived anew from the run's seed."""

import random
from typing import Any, cast

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import random as megatron_random

from prefixrl_mcore.policy.cpu_runtime import megatron_on_cpu


def get_rng_state() -> dict[str, Any]:
    """Return the state of every random generator of this process, Megatron's included."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": _rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what ``get_rng_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    _rng_tracker().set_states(state["megatron"])


@megatron_on_cpu()
def derive_rng_state(seed: int, step: int) -> None:
    """Seed every random generator of this process for a step of a run.

    The same on every rank, but for Megatron's states, which differ by the rank's place.

    Args:
        seed: the run's.
        step: where the run goes on; other steps get unrelated numbers.
    """
    derived = int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
    random.seed(derived)
    np.random.seed(derived)
    torch.manual_seed(derived)
    megatron_random.model_parallel_cuda_manual_seed(derived, force_reset_rng=True)


def _rng_tracker() -> megatron_random.CudaRNGStatesTracker:
    return cast(Any, tensor_parallel.get_cuda_rng_tracker())
