"""The training loop: sync weights, sample groups, verify, one Megatron step."""

import logging

from prefixrl_mcore.trainer.session import Session
from prefixrl_mcore.trainer.signals import StopSignal

logger = logging.getLogger(__name__)


def train(session: Session, stop: StopSignal) -> None:
    """Run optimizer steps until ``trainer.num_steps``, a FLOPs limit, a signal or a time limit.

    Strictly on-policy unless ``[rollout.schedule]`` says otherwise: every group is sampled from the
    weights that the step then updates. All ranks call this; rank 0 talks to the engine and the
    verifier. The last step is evaluated and saved. A run that is told to stop early saves and
    leaves an evaluation that is due to the resumed run, because the time that it is given may be
    short.
    """
    if not has_steps_to_take(session):
        return
    stop.begin_steps()
    session.begin_steps()
    for step in range(session.first_step, session.config.trainer.num_steps):
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
    first_step = session.first_step
    if session.owes_evaluation:
        session.evaluate(first_step)
        if session.config.checkpoint.keep_best is not None:
            # Saved without its metrics, it was never the best.
            session.saves.checkpoint(first_step, is_last=False, is_due=True)
    if not session.is_over_budget():
        return True
    if not session.saves.has_any():
        session.saves.checkpoint(first_step, is_last=True)
    logger.info("no step to take: %d done, trainer.max_flops is spent", first_step)
    return False


def ends_after(session: Session, stop: StopSignal, done: int) -> bool:
    """Evaluate and save what is due after ``done`` steps; return whether they were the last.

    All ranks call this.
    """
    is_last = done == session.config.trainer.num_steps or session.is_over_budget()
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
