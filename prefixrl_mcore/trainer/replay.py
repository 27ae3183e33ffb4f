"""``prefixrl replay``: the update of a dump once more, in this or another layout."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from prefixrl_mcore.checkpoint.run_checkpoints import read_trainer_state, step_folder
from prefixrl_mcore.checkpoint.save_load import load_checkpoint
from prefixrl_mcore.config.continuation import check_saved_settings
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.repacking import repack
from prefixrl_mcore.observability.run_folder import RunFolder
from prefixrl_mcore.policy.nonfinite import Findings, NonFiniteError
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.policy.topology import initialize, run_on_first, shut_down
from prefixrl_mcore.trainer.dumps import SFT_FOLDER, Dump, dump_path, read_dump
from prefixrl_mcore.trainer.run_policy import build_policy

logger = logging.getLogger(__name__)

FINITE_EXIT_CODE = 3
"""Of ``prefixrl replay``: the update was finite this time (1 is an error, 2 a wrong input)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayedFailure:
    """An update that was not finite again."""

    error: NonFiniteError
    """What it raised."""

    findings: Findings
    """What made it."""


def replay(policy: MegatronPolicy, dump: Dump) -> ReplayedFailure | None:
    """Run the update of a dump; return how it failed, None if it was finite.

    All ranks must call this. A finite update changes the policy.

    Args:
        policy: in the state that met the batch.
        dump: its batch must be packed for the policy's layout.
    """
    try:
        policy.update(dump.batch, loss=dump.loss)
    except NonFiniteError as error:
        findings = policy.find_nonfinite(dump.batch, loss=dump.loss)
        return ReplayedFailure(error=error, findings=findings)
    return None


def run_replay(config: RunConfig, step: int, *, is_sft: bool) -> int:
    """Replay the dump of ``step`` in the run's folder and return the exit code.

    0 if the update is not finite again, ``FINITE_EXIT_CODE`` if it is finite.

    The layout may be another one than the run's: the batch is then packed again.

    Raises:
        ConfigError: if there is no dump of that step, or the settings are not the run's.
    """
    run = RunFolder(config.run_folder)
    folder = run.dumps / SFT_FOLDER if is_sft else run.dumps
    topology = initialize(config.policy.parallel, seed=config.seed)
    try:
        run_on_first(lambda: run.check(config))
        dump = run_on_first(lambda: _read(config, folder, step))
        policy = build_policy(config)
        load_checkpoint(step_folder(folder, step), policy)
        failure = replay(policy, dump)
    finally:
        shut_down()
    if topology.is_first:
        outcome = "the update was finite this time"
        if failure is not None:
            outcome = f"{failure.error}, {failure.findings}"
        logger.info("replay of step %d: %s", step, outcome)
    return FINITE_EXIT_CODE if failure is None else 0


def _read(config: RunConfig, folder: Path, step: int) -> Dump:
    """Return a dump packed for the layout of the config."""
    dump = read_dump(dump_path(folder, step))
    checkpoint = step_folder(folder, step)
    state = read_trainer_state(checkpoint).extra_state
    check_saved_settings(state, config, where=str(checkpoint))
    parallel = config.policy.parallel
    batch = repack(
        dump.batch,
        stream_tokens=config.stream_tokens,
        num_ranks=parallel.data_parallel_size,
        streams_multiple=parallel.microbatch_multiple,
        sequence_multiple=parallel.sequence_multiple,
    )
    if len(batch.streams) != len(dump.batch.streams):
        logger.info(
            "packed again for this layout: %d streams instead of %d",
            len(batch.streams),
            len(dump.batch.streams),
        )
    return replace(dump, batch=batch)
