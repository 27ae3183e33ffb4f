"""Watching a run and looking into it: stalls, profiles."""

from typing import Annotated, Literal

from pydantic import Field

from prefixrl_mcore.config.base import Config


class PhaseLimitsConfig(Config):
    """Seconds without progress that are too long, by phase; None is ``limit_seconds``."""

    start: float | None = Field(default=3600.0, gt=0.0)
    """Loading the model, starting the engine (it has a limit of its own), loading a checkpoint, the
    dry-run step, what the supervised phase does between updates."""

    sync: float | None = Field(default=None, gt=0.0)
    """Weights into the engine."""

    rollout: float | None = Field(default=7200.0, gt=0.0)
    """Sampling all groups of a step; ranks other than 0 wait in this phase for verification too."""

    verify: float | None = Field(default=None, gt=0.0)
    """Verification of a step's rollouts."""

    pack: float | None = Field(default=None, gt=0.0)
    """Packing into streams."""

    reference: float | None = Field(default=None, gt=0.0)
    """One microbatch of one model chunk under the reference's weights (``loss.kl``)."""

    forward_backward: float | None = Field(default=None, gt=0.0)
    """One microbatch of one model chunk: each begins anew."""

    optimizer: float | None = Field(default=None, gt=0.0)
    """Gradient norm, optimizer step."""

    save: float | None = Field(default=3600.0, gt=0.0)
    """One checkpoint, or the dump of an update that was not finite, with the search for what made
    it; each microbatch of the search begins anew."""

    eval: float | None = Field(default=14400.0, gt=0.0)
    """One evaluation of all sets."""

    other: float | None = Field(default=None, gt=0.0)
    """What is in no phase, such as writing metrics."""


class StallConfig(Config):
    """When a rank that makes no progress is reported."""

    limit_seconds: float | None = Field(default=900.0, gt=0.0)
    """Time without progress (a phase or a microbatch begun) after which every rank's phase and
    Python stack are logged; NCCL gives up after 30 minutes. None watches only the phases that have
    a limit of their own."""

    phases: PhaseLimitsConfig = Field(default_factory=PhaseLimitsConfig)
    """Limits of phases that may take longer."""

    export_seconds: float | None = Field(default=1800.0, gt=0.0)
    """Time without a weight in the middle of an export to the engine after which rank 0 ends the
    run with exit code 76, whatever ``action`` is: a rank hangs, and the engine waits for it. None
    waits as long as the ranks' process group does, 24 hours."""

    answer_seconds: float = Field(default=90.0, gt=0.0)
    """Time that ranks are given to answer with their stacks before they count as silent; a shared
    file system may show a new file a minute late."""

    action: Literal["report", "stop"] = "report"
    """``report`` logs and goes on, again when twice the time has passed; ``stop`` logs and ends
    all ranks with exit code 76, without saving."""

    def limit_of(self, phase: str) -> float | None:
        """Return the limit of a phase, seconds; None has none."""
        own = getattr(self.phases, phase)
        return self.limit_seconds if own is None else own


class ProfileConfig(Config):
    """Which steps of which ranks are profiled; the traces go to ``RUN/profile``."""

    steps: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Steps to profile, from 0; empty profiles none. The first step of a start is unlike the
    others."""

    ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Ranks that write a trace; each slows down the others, which wait for it."""

    with_stacks: bool = False
    """Record the Python stack of every operation: larger traces, slower steps."""

    with_shapes: bool = False
    """Record the shapes of operands."""

    with_memory: bool = False
    """Record allocations in the trace."""

    memory_snapshot: bool = False
    """On GPUs, write a snapshot of memory at the end of each profiled step, with the history of
    allocations; in all ranks that history is then in the snapshot of an out-of-memory error too."""

    memory_entries: int = Field(default=100_000, ge=1)
    """Allocations that the history of memory keeps, the newest."""
