"""Saving the checkpoints of a run, one at a time, at once or beside the training steps.

A save has three parts. ``start`` plans and, for a save in the background, copies; ``write`` runs on
each rank alone, in a thread if in the background; ``finish`` is collective again: index, read-back,
manifest, ``latest``, retention. The training step waits for the first and the last part only. The
folder has its final name after the last part and not before, so that a kill anywhere leaves the
checkpoints that were there.
"""

import logging
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.checkpointable import CheckpointablePolicy, write_hf_files
from prefixrl_mcore.checkpoint.manifest import ManifestEntry, ReadBackError, SaveError
from prefixrl_mcore.checkpoint.megatron_state import stage_megatron
from prefixrl_mcore.checkpoint.retention import KEEP_ALL, Retention
from prefixrl_mcore.checkpoint.run_checkpoints import (
    HF_FOLDER,
    MEGATRON_FOLDER,
    TrainerState,
    check_json,
    clean_up,
    later_checkpoints,
    publish,
    step_folder,
    write_trainer_state,
)
from prefixrl_mcore.checkpoint.staged import StagedState, agree_on_errors
from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.topology import any_rank, run_on_first

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class _Pending:
    """A save between ``start`` and ``finish``."""

    final: Path
    """Name that the checkpoint will have."""

    temporary: Path
    """Where it is written."""

    staged: StagedState
    """This rank's share."""

    thread: threading.Thread | None = None
    """The writer in the background; None writes in ``finish``."""

    written: dict[str, ManifestEntry] = field(default_factory=dict)
    """What was written to this rank's files, by name; empty until they are."""

    error: BaseException | None = None
    """What stopped the writer of this rank."""

    started: float
    """When ``start`` was called, monotonic seconds."""

    seconds: float
    """Time that the save has taken so far, without waiting for a step boundary."""

    def write(self) -> None:
        """Write this rank's files; errors are kept for ``finish``, where all ranks meet."""
        begin = time.monotonic()
        try:
            self.written = self.staged.write()
        except Exception as error:  # outermost frame of the writer: told to every rank in finish
            self.error = error
        self.seconds += time.monotonic() - begin


class CheckpointSaver:
    """Writes checkpoints into one folder; at most one save is under way."""

    def __init__(
        self, folder: Path, retention: Retention = KEEP_ALL, *, in_background: bool = False
    ) -> None:
        """Remember where and how; nothing is written yet.

        Args:
            folder: the run's ``checkpoints`` folder, on storage that all ranks see; made if needed.
            retention: which checkpoints are kept; the newest always is.
            in_background: write beside the training steps, from a copy in host memory.
        """
        self._folder = folder
        self._retention = retention
        self._in_background = in_background
        self.longest_seconds = 0.0
        """Longest complete save, from its start until it was sealed; of this rank."""
        self.num_untidy = 0
        """Complete saves after which ``latest`` or the deletion of older ones was refused."""
        self._pending: _Pending | None = None
        self._abandoned = frozenset[str]()

    def resume_from(self, step: int) -> None:
        """Take the checkpoints of later steps for those of a course that the run has left.

        They stay until the next save is complete, do not count in its retention, and go with it
        (unless the retention keeps all).
        """
        if dist.get_rank() != 0:  # rank 0 deletes
            return
        self._abandoned = later_checkpoints(self._folder, step)
        if self._abandoned:
            logger.warning(
                "resumed from step %d: the checkpoints %s are of a course that the run has left; "
                "the next save deletes them unless checkpoint.keep_last keeps all",
                step,
                ", ".join(sorted(self._abandoned)),
            )

    def start(
        self,
        step: int,
        policy: CheckpointablePolicy,
        extra_state: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save; all ranks must call this, with the same step, and none under way.

        The policy may change as soon as this returns if the saver works in the background;
        otherwise not before ``finish``. What killed saves left in the folder is removed first.

        Args:
            step: step of the trainer, at least 0; an existing checkpoint of it will be replaced.
            policy: what to save.
            extra_state: any JSON object of the trainer; rank 0's is saved.
            metrics: evaluation of these weights, for ``retention.keep_best``; rank 0's is saved.

        Raises:
            SaveError: if the storage refuses; on every rank.
            CheckpointError: if the folder cannot be written at all.
            ValueError: if ``extra_state`` or ``metrics`` is not JSON, or ``step`` is negative.
        """
        assert self._pending is None, "one save at a time: call finish(wait=True) first"
        final, started = step_folder(self._folder, step), time.monotonic()

        def begin() -> Path:
            state = TrainerState(
                step=step,
                policy_version=policy.policy_version,
                has_optimizer=True,
                world_size=dist.get_world_size(),
                extra_state=check_json(extra_state, step=step),
                layout=parallel_layout(),
                metrics=check_json(metrics or {}, step=step),
            )
            clean_up(self._folder)
            temporary = manifest.begin_folder(final)
            (temporary / MEGATRON_FOLDER).mkdir()
            write_trainer_state(temporary, state)
            write_hf_files(temporary / HF_FOLDER, policy)
            return temporary

        try:
            temporary = run_on_first(begin)
        except OSError as error:  # on every rank
            raise SaveError(f"checkpoint {final}: {error}") from error
        staged = stage_megatron(
            temporary / MEGATRON_FOLDER, policy, turn=step, is_copied=self._in_background
        )
        self._pending = _Pending(
            final=final,
            temporary=temporary,
            staged=staged,
            started=started,
            seconds=time.monotonic() - started,
        )
        if self._in_background:
            # A daemon: it must not keep a failed trainer alive. What it leaves is cleaned up.
            thread = threading.Thread(target=self._pending.write, name="checkpoint", daemon=True)
            self._pending.thread = thread
            thread.start()

    def finish(self, *, wait: bool) -> Path | None:
        """Complete the save under way and return its path; all ranks must call this.

        Args:
            wait: wait for the writers of all ranks; otherwise return None if one still writes.

        Returns:
            The complete checkpoint; None if there is no save under way, or not yet.

        Raises:
            SaveError: if the storage of a rank refused; on every rank. The checkpoints that were
                there are as they were, and a later save may succeed.
            ReadBackError: if what was read back is not what was live; on every rank.
        """
        pending = self._pending
        if pending is None:
            return None
        if pending.thread is None:
            pending.write()
        elif not wait and any_rank(pending.thread.is_alive()):
            return None
        else:
            pending.thread.join()
        self._pending = None
        begin = time.monotonic()
        try:
            agree_on_errors(pending.error, f"checkpoint {pending.final}")
            self._seal(pending)
        except (SaveError, ReadBackError):  # all ranks are here, and only then
            run_on_first(lambda: shutil.rmtree(pending.temporary, ignore_errors=True))
            raise
        pending.seconds += time.monotonic() - begin
        self.longest_seconds = max(self.longest_seconds, pending.seconds)
        logger.info("saved checkpoint %s", pending.final)
        return pending.final

    @property
    def is_under_way(self) -> bool:
        """Return whether a save was started and not finished; equal on all ranks."""
        return self._pending is not None

    @property
    def seconds_to_stop(self) -> float:
        """Return how long the saves take that a stop would wait for, beyond a step's own time.

        Those are the one under way, and a last one. A saver that does not work in the background
        needs none: its saves are part of the steps whose length is known. 0 before the first save.
        """
        return self.seconds_to_save if self._in_background else 0.0

    @property
    def seconds_to_save(self) -> float:
        """Return how long a last save takes, with the one under way before it; of any thread.

        0 before the first save.
        """
        pending = self._pending
        if pending is None:
            return self.longest_seconds
        return 2 * max(self.longest_seconds, time.monotonic() - pending.started)

    def _seal(self, pending: _Pending) -> None:
        """Write the index, read back, and give the checkpoint its name."""
        written = topology.gather_objects(pending.written)
        known = {f"{MEGATRON_FOLDER}/{n}": e for rank in written for n, e in rank.items()}
        try:
            pending.staged.finish()
            is_clean = run_on_first(
                lambda: publish(
                    pending.temporary,
                    pending.final,
                    self._retention,
                    known=known,
                    abandoned=self._abandoned - {pending.final.name},
                )
            )
            self._abandoned -= {pending.final.name}
            self.num_untidy += not is_clean
        except OSError as error:  # on every rank
            raise SaveError(f"checkpoint {pending.final}: {error}") from error


def save_checkpoint(
    folder: Path,
    step: int,
    policy: CheckpointablePolicy,
    extra_state: Mapping[str, Any],
    retention: Retention = KEEP_ALL,
    *,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write ``folder/step-<step>`` and return its path; synchronous, complete on return.

    A kill at any moment leaves the checkpoints that were there before; what it left half-written
    is removed by the next save. An existing checkpoint of the same step is replaced. All ranks
    must call this; see ``CheckpointSaver`` for arguments and errors.
    """
    saver = CheckpointSaver(folder, retention)
    saver.start(step, policy, extra_state, metrics)
    path = saver.finish(wait=True)
    assert path is not None, "a save was under way"
    return path


def parallel_layout() -> dict[str, int]:
    """Return the parallel sizes of this run by their short names."""
    current = topology.current()
    return {
        "tp": current.tp_size,
        "pp": current.pp_size,
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": current.cp_size,
        "ep": current.ep_size,
        "etp": current.etp_size,
        "dp": current.dp_size,
    }
