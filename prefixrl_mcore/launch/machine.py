"""The machine that a config is checked against."""

import math
from dataclasses import dataclass

from prefixrl_mcore.accounting.step_time import Assumptions
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.rollout import RolloutConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the run is to fit on."""

    num_gpus: int | None
    """Trainer ranks; None takes the config's layout."""

    memory_gib: float
    """Of one GPU."""

    reserved_fraction: float
    """Share of it that must stay free: for the CUDA context, NCCL's buffers, fragmentation."""

    assumptions: Assumptions
    """Speeds."""

    rollout_gpus: int | None = None
    """GPUs of rollout nodes; None starts the servers on the node of rank 0."""

    memory_bytes_per_second: float | None = None
    """Bandwidth of one GPU; None leaves out what reading costs in sampling."""

    mean_tokens: float | None
    """Mean length of a sequence; None takes ``rollout.max_total_tokens``, which is the most."""

    def __post_init__(self) -> None:
        """Refuse what no machine is.

        Raises:
            ConfigError: naming the flag.
        """
        speeds = self.assumptions
        for flag, value, is_possible, expected in (
            ("--gpus", self.num_gpus, self.num_gpus is None or self.num_gpus >= 1, "at least 1"),
            (
                "--rollout-gpus",
                self.rollout_gpus,
                self.rollout_gpus is None or self.rollout_gpus >= 1,
                "at least 1",
            ),
            ("--gpu-memory", self.memory_gib, 0 < self.memory_gib < math.inf, "GiB above 0"),
            (
                "--reserved",
                self.reserved_fraction,
                0 <= self.reserved_fraction < 1,
                "a fraction from 0 to below 1",
            ),
            *(
                (flag, value, 0 < value <= 1, "a fraction above 0, at most 1")
                for flag, value in (
                    ("--update-efficiency", speeds.update_efficiency),
                    ("--rollout-efficiency", speeds.rollout_efficiency),
                )
            ),
        ):
            if not is_possible:
                raise ConfigError(f"{flag} must be {expected}, got {value:g}")

    @property
    def memory_bytes(self) -> float:
        """Of one GPU."""
        return self.memory_gib * 1024**3

    @property
    def usable_bytes(self) -> float:
        """What weights, state and step may take."""
        return self.memory_bytes * (1 - self.reserved_fraction)

    def own_gpus(self, rollout: RolloutConfig) -> int | None:
        """Return the GPUs that servers have to themselves; None if they share the trainer's.

        Raises:
            ConfigError: if servers would leave some of ``--rollout-gpus`` over.
        """
        gpus, size = self.rollout_gpus, rollout.sglang.tensor_parallel_size
        if gpus is not None and gpus % size:
            raise ConfigError(
                f"--rollout-gpus {gpus} are not whole servers of "
                f"rollout.sglang.tensor_parallel_size = {size} GPUs; give a multiple of {size}"
            )
        if gpus is None and not rollout.colocated:
            return rollout.sglang.num_members * size
        return gpus
