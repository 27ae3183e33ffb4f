"""The supervised phase of ``sft_then_rl``: traces as completions, epoch chosen by held-back loss.

Supervised fine-tuning is REINFORCE with advantage 1 on recorded completions, so it runs through
the same packing, policy update and accounting. At small scale a memorising SFT reaches a high
accuracy on its training problems and none elsewhere; the validation loss stops it before that.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefixrl_mcore.checkpoint.retention import Retention
from prefixrl_mcore.checkpoint.run_checkpoints import read_trainer_state
from prefixrl_mcore.checkpoint.save_load import (
    clean_up,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.config.sft import SftConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.policy.topology import run_on_first
from prefixrl_mcore.records import Trace, TrainingSequence
from prefixrl_mcore.trainer.session import Session
from prefixrl_mcore.trainer.signals import StopSignal

logger = logging.getLogger(__name__)

STOPPED_FOLDER = "stopped"
"""Inside ``RUN/sft``: the step at which a phase was told to stop."""

MAXIMUM_LIKELIHOOD = LossConfig()
"""Plain log-likelihood: no importance weight, no entropy bonus, mean over tokens."""


@dataclass(kw_only=True, slots=True)
class _Position:
    """How far the phase has come."""

    step: int
    """Optimizer steps taken, over all epochs."""

    best_epoch: int
    """Epoch that is kept so far; 0 is the start."""

    best_loss: float
    """Its validation loss, nats per token."""

    learning_rate: float = 0.0
    """Of the last step of this start."""

    save_seconds: float = 0.0
    """Longest save since this start."""


def run_sft(session: Session, traces: Sequence[Trace], stop: StopSignal) -> None:
    """Train on the traces and keep the epoch that ``sft.keep`` names.

    All ranks call this. The start and each epoch to be kept are saved under ``sft/``; a killed
    phase continues after the last one. A phase that is told to stop saves the step that it has
    reached under ``sft/stopped/``, beside the kept epoch, and continues there. An epoch that the
    storage refuses is logged, counted and not kept. Epochs that did not help are charged all the
    same. Leaves the policy with fresh optimizer state for RL.

    Raises:
        ConfigError: if there are too few traces to hold some back.
        SaveError: if the storage refuses the start or the last epoch.
        NonFiniteError: if a loss or gradient is not finite; ``RUN/dumps/sft`` has what ``prefixrl
            replay --sft`` needs.
    """
    run = session.config
    training, validation = split_traces(traces, run.sft, seed=run.seed)
    folder = session.folder.path / "sft"
    validation_batch = _pack(session, validation)
    steps_per_epoch = run.sft.steps_per_epoch(len(training))
    num_steps = run.sft.max_epochs * steps_per_epoch
    session.policy.reset_optimizer(run.sft.lr, num_steps=num_steps)
    at = _begin(session, folder, validation_batch, steps_per_epoch)
    if session.metrics is not None:
        session.metrics.drop_sft_beyond(at.step // steps_per_epoch)
    stop.begin_steps()
    while at.step < num_steps:
        at.learning_rate = _train_step(session, training, at.step, steps_per_epoch)
        at.step += 1
        epoch, num_steps_beyond = divmod(at.step, steps_per_epoch)
        if num_steps_beyond == 0 and _end_epoch(session, folder, epoch, validation_batch, at):
            break
        if stop.is_set(at.save_seconds):
            if at.step != at.best_epoch * steps_per_epoch:
                _save_step(session, folder, at.step)
            logger.warning("sft: stopped after step %d; --resume goes on from here", at.step)
            return
    session.phases.end_steps()
    _finish(session, folder, at.best_loss)


def _begin(
    session: Session, folder: Path, validation_batch: PackedBatch, steps_per_epoch: int
) -> _Position:
    """Save the start, or restore the step at which the phase was stopped or its kept epoch."""
    stopped_folder = folder / STOPPED_FOLDER
    run_on_first(lambda: (clean_up(folder), clean_up(stopped_folder)))
    best, stopped = run_on_first(
        lambda: (latest_checkpoint(folder), latest_checkpoint(stopped_folder))
    )
    if best is None:
        loss = _validation_loss(session, validation_batch)
        seconds = _save_epoch(session, folder, 0, loss)
        return _Position(step=0, best_epoch=0, best_loss=loss, save_seconds=seconds)
    kept = read_trainer_state(best)
    at = _Position(
        step=kept.step * steps_per_epoch,
        best_epoch=kept.step,
        best_loss=kept.extra_state["validation_loss"],
    )
    if stopped is not None and read_trainer_state(stopped).step > at.step:
        at.step, state = load_checkpoint(stopped, session.policy)
    else:
        _, state = load_checkpoint(best, session.policy)
    session.meter.load_state(state["flops"])
    return at


def _end_epoch(
    session: Session, folder: Path, epoch: int, validation_batch: PackedBatch, at: _Position
) -> bool:
    """Validate, log and perhaps keep an epoch; return whether patience is at its end."""
    config = session.config.sft
    loss = _validation_loss(session, validation_batch)
    _log_epoch(session, epoch, loss, at.learning_rate)
    if config.keep == "last" or loss < at.best_loss:
        # A refused epoch is not kept: the next one that is better than the kept one is saved.
        with nullcontext() if epoch == config.max_epochs else session.saves.refusal_counted():
            seconds = _save_epoch(session, folder, epoch, loss)
            at.best_loss, at.best_epoch = loss, epoch
            at.save_seconds = max(at.save_seconds, seconds)
        return False
    return epoch - at.best_epoch >= config.patience


def _finish(session: Session, folder: Path, best_loss: float) -> None:
    """Give the policy the weights of the kept epoch and fresh optimizer state."""
    run = session.config
    best = run_on_first(lambda: latest_checkpoint(folder))
    assert best is not None, "epoch 0 was saved before the first epoch"
    best_epoch, _ = load_checkpoint(best, session.policy)
    session.policy.reset_optimizer(run.policy.optimizer.lr, num_steps=run.trainer.num_steps)
    if best_epoch == 0:
        logger.warning(
            "sft: no epoch improved the validation loss %.4f; RL starts from the initial weights. "
            "Lower sft.lr (%g) or collect more traces",
            best_loss,
            run.sft.lr,
        )
    logger.info("sft: kept epoch %d, validation loss %.4f nats per token", best_epoch, best_loss)


def _save_epoch(session: Session, folder: Path, epoch: int, validation_loss: float) -> float:
    """Save the best epoch so far, in place of the one before; return the seconds that it took."""
    begin = time.monotonic()
    state = {"validation_loss": validation_loss, "flops": session.meter.state()}
    save_checkpoint(folder, epoch, session.policy, state, Retention(keep_last=1))
    return time.monotonic() - begin


def _save_step(session: Session, folder: Path, step: int) -> None:
    """Save the step at which the phase stops; a refused one is counted, and its work is lost."""
    state = {"flops": session.meter.state()}
    with session.saves.refusal_counted():
        save_checkpoint(
            folder / STOPPED_FOLDER, step, session.policy, state, Retention(keep_last=1)
        )


def split_traces(
    traces: Sequence[Trace], sft: SftConfig, *, seed: int
) -> tuple[list[Trace], list[Trace]]:
    """Return (training, validation) traces, split at random with a fixed seed.

    Raises:
        ConfigError: if a side would be empty.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(traces))
    num_validation = sft.num_held_back(len(traces))
    chosen = [traces[index] for index in order]
    return chosen[num_validation:], chosen[:num_validation]


def _train_step(
    session: Session, training: Sequence[Trace], step: int, steps_per_epoch: int
) -> float:
    """Take one optimizer step and return its learning rate; each epoch has its own order."""
    run = session.config
    epoch, index = divmod(step, steps_per_epoch)
    order = np.random.default_rng([run.seed, 2, epoch]).permutation(len(training))
    first = index * run.sft.traces_per_step
    chosen = [training[index] for index in order[first : first + run.sft.traces_per_step]]
    session.progress.update(waiting_for=f"sft epoch {epoch + 1}")
    update = session.supervised_update(step, _pack(session, chosen), MAXIMUM_LIKELIHOOD)
    session.meter.charge_sft(
        sum(t.num_tokens for t in chosen), num_computed_tokens=update.num_computed_tokens
    )
    return update.learning_rate


def _validation_loss(session: Session, batch: PackedBatch) -> float:
    """Return the mean negative logprob of the held-back traces, nats per completion token."""
    statistics = session.policy.row_statistics(batch)
    return -sum(float(logprobs.sum()) for logprobs, _ in statistics) / batch.num_trained_tokens


def _log_epoch(session: Session, epoch: int, loss: float, learning_rate: float) -> None:
    """Log one epoch, and write it to the metrics of rank 0."""
    logger.info("sft epoch %d: validation loss %.4f nats per token", epoch, loss)
    if session.metrics is not None:
        values = {"loss/validation_nats": loss, "policy/learning_rate": learning_rate}
        values |= session.meter.metrics()
        session.metrics.write("sft", epoch, values)


def _pack(session: Session, traces: Sequence[Trace]) -> PackedBatch:
    """Pack traces as sequences whose completion is the whole trace."""
    sequences = [
        TrainingSequence(
            sequence_id=trace.trace_id,
            group_index=index,
            context_token_ids=trace.prompt_token_ids,
            completion_token_ids=trace.completion_token_ids,
            advantage=1.0,
        )
        for index, trace in enumerate(traces)
    ]
    return session.pack_sequences(sequences, aggregation="token_mean")
