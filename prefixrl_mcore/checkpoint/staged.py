"""One rank's share of a state on its way to disk: planned, copied, written, checked.

Megatron plans which rank writes which piece; the writing itself is called from here, so that an
error of the storage stays an ``OSError`` and reaches every rank, at whatever point it happens, and
so that it can run in a thread beside the training step. A thread and not Megatron's forked process:
it dies with the trainer, and cannot inherit a lock that another thread held at the fork.
"""

import hashlib
import io
import logging
import os
import queue
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from prefixrl_mcore.checkpoint.manifest import (
    ManifestEntry,
    ReadBackError,
    SaveError,
    StorageReadError,
)
from prefixrl_mcore.checkpoint.torch_dist import SHARDING_METADATA, TorchDistReader
from prefixrl_mcore.policy.topology import gather_objects, run_on_first

logger = logging.getLogger(__name__)

_BACKEND = CheckpointingConfig("torch_dist", 1)

_READ_BACK_PAUSES_SECONDS = (0.1, 0.4, 1.0, 3.0)
"""Between tries to read back what other machines have just written."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probe:
    """A copy of one live piece of a tensor, taken apart from what the writer was given."""

    name: str
    """Name of the whole tensor."""

    offsets: tuple[int, ...]
    """Where the piece begins in the whole."""

    value: Tensor
    """The piece, on the CPU, with as many dimensions as the whole."""


class StagedState:
    """A planned save of one rank; ``write`` it, then let all ranks ``finish`` it."""

    def __init__(
        self,
        folder: Path,
        planned: "_PlanOnly",
        probe: Probe | None,
        *,
        live_storages: frozenset[int] | None,
    ) -> None:
        """Take over what was planned, with tensors on the CPU.

        Args:
            folder: where the files go.
            planned: Megatron's plan.
            probe: what to read back afterwards; None if this rank holds no tensor.
            live_storages: addresses of the memory that training changes, of which copies are made;
                None makes none, and nothing may change the model before ``write`` returns.
        """
        assert planned.writer is not None, "planned by dist_checkpointing.save"
        self._folder = folder
        self._writer = planned.writer
        self._metadata = planned.metadata
        self._probe = probe
        buckets = self._writer.write_buckets or []
        if live_storages is not None:
            self._buckets = [_copied(bucket, live_storages) for bucket in buckets]
        else:
            self._buckets = FileSystemWriterAsync.preload_tensors(buckets, non_blocking=False)
        self._writer.write_buckets = None  # the tensors of the model are let go
        self._results: list[WriteResult] = []

    def write(self) -> dict[str, ManifestEntry]:
        """Write this rank's files; return what was written to each by name; not collective.

        Raises:
            OSError: if the storage refused.
        """
        written: dict[str, ManifestEntry] = {}
        for path, name, (byte_items, tensor_items) in self._buckets:
            digest = hashlib.sha256()
            with open(path, "wb") as file:
                for item, content in (*byte_items, *tensor_items):
                    data = (
                        content.getbuffer() if isinstance(content, io.BytesIO) else _dump(content)
                    )
                    place = _StorageInfo(name, file.tell(), len(data))
                    digest.update(data)
                    file.write(data)
                    self._results.append(WriteResult(item.index, len(data), place))
                file.flush()
                os.fsync(file.fileno())
                written[name] = ManifestEntry(size_bytes=file.tell(), sha256=digest.hexdigest())
        self._buckets = []
        return written

    def finish(self) -> None:
        """Write the index of all pieces and read one back per rank; all ranks must call this.

        Raises:
            OSError: if the storage refused the index, or does not give a piece back within
                seconds; on every rank.
            ReadBackError: if a piece that was read back is not what was live; on every rank.
        """
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(self._results, gathered if dist.get_rank() == 0 else None)
        run_on_first(lambda: self._write_index(gathered))
        problem, refusal = None, None
        try:
            problem = self._read_back()
        except StorageReadError as error:  # kept: raised here, it would hang the other ranks
            refusal = OSError(str(error))
        problems = enumerate(gather_objects(problem))
        wrong = [f"rank {rank}: {text}" for rank, text in problems if text]
        if wrong:
            raise ReadBackError(
                f"{self._folder}: what was read back is not what was saved, so the checkpoint was "
                f"thrown away: {'; '.join(wrong)}; look at storage and memory of these ranks"
            )
        agree_on_errors(refusal, f"{self._folder}: cannot be read back")

    def _write_index(self, results: list[Any]) -> None:
        assert self._metadata is not None, "the first rank coordinates"
        self._writer.finish(self._metadata, results)
        save_config(_BACKEND, str(self._folder))

    def _read_back(self) -> str | None:
        """Return what is wrong with this rank's probe, or None.

        Raises:
            StorageReadError: if the storage does not give it back, however often it is asked.
        """
        probe = self._probe
        if probe is None:
            return None
        try:
            stored = self._read_stored(probe)
        except StorageReadError:
            raise
        except Exception as error:  # agreed on by all ranks: raised here, it would hang the others
            return f"{type(error).__name__}: {error}"
        if stored.shape == probe.value.shape and stored.dtype == probe.value.dtype:
            differing = int((_bits(stored) != _bits(probe.value)).sum())
            what = f"{differing} of {_bits(stored).numel()} bytes differ"
            return f"{probe.name} at {probe.offsets}: {what}" if differing else None
        return (
            f"{probe.name} at {probe.offsets}: got {tuple(stored.shape)} {stored.dtype}, expected "
            f"{tuple(probe.value.shape)} {probe.value.dtype}"
        )

    def _read_stored(self, probe: Probe) -> Tensor:
        """Return the stored piece; asks again where the storage is late (NFS) or stumbles."""
        for seconds in _READ_BACK_PAUSES_SECONDS:
            try:
                return TorchDistReader(self._folder).read_piece(probe.name, probe.offsets)
            except StorageReadError as error:
                logger.warning("read-back: %s; trying again in %g s", error, seconds)
                time.sleep(seconds)
        return TorchDistReader(self._folder).read_piece(probe.name, probe.offsets)


def stage(folder: Path, state: dict[str, Any], *, turn: int, is_copied: bool) -> StagedState:
    """Plan a save of a sharded state dict; all ranks must call this.

    Args:
        folder: existing, empty folder that all ranks see.
        state: Megatron's sharded state dict.
        turn: chooses the tensor that is read back, so that another one is at each save.
        is_copied: copy the tensors, so that the model may change while they are written.
    """
    probe = _choose_probe(state, turn)
    live = _live_storages(state) if is_copied else None
    planned = _PlanOnly()
    with _results_in_process():
        dist_checkpointing.save(
            state,
            str(folder),
            planned,
            async_sharded_save=True,
            content_metadata=dict(SHARDING_METADATA),
            async_strategy="mcore",
        )
    return StagedState(folder, planned, probe, live_storages=live)


class _PlanOnly(torch_strategy.TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where the tensors would be written."""

    def __init__(self) -> None:
        """Start without a plan."""
        super().__init__()
        self.writer: FileSystemWriterAsync | None = None
        self.metadata: Any = None

    def _get_save_and_finalize_callbacks(
        self,
        writer: FileSystemWriterAsync,
        save_state_dict_ret: Any,  # noqa: ANN401  (untyped upstream)
        async_strategy: str,
    ) -> AsyncRequest:
        """Keep the plan, and return a request that does nothing."""
        del async_strategy
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def _choose_probe(state: Mapping[str, Any], turn: int) -> Probe | None:
    """Return a copy of one piece that this rank holds, if possible one that it also writes."""
    held = [item for item in _sharded_tensors(state) if item.data is not None and item.data.numel()]
    candidates = [item for item in held if is_main_replica(item.replica_id)] or held
    if not candidates:
        return None
    # Drawn, because the steps of saves have common divisors with the number of pieces.
    chosen = candidates[random.Random(turn).randrange(len(candidates))]
    assert chosen.data is not None, "chosen among those with data"
    offsets = tuple(chosen.global_offset)
    value = chosen.data.detach().to("cpu", copy=True)
    missing = len(offsets) - value.dim()
    return Probe(name=chosen.key, offsets=offsets, value=value[(None,) * missing])


def _sharded_tensors(state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """Yield the tensors that will be stored: a factory (gate and up in one weight) gives several.

    Megatron expands factories in the same way, after this.
    """
    for item in nested_values(dict(state)):
        built = item.build() if isinstance(item, ShardedTensorFactory) else item
        parts = nested_values(built) if isinstance(built, dict | list) else [built]
        yield from (part for part in parts if isinstance(part, ShardedTensor))


def _live_storages(state: Mapping[str, Any]) -> frozenset[int]:
    """Return the addresses of the memory behind all tensors of a sharded state dict."""
    tensors = [getattr(item, "data", item) for item in nested_values(dict(state))]
    return frozenset(
        tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, Tensor)
    )


def _copied(bucket: tuple[Any, str, Any], live_storages: frozenset[int]) -> tuple[Any, str, Any]:
    """Return a bucket whose tensors are on the CPU and share no memory with training.

    Megatron has already copied those that were views of a larger buffer.
    """
    path, name, (byte_items, tensor_items) = bucket
    copies = [
        (item, tensor.to("cpu", copy=tensor.untyped_storage().data_ptr() in live_storages))
        for item, tensor in tensor_items
    ]
    return path, name, (byte_items, copies)


def _dump(content: Tensor | io.BytesIO) -> bytes:
    """Return a tensor, or an object that is bytes already, as the format stores it.

    Bytes and not ``getbuffer()``: when the file refuses, the traceback keeps such a view alive, and
    CPython 3.12 crashes as soon as its garbage collector frees the ``BytesIO`` before the view.
    """
    if isinstance(content, io.BytesIO):
        return content.getvalue()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor: a NaN equals itself here."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def agree_on_errors(error: BaseException | None, what: str) -> None:
    """Raise on every rank if a rank has an error; all ranks must call this.

    Raises:
        SaveError: if the storage of a rank refused.
        RuntimeError: if a rank failed otherwise.
    """
    mine = (
        None if error is None else (isinstance(error, OSError), f"{type(error).__name__}: {error}")
    )
    everywhere = enumerate(gather_objects(mine))
    failed = {rank: outcome for rank, outcome in everywhere if outcome is not None}
    if not failed:
        return
    message = f"{what}: " + "; ".join(f"rank {rank}: {text}" for rank, (_, text) in failed.items())
    if all(is_storage for is_storage, _ in failed.values()):
        raise SaveError(message) from error
    raise RuntimeError(message) from error


@contextmanager
def _results_in_process() -> Iterator[None]:
    """Let Megatron's planner make a plain queue for results, which nothing here reads.

    Megatron starts a manager process for that queue, which imports the whole program again and
    takes seconds. It also announces that its asynchronous writer, which is not used here, is
    deprecated.
    """
    filesystem_async._results_queue = cast(Any, queue.SimpleQueue())
    torch_strategy._logged_mcore_async_deprecation = True
    try:
        yield
    finally:
        filesystem_async._results_queue = None
