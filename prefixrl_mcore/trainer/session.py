"""Everything that is alive while one rank trains, and the verbs that the loop is made of."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from prefixrl_mcore.accounting.flops import FlopsMeter, sampling_flops
from prefixrl_mcore.accounting.model_flops import ModelFlops
from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.packing import Aggregation, PackedBatch, pack
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.data.source import MixtureSource
from prefixrl_mcore.eval.in_training import evaluate_in_training
from prefixrl_mcore.eval.runner import Evaluator
from prefixrl_mcore.observability.metrics import MetricsWriter
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.observability.progress import Progress
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.policy.nonfinite import NonFiniteError
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.policy.serving import CollectiveServices
from prefixrl_mcore.policy.topology import Topology, run_on_first
from prefixrl_mcore.records import Problem, TrainingSequence, UpdateResult
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.trainer.agreement import GapAlarm, LogprobGapError
from prefixrl_mcore.trainer.dumps import SFT_FOLDER, dump_and_explain
from prefixrl_mcore.trainer.generation import Generated, StalenessError, staleness_metrics
from prefixrl_mcore.trainer.groups import training_sequences
from prefixrl_mcore.trainer.memory import give_back_cached_memory, reset_peaks
from prefixrl_mcore.trainer.profiling import StepProfiler
from prefixrl_mcore.trainer.rollout_log import rollout_rows, write_rollouts
from prefixrl_mcore.trainer.rollout_supply import RolloutSupply
from prefixrl_mcore.trainer.run_saves import RunSaves
from prefixrl_mcore.trainer.step_metrics import (
    Hardware,
    batch_metrics,
    rank_metrics,
    rollout_metrics,
    sync_share,
    throughput_metrics,
    update_metrics,
)

logger = logging.getLogger(__name__)

EXPORT = "export"
"""Service that streams the policy's weights to rank 0."""


@dataclass(kw_only=True, slots=True)
class Session:
    """One rank's view of a training run; built by ``build_session``.

    The evaluator (engine, verifier) and the metrics writer exist on rank 0 only. What they find
    out is broadcast, so that every rank packs the same batch.
    """

    config: RunConfig
    """The run's settings."""

    folder: RunFolder
    """Where the run writes."""

    topology: Topology
    """This rank's place among the trainer's ranks."""

    renderer: PromptRenderer
    """Prompts and tokenizer, on every rank."""

    policy: MegatronPolicy
    """This rank's part of the policy."""

    services: CollectiveServices
    """What rank 0 may ask all ranks for while it drives the engine: ``EXPORT``."""

    source: MixtureSource
    """Order of the prefixed and original problems; rank 0 takes from it, and saves its state."""

    supply: RolloutSupply
    """The rollouts of each step, on every rank."""

    meter: FlopsMeter
    """Charged FLOPs and tokens so far; in the same state on every rank."""

    saves: RunSaves
    """The run's checkpoints."""

    evaluation_sets: dict[str, list[Problem]]
    """Name → problems evaluated without a prefix; ``train`` first."""

    evaluator: Evaluator | None
    """Engine, verifier and prompts on rank 0; None on the other ranks."""

    metrics: MetricsWriter | None
    """Metrics on rank 0; None on the other ranks."""

    progress: Progress
    """Live display; does nothing on the other ranks."""

    phases: Phases
    """Wall time by phase of the current step, and where this rank is."""

    hardware: Hardware
    """What the ranks run on; for throughput and MFU."""

    profiler: StepProfiler
    """Records the steps that ``[profile]`` names."""

    predicted_bytes: float | None
    """Memory of a rank that ``prefixrl check`` predicts; None when nothing was predicted."""

    memory_explained: Callable[..., AbstractContextManager[None]]
    """``out_of_memory.explained`` for this run and rank; takes what is known of the moment."""

    gap_alarm: GapAlarm
    """Tells when engine and policy disagree."""

    stack: ExitStack
    """Closes engine, verifier, metrics and progress."""

    staleness: dict[str, float] = field(default_factory=dict)
    """Metrics of the staleness of the batch packed last."""

    num_steps_done: int = 0
    """Whole RL steps of the run, those of earlier starts and those without signal too. Not the
    policy version, which counts supervised updates, and no step without signal."""

    owes_evaluation: bool = False
    """The run that saved was told to stop before it evaluated what it resumes from."""

    engine_sleeps: bool = False
    """The engine has given its device memory back, and its weights with it; equal on all ranks."""

    def begin_steps(self) -> None:
        """Write the times so far, and count time and memory from here on."""
        self.log_outside(self.num_steps_done)
        self.profiler.begin_steps(self.num_steps_done)
        self.phases.begin_steps()
        reset_peaks(self.topology.device)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surround one step, from the weight sync to the metrics; all ranks call this.

        Once whole, it is done. A check that ends the run on every rank alike leaves no save under
        way.
        """
        self.phases.begin_step(step)
        with self.memory_explained(), self.profiler.step(step):
            try:
                yield
            except (LogprobGapError, StalenessError):
                self.saves.complete()
                raise
        self.num_steps_done = step + 1

    def sync_weights(self) -> None:
        """Bring the engine to the policy's version; all ranks call this (collective export)."""
        with self.phases.phase("sync"):
            if self.engine_sleeps:
                give_back_cached_memory()
            self.services.run_on_first(self._sync_weights)
            self.engine_sleeps = False

    def _sync_weights(self) -> None:
        """Do the work of ``sync_weights`` on rank 0."""
        engine, version = self._evaluator.engine, self.policy.policy_version
        if self.engine_sleeps:
            self.progress.update(waiting_for="the engine to wake up")
            engine.wake()
        if self.engine_sleeps or engine.policy_version != version:
            self.progress.update(waiting_for="weight sync")
            engine.load_weights(self._export, version)

    def release_engine_memory(self) -> None:
        """Put a colocated engine to sleep, until the next sync; all ranks call this.

        Raises:
            EngineError: if too few servers are left, on every rank.
        """
        if not self.config.rollout.colocated or self.engine_sleeps:
            return
        try:
            with self.phases.phase("sync"):
                run_on_first(lambda: self._evaluator.engine.sleep())
        except EngineError:
            self.saves.complete()
            raise
        self.engine_sleeps = True

    def _export(self) -> Iterator[tuple[str, Tensor]]:
        """Begin the weights for the engine, which may ask for them again while it samples."""
        if self.supply.is_in_background:
            raise EngineError(
                f"the engine lost weights of version {self._evaluator.engine.policy_version} while "
                "it sampled during an update, which they cannot be exported again from; resume the "
                "run, and if it happens often, switch rollout.schedule.overlap off"
            )
        return self.services.ask(EXPORT)

    def pack(self, rollouts: Generated) -> PackedBatch:
        """Pack the step's rollouts into streams; every rank packs the same.

        Raises:
            StalenessError: if a rollout is more stale than the run allows.
        """
        self.staleness = staleness_metrics(
            rollouts.groups,
            self.policy.policy_version,
            max_staleness=self.config.rollout.schedule.max_staleness,
        )
        with self.phases.phase("pack"):
            return self.pack_sequences(
                training_sequences(rollouts.groups), aggregation=self.config.loss.aggregation
            )

    def pack_sequences(
        self, sequences: Sequence[TrainingSequence], *, aggregation: Aggregation
    ) -> PackedBatch:
        """Pack sequences into streams that fit this run's layout."""
        run = self.config
        return pack(
            sequences,
            stream_tokens=run.stream_tokens,
            num_ranks=run.policy.parallel.data_parallel_size,
            streams_multiple=run.policy.parallel.microbatch_multiple,
            sequence_multiple=run.policy.parallel.sequence_multiple,
            aggregation=aggregation,
            max_completion_tokens=run.rollout.max_completion_tokens,
            model_flops=ModelFlops.of(self.policy.shape),
        )

    def update(self, step: int, batch: PackedBatch) -> UpdateResult:
        """Apply one optimizer step; all ranks call this.

        Raises:
            NonFiniteError: if loss or gradient is not finite; nothing was changed, and what
                ``prefixrl replay`` needs lies in ``RUN/dumps``.
        """
        self.progress.update(waiting_for="policy update")
        return self._update(step, batch, loss=None, dumps=self.folder.dumps)

    def supervised_update(self, step: int, batch: PackedBatch, loss: LossConfig) -> UpdateResult:
        """Apply one optimizer step of a supervised phase; all ranks call this.

        Args:
            step: counted from the beginning of the phase.
            batch: packed traces.
            loss: its estimator.

        Raises:
            NonFiniteError: as ``update``; the dump lies in ``RUN/dumps/sft``.
        """
        self.phases.begin_step(step, kind="supervised step")
        return self._update(step, batch, loss=loss, dumps=self.folder.dumps / SFT_FOLDER)

    def _update(
        self, step: int, batch: PackedBatch, *, loss: LossConfig | None, dumps: Path
    ) -> UpdateResult:
        """Do the work of an update, and dump one that is not finite."""
        try:
            self.release_engine_memory()
            with self.memory_explained(batch=batch):
                return self.policy.update(batch, loss=loss)
        except NonFiniteError as error:
            self.saves.complete()  # the older state is worth more than the dump
            with self.phases.phase("save"):
                explained_error = dump_and_explain(
                    error,
                    self.policy,
                    batch,
                    loss=loss,
                    folder=dumps,
                    step=step,
                    state=self.saves.state(step),
                )
            raise explained_error from error

    def log_step(
        self, step: int, rollouts: Generated, batch: PackedBatch, update: UpdateResult
    ) -> None:
        """Charge the step's FLOPs on every rank; write metrics and rollouts on rank 0.

        Raises:
            LogprobGapError: if engine and policy disagree, and the run is to stop then.
        """
        self.meter.charge_update_on(
            rollouts.groups,
            num_computed_tokens=update.num_computed_tokens,
            has_reference=self.config.loss.kl != "none",
        )
        over_ranks = rank_metrics(self.topology, update)
        times = self.phases.take()
        if self.metrics is not None:
            figures = {**over_ranks, **self._evaluator.engine.take_metrics(), **times}
            figures |= sync_share(figures)
            self._write_step(step, rollouts, batch, update, figures=figures)
        self.gap_alarm.ring(step, update.metrics)

    def _write_step(
        self,
        step: int,
        rollouts: Generated,
        batch: PackedBatch,
        update: UpdateResult,
        *,
        figures: dict[str, float],
    ) -> None:
        """Write metrics and rollouts of a step; ``figures`` are those of ranks and phases."""
        assert self.metrics is not None, "rank 0 has a metrics writer"
        values = {
            **rollout_metrics(rollouts),
            **self.staleness,
            **update_metrics(update, policy_version=self.policy.policy_version),
            **batch_metrics(batch),
            **self.gap_alarm.metrics(update.metrics),
            **self.meter.metrics(),
            "checkpoint/num_failed_saves": float(self.saves.num_refused),
            **throughput_metrics(update, self.hardware, step_seconds=figures["time/step_seconds"]),
            **figures,
        }
        self.metrics.write("train", step, values)
        self._write_rollouts(step, rollouts, self.metrics)
        self.progress.update(
            step + 1,
            waiting_for="next step",
            reward=values["rollout/reward_mean"],
            all_negative=values["rollout/all_negative_fraction"],
            tokens_per_s=values["rollout/tokens_per_second"],
        )

    def _write_rollouts(self, step: int, rollouts: Generated, metrics: MetricsWriter) -> None:
        """Write the step's rollouts where they are due; all ranks wait while texts are decoded."""
        is_kept = step % self.config.trainer.rollouts_every_steps == 0
        if not is_kept and not metrics.shows_rollouts(step):
            return
        rows = rollout_rows(step, rollouts, self.renderer)
        if is_kept:
            write_rollouts(self.folder.rollouts, step, rows)
        metrics.write_rollouts(step, rows)

    def log_outside(self, step: int) -> None:
        """Write the times that no step's line has; ``step`` is the number of steps done."""
        times = self.phases.take()
        if self.metrics is not None:
            self.metrics.write("outside", step, times)

    def evaluate(self, step: int) -> None:
        """Evaluate the policy after ``step`` steps, write an ``eval`` line; all ranks call this."""
        with self.memory_explained():
            self.supply.drain()
            self.sync_weights()
            with self.phases.phase("eval"):
                self.services.run_on_first(lambda: self._evaluate(step))

    def _evaluate(self, step: int) -> None:
        """Do the work of ``evaluate`` on rank 0."""
        assert self.metrics is not None, "rank 0 has a metrics writer"
        self.progress.update(waiting_for="evaluation")
        values = evaluate_in_training(
            self._evaluator, self.evaluation_sets, self.config.evaluation, label=f"eval/{step}"
        )
        self.saves.evaluations = {step: {k: v for k, v in values.items() if math.isfinite(v)}}
        values |= self.meter.metrics()
        self.metrics.write("eval", step, values)
        self.progress.update(train_accuracy=values["eval/train/accuracy"])

    def is_evaluation_due(self, step: int) -> bool:
        """Return whether the policy after ``step`` steps is evaluated in training."""
        return self.config.evaluation.is_due(step)

    def is_last(self, step: int) -> bool:
        """Return whether the run ends after ``step`` steps; equal on all ranks."""
        return step == self.config.trainer.num_steps or self.is_over_budget()

    def is_over_budget(self) -> bool:
        """Return whether the FLOPs of the steps taken have reached ``trainer.max_flops``.

        Rollouts that wait for their step do not count, so that a resumed run, which finds them in
        its checkpoint, ends after the same step as an undisturbed one. For the same reason what a
        stop interrupted does not count.
        """
        limit = self.config.trainer.max_flops
        waiting = sampling_flops(self.meter.num_parameters, self.supply.num_waiting_tokens)
        return limit is not None and self.meter.course_flops - waiting >= limit

    @property
    def _evaluator(self) -> Evaluator:
        """The evaluator of rank 0."""
        assert self.evaluator is not None, "only rank 0 samples"
        return self.evaluator
