"""The supervised phase of ``sft_then_rl``: traces as completions, epoch chosen by held-back loss.

Supervised fine-tuning is REINFORCE with advantage 1 on recorded completions, so it runs through
the same packing, policy update and accounting. At small scale a memorising SFT reaches a high
accuracy on its training problems and none elsewhere; the validation loss stops it before that.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from prefixrl_mcore.checkpoint.retention import Retention
from prefixrl_mcore.checkpoint.save_load import (
    clean_up,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.policy import LossConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.policy.topology import run_on_first
from prefixrl_mcore.records import Trace, TrainingSequence
from prefixrl_mcore.trainer.session import Session
from prefixrl_mcore.trainer.signals import StopSignal

logger = logging.getLogger(__name__)

MAXIMUM_LIKELIHOOD = LossConfig()
"""Plain log-likelihood: no importance weight, no entropy bonus, mean over tokens."""


def run_sft(session: Session, traces: Sequence[Trace], stop: StopSignal) -> None:
    """Train on the traces and keep the epoch that ``sft.keep`` names.

    All ranks call this. The start and each epoch to be kept are saved under ``sft/``; a killed
    phase continues after the last one. An epoch that the storage refuses is logged, counted and not
    kept. Epochs that did not help are charged all the same. Leaves the policy with fresh optimizer
    state for RL.

    Raises:
        ConfigError: if there are too few traces to hold some back.
        SaveError: if the storage refuses the start or the last epoch.
        NonFiniteError: if a loss or gradient is not finite; ``RUN/dumps/sft`` has what ``prefixrl
            replay --sft`` needs.
    """
    run = session.config
    training, validation = split_traces(traces, run.sft.validation_fraction, seed=run.seed)
    folder = session.folder.path / "sft"
    validation_batch = _pack(session, validation)
    session.policy.reset_optimizer(run.sft.lr)
    run_on_first(lambda: clean_up(folder))
    latest = latest_checkpoint(folder)
    if latest is None:
        best_loss, first_epoch = _validation_loss(session, validation_batch), 0
        _save_epoch(session, folder, 0, best_loss)
    else:
        first_epoch, state = load_checkpoint(latest, session.policy)
        best_loss = state["validation_loss"]
        session.meter.load_state(state["flops"])
    if session.metrics is not None:
        session.metrics.drop_sft_beyond(first_epoch)
    kept_epoch = first_epoch
    stop.begin_steps()
    for epoch in range(first_epoch, run.sft.max_epochs):
        _train_epoch(session, training, epoch)
        loss = _validation_loss(session, validation_batch)
        _log_epoch(session, epoch + 1, loss)
        if run.sft.keep == "last" or loss < best_loss:
            is_last = epoch + 1 == run.sft.max_epochs
            # A refused epoch is not kept: the next one that is better than the kept one is saved.
            with nullcontext() if is_last else session.refusal_counted():
                _save_epoch(session, folder, epoch + 1, loss)
                best_loss, kept_epoch = loss, epoch + 1
        elif epoch + 1 - kept_epoch >= run.sft.patience:
            break
        if stop.is_set():
            logger.warning("sft: stopped after epoch %d; --resume goes on from here", epoch + 1)
            return
    session.phases.end_steps()
    best = latest_checkpoint(folder)
    assert best is not None, "epoch 0 was saved before the first epoch"
    best_epoch, _ = load_checkpoint(best, session.policy)
    session.policy.reset_optimizer(run.policy.optimizer.lr)
    if best_epoch == 0:
        logger.warning(
            "sft: no epoch improved the validation loss %.4f; RL starts from the initial weights. "
            "Lower sft.lr (%g) or collect more traces",
            best_loss,
            run.sft.lr,
        )
    logger.info("sft: kept epoch %d, validation loss %.4f nats per token", best_epoch, best_loss)


def _save_epoch(session: Session, folder: Path, epoch: int, validation_loss: float) -> None:
    """Save the best epoch so far, in place of the one before."""
    state = {"validation_loss": validation_loss, "flops": session.meter.state()}
    save_checkpoint(folder, epoch, session.policy, state, Retention(keep_last=1))


def split_traces(
    traces: Sequence[Trace], validation_fraction: float, *, seed: int
) -> tuple[list[Trace], list[Trace]]:
    """Return (training, validation) traces, split at random with a fixed seed.

    Raises:
        ConfigError: if a side would be empty.
    """
    order = np.random.default_rng([seed, 1]).permutation(len(traces))
    num_validation = round(validation_fraction * len(traces))
    if not 0 < num_validation < len(traces):
        raise ConfigError(
            f"sft.validation_fraction {validation_fraction} of {len(traces)} traces leaves nothing "
            "to train on or to validate on; collect more traces or change the fraction"
        )
    chosen = [traces[index] for index in order]
    return chosen[num_validation:], chosen[:num_validation]


def _train_epoch(session: Session, training: Sequence[Trace], epoch: int) -> None:
    """Pass once over the training traces in a random order of this epoch."""
    run = session.config
    order = np.random.default_rng([run.seed, 2, epoch]).permutation(len(training))
    starts = range(0, len(training), run.sft.traces_per_step)
    for step, start in enumerate(starts, start=epoch * len(starts)):
        chosen = [training[index] for index in order[start : start + run.sft.traces_per_step]]
        session.progress.update(waiting_for=f"sft epoch {epoch + 1}")
        update = session.supervised_update(step, _pack(session, chosen), MAXIMUM_LIKELIHOOD)
        session.meter.charge_sft(
            _num_tokens(chosen), num_computed_tokens=update.num_computed_tokens
        )


def _validation_loss(session: Session, batch: PackedBatch) -> float:
    """Return the mean negative logprob of the held-back traces, nats per completion token."""
    statistics = session.policy.row_statistics(batch)
    return -sum(float(logprobs.sum()) for logprobs, _ in statistics) / batch.num_trained_tokens


def _log_epoch(session: Session, epoch: int, loss: float) -> None:
    """Log one epoch, and write it to the metrics of rank 0."""
    logger.info("sft epoch %d: validation loss %.4f nats per token", epoch, loss)
    if session.metrics is not None:
        values = {"loss/validation_nats": loss, **session.meter.metrics()}
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


def _num_tokens(traces: Sequence[Trace]) -> int:
    """Return prompt and completion tokens of the traces."""
    return sum(len(t.prompt_token_ids) + len(t.completion_token_ids) for t in traces)
