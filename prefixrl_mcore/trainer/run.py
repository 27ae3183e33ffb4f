"""``prefixrl train``: build a session on this rank, resume if asked, train, leave it tidy."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from prefixrl_mcore.checkpoint.run_checkpoints import read_trainer_state
from prefixrl_mcore.checkpoint.save_load import clean_up, latest_checkpoint, load_checkpoint
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.continuation import check_same_inputs, check_saved_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.observability.heartbeat import Heartbeat, last_request
from prefixrl_mcore.observability.lease import Lease
from prefixrl_mcore.observability.metrics import MetricsWriter
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.observability.progress import Progress
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.policy.topology import initialize, run_on_first, shut_down
from prefixrl_mcore.trainer import dry_run
from prefixrl_mcore.trainer.build import build_session, read_sft_traces
from prefixrl_mcore.trainer.initial_model import provide_initial_model, with_initial_model
from prefixrl_mcore.trainer.loop import saved_if_interrupted, train
from prefixrl_mcore.trainer.overlapped_loop import train_overlapped
from prefixrl_mcore.trainer.session import Session
from prefixrl_mcore.trainer.sft import run_sft
from prefixrl_mcore.trainer.signals import StopSignal, TimeLimit

logger = logging.getLogger(__name__)


def run_training(
    config: RunConfig,
    *,
    resume: bool,
    predicted_bytes: float | None = None,
    init: Path | None = None,
) -> int:
    """Train as the config says and return the exit code; every rank calls this.

    Args:
        config: what to do.
        resume: continue the run of the folder.
        predicted_bytes: memory of a rank that ``prefixrl check`` predicts, told beside what is
            measured.
        init: initial model in place of ``model.path``; see ``initial_model.py``.

    Raises:
        ConfigError: if the folder holds another run, or one that ``resume`` was not given for, or
            another trainer writes to it.
    """
    start, started = time.perf_counter(), time.time()
    config = with_initial_model(config, init)
    folder = RunFolder(config.run_folder)
    _check_start(folder, config, resume=resume)
    with ExitStack() as stack:
        topology = initialize(config.policy.parallel, seed=config.seed)
        stack.callback(shut_down)
        run_on_first(lambda: folder.check(config))
        if resume:
            run_on_first(lambda: _hold(folder, stack))
        run_on_first(lambda: provide_initial_model(config, init))
        stop = StopSignal(TimeLimit(config.trainer, started=started))
        phases = Phases()
        stack.enter_context(
            Heartbeat(
                folder.heartbeats,
                rank=topology.rank,
                world_size=topology.world_size,
                stage=topology.pp_rank,
                phases=phases,
                config=config.trainer.stall,
                last_request=run_on_first(lambda: last_request(folder.heartbeats)),
            )
        )
        session = build_session(
            config,
            folder,
            topology,
            stack,
            phases=phases,
            stop=stop,
            predicted_bytes=predicted_bytes,
        )
        checkpoint = None
        if resume:
            every_steps = config.checkpoint.every_steps
            checkpoint = run_on_first(lambda: _recover(folder, every_steps))
        else:  # no earlier: a mistyped path claims no folder
            run_on_first(lambda: _hold(folder, stack))
        run_on_first(lambda: folder.claim(config))
        if checkpoint is not None:
            restore(session, checkpoint)
        _open_outputs(session, is_continued=checkpoint is not None)
        if dry_run.is_wanted(session):
            dry_run.take_dry_run_step(session)
        with saved_if_interrupted(session, stop):
            _train(session, stop, is_new=checkpoint is None)
        end_together(session, seconds=time.perf_counter() - start)
        return stop.exit_code


def end_together(session: Session, *, seconds: float) -> None:
    """Close the outputs on rank 0 while the others wait; all ranks call this.

    Metrics may be uploaded for minutes; who starts the ranks, such as srun, ends those that are
    left some time after the first.
    """

    def close() -> None:
        session.folder.add_stage_seconds("train", seconds)
        if session.metrics is not None:
            session.metrics.close()

    run_on_first(close)


def _train(session: Session, stop: StopSignal, *, is_new: bool) -> None:
    """Run the phases of the method, up to its end or a stop; all ranks call this."""
    config = session.config
    if is_new:
        if config.method == "sft_then_rl":
            run_sft(session, read_sft_traces(config, session.renderer), stop)
        if not stop.is_stopping():
            session.evaluate(0)
    if stop.is_stopping():
        session.log_outside(session.num_steps_done)
        return
    loop = train_overlapped if config.rollout.schedule.overlap else train
    loop(session, stop)


def _check_start(folder: RunFolder, config: RunConfig, *, resume: bool) -> None:
    """Refuse to write over a run that was started before, and to resume what is not there.

    Raises:
        ConfigError: naming the remedy.
    """
    if resume and not folder.config_file.exists():
        raise ConfigError(
            f"run_folder {config.run_folder}: holds no run to resume; check the path, or start "
            "without --resume"
        )
    if resume or not folder.metrics_file.exists():
        return
    raise ConfigError(
        f"run_folder {config.run_folder}: holds a training run already; continue it with --resume, "
        "or choose another --run-folder. Nothing was changed."
    )


def _hold(folder: RunFolder, stack: ExitStack) -> None:
    """Take the run folder for this trainer until the stack is closed.

    Raises:
        ConfigError: if another trainer writes to it.
    """
    stack.enter_context(Lease(folder.lease_file))


def _recover(folder: RunFolder, every_steps: int) -> Path | None:
    """Tidy up after a killed save and return the newest complete checkpoint.

    None for a run that was killed before its first checkpoint was complete; it begins anew. Steps
    beyond ``every_steps`` do not say that there was one: the first save may have been in the
    background still, or refused. It leaves the folder all the same, and a complete one ``latest``.

    Raises:
        ConfigError: if a checkpoint was complete once and none is now, or the folder is gone, so
            that beginning anew would throw a run away.
    """
    clean_up(folder.checkpoints)
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is not None:
        return checkpoint
    num_steps = _count_logged_steps(folder.metrics_file)
    had_one = any(folder.checkpoints.glob("step-*")) or folder.latest_file.exists()
    is_gone = num_steps > every_steps and not folder.checkpoints.is_dir()
    if had_one or is_gone:
        raise ConfigError(
            f"{folder.checkpoints}: {num_steps} steps were run, but there is no complete "
            "checkpoint to resume from; restore one, or start in another --run-folder. No "
            "checkpoint and no metric was changed."
        )
    logger.warning("%s: no checkpoint yet, the run begins anew", folder.path)
    return None


def _count_logged_steps(metrics_file: Path) -> int:
    """Return the optimizer steps that the metrics tell of."""
    if not metrics_file.exists():
        return 0
    return sum('"kind": "train"' in line for line in metrics_file.read_text().splitlines())


def restore(session: Session, checkpoint: Path) -> None:
    """Put the session into the state of a checkpoint; all ranks call this.

    Raises:
        ConfigError: if the checkpoint was saved under settings that may not change, or with
            another tokenizer or reference.
        CheckpointError: if it is incomplete, corrupt, or of another model.
    """
    step, state = load_checkpoint(checkpoint, session.policy)
    check_saved_settings(state, session.config, where=str(checkpoint))
    check_same_inputs(state["inputs"], session.saves.input_digests, where=str(checkpoint))
    session.source.load_state(state["source"])
    session.supply.load_state(state["rollouts"])
    session.meter.load_state(state["flops"])
    session.num_steps_done = step
    session.saves.saver.resume_from(step)
    session.saves.saver.longest_seconds = state["save_seconds"]
    if state["is_evaluated"]:
        session.saves.evaluations = {step: read_trainer_state(checkpoint).metrics}
    else:
        session.owes_evaluation = session.is_evaluation_due(step) or session.is_last(step)
    num_steps = session.config.trainer.num_steps
    logger.info("resumed from %s: %d of %d steps done", checkpoint, step, num_steps)
    if session.evaluator is not None and not session.evaluator.engine.is_seeded:
        logger.info(
            "%s does not repeat samples: trainer state continues exactly, new rollouts differ "
            "from those that an undisturbed run would have sampled",
            session.evaluator.engine.name,
        )


def _drop_rollouts_beyond(folder: RunFolder, step: int) -> None:
    """Remove rollout tables of steps that will be run again."""
    for path in folder.rollouts.glob("step-*.parquet"):
        if int(path.stem.removeprefix("step-")) >= step:
            path.unlink()


def _open_outputs(session: Session, *, is_continued: bool) -> None:
    """Open metrics and progress on rank 0, without what lies beyond the checkpoint."""
    if not session.topology.is_first:
        return
    _drop_rollouts_beyond(session.folder, session.num_steps_done)
    session.metrics = MetricsWriter(
        session.folder,
        session.config.metrics,
        num_steps_done=session.num_steps_done if is_continued else None,
    )
    session.stack.callback(session.metrics.close)
    session.progress = session.stack.enter_context(
        Progress(
            f"train {session.config.method}",
            total=session.config.trainer.num_steps,
            file=session.folder.progress_file,
        )
    )
    session.progress.update(session.num_steps_done)
    session.supply.on_wait = lambda what: session.progress.update(waiting_for=what)
    session.saves.on_wait = session.supply.on_wait
    session.saves.wandb_id = session.metrics.wandb_id
