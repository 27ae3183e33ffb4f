"""The training loop with ``rollout.schedule.overlap``: sampling goes on beside the update."""

from prefixrl_mcore.trainer.loop import ends_after, has_steps_to_take
from prefixrl_mcore.trainer.session import Session
from prefixrl_mcore.trainer.signals import StopSignal


def train_overlapped(session: Session, stop: StopSignal) -> None:
    """Run optimizer steps as ``train`` does, each on rollouts of the weights before.

    The weights go to the engine between two generations. An evaluation, a checkpoint or a planned
    stop waits for the generation under way; a checkpoint holds what it yielded, so that a resumed
    run takes the steps that an undisturbed one takes. A generation that a stop interrupts is begun
    again with the weights of the checkpoint, since those that it began with are no more. All ranks
    call this.

    Raises:
        SamplingInterrupted: as ``train``.
    """
    if not has_steps_to_take(session):
        return
    num_steps = session.config.trainer.num_steps
    stop.begin_steps()
    session.begin_steps()
    for step in range(session.num_steps_done, num_steps):
        with session.step(step):
            with session.saves.if_engine_is_lost(step):
                if not session.supply.is_begun:
                    session.sync_weights()
                    session.supply.begin(step)
                session.supply.drain()
                session.sync_weights()
                rollouts = session.supply.take(step)
            if step + 1 < num_steps:
                session.supply.begin(step + 1)
            batch = session.pack(rollouts)
            update = session.update(step, batch)
            session.log_step(step, rollouts, batch, update)
        if ends_after(session, stop, step + 1):
            return
