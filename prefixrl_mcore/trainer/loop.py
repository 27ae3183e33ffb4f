"""The training loop: sync weights, sample groups, verify, one Megatron step."""

import logging

from prefixrl_mcore.trainer.session import Session
from prefixrl_mcore.trainer.signals import StopSignal

logger = logging.getLogger(__name__)


def train(session: Session, stop: StopSignal) -> None:
    """Run optimizer steps until ``trainer.num_steps``, a FLOPs limit or a stop signal.

    Strictly on-policy: every group is sampled from the weights that the step then updates. All
    ranks call this; rank 0 talks to the engine and the verifier. The last step is evaluated and
    saved, also when a signal or the FLOPs limit made it the last.
    """
    run = session.config
    first_step = session.first_step
    if session.is_over_budget():
        if not session.has_checkpoint():
            session.save(first_step)
        logger.info("no step to take: %d done, trainer.max_flops is spent", first_step)
        return
    for step in range(first_step, run.trainer.num_steps):
        session.sync_weights()
        prefixed_problems = session.source.take(run.batch.prompts_per_step)
        groups = session.sample_and_score(prefixed_problems, step)
        batch = session.pack(groups)
        update = session.update(batch)
        session.log_step(step, groups, batch, update)

        done = step + 1
        is_last = done == run.trainer.num_steps or session.is_over_budget() or stop.is_set()
        if is_last or done % run.evaluation.every_steps == 0:
            session.evaluate(done)
        if is_last or done % run.checkpoint.every_steps == 0:
            session.save(done)
        if is_last:
            logger.info("stopped after step %d of %d", done, run.trainer.num_steps)
            return
