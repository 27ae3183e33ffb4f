"""The training loop: sync weights, sample groups, verify, one Megatron step."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from prefixrl_mcore.rollout.interruption import SamplingInterrupted
from prefixrl_mcore.trainer.session import Session
from prefixrl_mcore.trainer.signals import StopSignal

logger = logging.getLogger(__name__)


def train(session: Session, stop: StopSignal) -> None:
    """Run optimizer steps until ``trainer.num_steps``, a FLOPs limit, a signal or a time limit.

    Strictly on-policy unless ``[rollout.schedule]`` says otherwise: every group is sampled from the
    weights that the step then updates. All ranks call this; rank 0 talks to the engine and the
    verifier. The last step is evaluated and saved. A run that is told to stop early saves and
    leaves an evaluation that is due to the resumed run, because the time that it is given may be
    short; for the same reason sampling under way is interrupted.

    Raises:
        SamplingInterrupted: on every rank, with nothing changed since the last whole step.
    """
    if not has_steps_to_take(session):
        return
    stop.begin_steps()
    session.begin_steps()
    for step in range(session.num_steps_done, session.config.trainer.num_steps):
        with session.step(step):
            with session.saves.if_engine_is_lost(step):
                session.sync_weights()
                rollouts = session.supply.sample(step)
            batch = session.pack(rollouts)
            update = session.update(step, batch)
            session.log_step(step, rollouts, batch, update)
        if ends_after(session, stop, step + 1):
            return


def has_steps_to_take(session: Session) -> bool:
    """Make up for what an earlier start owes; return whether the budget allows a step.

    All ranks call this.
    """
    done = session.num_steps_done
    if session.owes_evaluation:
        is_last = session.is_last(done)
        session.evaluate(done)
        if is_last or session.config.checkpoint.keep_best is not None:
            # Saved without its metrics, it was never the best, and would be evaluated once more.
            session.saves.checkpoint(done, is_last=is_last, is_due=True)
    if not session.is_over_budget():
        return True
    if not session.saves.has_any():
        session.saves.checkpoint(done, is_last=True)
    logger.info("no step to take: %d done, trainer.max_flops is spent", done)
    return False


def ends_after(session: Session, stop: StopSignal, done: int) -> bool:
    """Evaluate and save what is due after ``done`` steps; return whether they were the last.

    All ranks call this.
    """
    is_last = session.is_last(done)
    is_stopping = not is_last and stop.is_set(session.saves.saver.seconds_to_stop)
    with session.saves.if_engine_is_lost(done):
        if is_last or (session.is_evaluation_due(done) and not is_stopping):
            session.evaluate(done)
        session.saves.checkpoint(done, is_last=is_last or is_stopping)
    if not (is_last or is_stopping):
        return False
    session.log_outside(done)
    logger.info("stopped after step %d of %d", done, session.config.trainer.num_steps)
    return True


@contextmanager
def saved_if_interrupted(session: Session, stop: StopSignal) -> Iterator[None]:
    """Save the last whole step, and go on, if a stop interrupts the sampling inside.

    All ranks call this. Source and carried rollouts are as they were, so that the resumed run
    samples again what was interrupted, with the same seeds, and from the weights that are saved:
    beside an update older ones had been sampling.

    Raises:
        SaveError: if the storage refuses.
    """
    try:
        yield
    except SamplingInterrupted as interruption:
        done = session.num_steps_done
        is_stopping = stop.is_set(session.saves.saver.seconds_to_stop)
        assert is_stopping, "only a stop interrupts"
        logger.warning("%s; saving the state after %d steps", interruption, done)
        session.saves.checkpoint(done, is_last=True)
        session.log_outside(done)
