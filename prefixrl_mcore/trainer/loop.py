"""The training loop: sync weights, sample groups, verify, one Megatron step."""

import logging

from prefixrl_mcore.trainer.session import Session
from prefixrl_mcore.trainer.signals import StopSignal

logger = logging.getLogger(__name__)


def train(session: Session, stop: StopSignal) -> None:
    """Run optimizer steps until ``trainer.num_steps``, a FLOPs limit, a signal or a time limit.

    Strictly on-policy: every group is sampled from the weights that the step then updates. All
    ranks call this; rank 0 talks to the engine and the verifier. The last step is evaluated and
    saved. A run that is told to stop early saves and leaves an evaluation that is due to the
    resumed run, because the time that it is given may be short.
    """
    run = session.config
    first_step = session.first_step
    if session.owes_evaluation:
        session.evaluate(first_step)
        if run.checkpoint.keep_best is not None:  # saved without its metrics, it was never the best
            session.checkpoint(first_step, is_last=False, is_due=True)
    if session.is_over_budget():
        if not session.has_checkpoint():
            session.checkpoint(first_step, is_last=True)
        logger.info("no step to take: %d done, trainer.max_flops is spent", first_step)
        return
    stop.begin_steps()
    session.begin_steps()
    for step in range(first_step, run.trainer.num_steps):
        with session.step(step):
            session.sync_weights()
            prefixed_problems = session.source.take(run.batch.prompts_per_step)
            groups = session.sample_and_score(prefixed_problems, step)
            batch = session.pack(groups)
            update = session.update(step, batch)
            session.log_step(step, groups, batch, update)

        done = step + 1
        is_last = done == run.trainer.num_steps or session.is_over_budget()
        is_stopping = not is_last and stop.is_set(session.saver.seconds_to_stop)
        if is_last or (session.is_evaluation_due(done) and not is_stopping):
            session.evaluate(done)
        session.checkpoint(done, is_last=is_last or is_stopping)
        if is_last or is_stopping:
            session.log_outside(done)
            logger.info("stopped after step %d of %d", done, run.trainer.num_steps)
            return
