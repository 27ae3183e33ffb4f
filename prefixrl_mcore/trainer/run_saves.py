"""What a run saves and when: due checkpoints, the last one, and one in need."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixrl_mcore.accounting.flops import FlopsMeter
from prefixrl_mcore.checkpoint.manifest import SaveError
from prefixrl_mcore.checkpoint.run_checkpoints import latest_checkpoint, step_folder
from prefixrl_mcore.checkpoint.saver import CheckpointSaver
from prefixrl_mcore.config.continuation import describe_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.policy.topology import run_on_first
from prefixrl_mcore.rollout.engine import EngineError, RolloutError
from prefixrl_mcore.trainer.rollout_supply import RolloutSupply

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class RunSaves:
    """The checkpoints of one run, on every rank; at most one save is under way.

    A save that the storage refuses is logged and counted, and the next one that is due tries again:
    the run goes on with its older checkpoints.
    """

    config: RunConfig
    """The run's settings."""

    folder: Path
    """``RUN/checkpoints``."""

    saver: CheckpointSaver
    """Writes into ``folder``."""

    policy: MegatronPolicy
    """This rank's part of the policy."""

    supply: RolloutSupply
    """Rollouts that no step has trained on, and the source's position."""

    meter: FlopsMeter
    """Charged FLOPs so far."""

    phases: Phases
    """Saving is one of them."""

    warns: bool
    """This rank logs what the storage refused; one does."""

    input_digests: dict[str, str]
    """Digests of what a resumed run must find again, by name: tokenizer, prompts, reference."""

    memory_explained: Callable[[], AbstractContextManager[None]] = nullcontext
    """Surrounds a save and says what to turn when memory runs out."""

    on_wait: Callable[[str], None] = lambda what: None
    """Told what is waited for."""

    wandb_id: str | None = None
    """W&B's id of the run, on rank 0."""

    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step → metrics of the newest evaluation; those of rank 0 are saved."""

    num_failed: int = 0
    """Saves that the storage refused since this start."""

    @property
    def num_refused(self) -> int:
        """Saves that the storage refused since this start, or only the tidying up after them."""
        return self.num_failed + self.saver.num_untidy

    def checkpoint(self, step: int, *, is_last: bool, is_due: bool = False) -> None:
        """Complete a save under way, and begin one if it is due; all ranks call this every step.

        Due is the last one, one of a step that ``checkpoint.every_steps`` divides, and ``is_due``.

        Raises:
            SaveError: if the storage refuses the last save.
        """
        is_due = is_due or is_last or step % self.config.checkpoint.every_steps == 0
        if not is_due and not self.saver.is_under_way:
            return
        if is_due:
            self.supply.drain()
        with self.memory_explained(), self.phases.phase("save"):
            with self.refusal_counted():
                self.saver.finish(wait=is_due)
            if not is_due:
                return
            self.on_wait("checkpoint")
            with nullcontext() if is_last else self.refusal_counted():
                self._start(step)
                if is_last or not self.config.checkpoint.in_background:
                    self.saver.finish(wait=True)

    @contextmanager
    def if_engine_is_lost(self, step: int) -> Iterator[None]:
        """Save what ``step`` begins with if no rollout can be had for it; all ranks call this.

        To surround only what fails on every rank alike, because saving is a collective. The error
        goes on. Who failed to sample has given the problems back to the source.
        """
        try:
            yield
        except (EngineError, RolloutError):
            self.complete()
            with self.phases.phase("save"):
                self._save_in_need(step)
            self.complete()
            raise

    def complete(self) -> None:
        """Complete a save under way; how it fails is logged, because it must not hide an error.

        All ranks call this, with an error at hand that ends the run on each of them.
        """
        with self.phases.phase("save"), self._failure_logged(), self.refusal_counted():
            self.saver.finish(wait=True)

    @contextmanager
    def refusal_counted(self) -> Iterator[None]:
        """Go on after a save that the storage refused; the next one that is due tries again."""
        try:
            yield
        except SaveError as error:
            self.num_failed += 1
            if self.warns:
                logger.error(
                    "%s. The older checkpoints are as they were; the next save that is due tries "
                    "again. Make room, or the run may lose its work",
                    error,
                )

    def has_any(self) -> bool:
        """Return whether the run has a complete checkpoint; all ranks call this."""
        return run_on_first(lambda: latest_checkpoint(self.folder) is not None)

    def state(self, step: int) -> dict[str, Any]:
        """Return what a resumed run needs besides policy and unused rollouts, as JSON."""
        return {
            "step": step,
            "method": self.config.method,
            "source": self.supply.source_state(),
            "flops": self.meter.state(),
            **describe_settings(self.config),
            "is_evaluated": step in self.evaluations,
            "inputs": self.input_digests,
            "save_seconds": self.saver.longest_seconds,
            "wandb_id": self.wandb_id,
        }

    def _save_in_need(self, step: int) -> None:
        """Begin to save, unless it is saved already; how that fails is logged."""
        newest = run_on_first(lambda: latest_checkpoint(self.folder))
        if newest == step_folder(self.folder, step):
            return
        logger.warning("no rollouts can be had: saving the state at step %d", step)
        with self._failure_logged(), self.refusal_counted():
            self._start(step)

    def _start(self, step: int) -> None:
        """Begin to save."""
        state = self.state(step) | {"rollouts": self.supply.state()}
        self.saver.start(step, self.policy, state, metrics=self.evaluations.get(step))

    @contextmanager
    def _failure_logged(self) -> Iterator[None]:
        """Log how a save fails that is the run's last anyhow."""
        try:
            yield
        except RuntimeError as error:  # of the read-back or of a writer, on every rank
            logger.error("%s. The run ends with another error; this save is lost", error)
