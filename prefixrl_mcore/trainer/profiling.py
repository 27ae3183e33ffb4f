"""Profiles of chosen steps: traces of torch.profiler, and snapshots of GPU memory."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from prefixrl_mcore.config.operations import ProfileConfig
from prefixrl_mcore.policy.topology import Topology

logger = logging.getLogger(__name__)


class StepProfiler:
    """Writes ``RUN/profile/step-<n>-rank-<r>.json.gz`` of the configured steps and ranks.

    A trace holds what the main thread and the GPU do from the weight sync to the metrics, with
    every phase as a named range. A context manager, which records the history of GPU memory.
    """

    def __init__(self, config: ProfileConfig, folder: Path, topology: Topology) -> None:
        """Describe what is recorded; nothing is before a configured step begins."""
        self._config = config
        self._folder = folder
        self._topology = topology
        is_chosen = bool(config.steps) and topology.rank in config.ranks
        self._has_snapshots = config.memory_snapshot and topology.device.type == "cuda"
        if is_chosen and config.memory_snapshot and not self._has_snapshots:
            logger.warning("profile.memory_snapshot: a CPU has no such snapshots, none is written")

    def __enter__(self) -> Self:
        """Begin to record where GPU memory is allocated, if snapshots are wanted."""
        if self._has_snapshots:
            torch.cuda.memory._record_memory_history(max_entries=self._config.memory_entries)
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop recording."""
        if self._has_snapshots:
            torch.cuda.memory._record_memory_history(enabled=None)

    def begin_steps(self, first_step: int) -> None:
        """Say which configured steps were taken by an earlier start, and are not recorded."""
        past = sorted(step for step in set(self._config.steps) if step < first_step)
        if past and self._topology.rank in self._config.ranks:
            logger.warning(
                "profile.steps %s: not recorded, the run goes on at step %d", past, first_step
            )

    def annotate(self, name: str) -> AbstractContextManager[object]:
        """Return a context that is a named range of a trace."""
        return record_function(name)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record the step inside, if it is a configured one.

        A step that fails leaves its trace all the same; a trace that cannot be written is logged,
        and hides neither the step nor its error.
        """
        if step not in self._config.steps or self._topology.rank not in self._config.ranks:
            yield
            return
        config, path = self._config, self._path(step)
        is_cuda = self._topology.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        profiler = profile(
            activities=activities,
            record_shapes=config.with_shapes,
            profile_memory=config.with_memory,
            with_stack=config.with_stacks,
        )
        try:
            with profiler, record_function(f"step {step}"):
                yield
        finally:
            self._export(profiler, step, path)

    def _export(self, profiler: profile, step: int, path: Path) -> None:
        """Write what was recorded of a step, if the storage takes it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            if self._has_snapshots:
                torch.cuda.memory._dump_snapshot(str(path.with_name(f"{self._name(step)}.pickle")))
        except Exception as refusal:  # a trace must not end a run, nor hide what did
            logger.error("no profile of step %d in %s: %s", step, path, refusal)
            with suppress(OSError):
                path.unlink()  # half of it
        else:
            logger.info("profile of step %d: %s (open it at https://ui.perfetto.dev)", step, path)

    def _name(self, step: int) -> str:
        """Return the name of this rank's files of a step, without suffix."""
        return f"step-{step:06d}-rank-{self._topology.rank:05d}"

    def _path(self, step: int) -> Path:
        """Return where the trace of a step goes."""
        return self._folder / f"{self._name(step)}.json.gz"
