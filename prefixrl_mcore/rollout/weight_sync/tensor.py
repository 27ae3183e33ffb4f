"""Weights inside the request: by value, or as a handle of GPU memory that both sides can see."""

import base64
import io
import pickle
from collections.abc import Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from prefixrl_mcore.rollout.sglang.payloads import tensor_update
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket
from prefixrl_mcore.rollout.weight_sync.transport import (
    DEFAULT_TIMEOUT_SECONDS,
    Failures,
    SyncTarget,
    on_all,
)


class _TensorTransport:
    """What the two ways have in common: every bucket is a call of its own, and nothing is left."""

    has_session = True
    innocent: frozenset[str] = frozenset()

    def __init__(self, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Give every server so long for a bucket."""
        self._timeout_seconds = timeout_seconds

    def open(self, targets: Sequence[SyncTarget]) -> Failures:
        """Do nothing."""
        return {}

    def finish(self, targets: Sequence[SyncTarget]) -> Failures:
        """Do nothing: a server answers when it has loaded a bucket."""
        return {}

    def close(self) -> None:
        """Do nothing."""


class TensorByValue(_TensorTransport):
    """Sends the bytes of the weights over HTTP; works everywhere.

    A bucket is copied, pickled, written in base64 and put into the body of a request, which all
    servers share: up to about six buckets of host memory while that goes on, and four thirds of a
    bucket for each rank of a server while it is sent.
    """

    name = "tensor (by value)"

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        """Post the bucket to all targets at once."""
        payload = flattened_bucket(bucket)
        bodies = {n: tensor_update([payload] * n) for n in {one.num_ranks for one in targets}}
        del payload
        return on_all(
            targets,
            lambda target: target.client.update_from_tensor(
                bodies[target.num_ranks], self._timeout_seconds
            ),
        )


class TensorByHandle(_TensorTransport):
    """Sends handles of GPU memory (CUDA IPC); trainer and server are on one machine.

    Each rank of a server gets a handle of a copy on its own GPU; on the trainer's own that is the
    bucket itself. Nothing is copied through host memory or HTTP. torch keeps the memory until the
    server has let go of it. Not run yet.
    """

    name = "tensor (GPU handles)"
    _has_copies = False

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        """Post the handles to all targets at once.

        Every target has a handle of its own: torch counts one reader for each.
        """
        copies = {
            gpu: bucket.data.to(f"cuda:{gpu}") for target in targets for gpu in target.rank_gpus
        }
        self._has_copies |= any(copy is not bucket.data for copy in copies.values())
        for gpu in copies:
            torch.cuda.synchronize(gpu)
        metadata = _metadata(bucket)
        bodies = {
            target.name: tensor_update(
                [
                    _dumps({"flattened_tensor": gpu_handle(copies[gpu]), "metadata": metadata})
                    for gpu in target.rank_gpus
                ]
            )
            for target in targets
        }
        return on_all(
            targets,
            lambda target: target.client.update_from_tensor(
                bodies[target.name], self._timeout_seconds
            ),
        )

    def close(self) -> None:
        """Give back memory that servers have let go of, on their GPUs too."""
        torch.cuda.ipc_collect()
        if self._has_copies:  # the servers next take memory for their KV cache there
            torch.cuda.empty_cache()
            self._has_copies = False


class GpuHandle:
    """Stands in a pickle for a tensor in GPU memory that the reader opens."""

    def __init__(self, arguments: tuple[object, ...]) -> None:
        """Keep what SGLang's function takes: torch's arguments, with the GPU's own id."""
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        """Be read by the function of SGLang that finds the GPU by its id."""
        return _rebuild_cuda_tensor_modified, self._arguments


_DEVICE_ARGUMENT = 6
"""Place of the device's index among the arguments of ``torch.multiprocessing``'s rebuild
function; SGLang takes the GPU's own id there, since the two processes may number GPUs apart."""


def gpu_handle(tensor: Tensor) -> GpuHandle:
    """Return a handle of a tensor in GPU memory, to be read once."""
    _, arguments = reductions.reduce_tensor(tensor)
    gpu_id = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return GpuHandle((*arguments[:_DEVICE_ARGUMENT], gpu_id, *arguments[_DEVICE_ARGUMENT + 1 :]))


def _rebuild_cuda_tensor_modified(*_arguments: object) -> None:
    """Stand for SGLang's function of this name in a pickle; only its name is ever used."""
    raise NotImplementedError("the server's function takes its place when a handle is read")


def flattened_bucket(bucket: Bucket) -> str:
    """Return a bucket as the server reads it: a pickle in base64, with the bytes in it."""
    # A view would be pickled with all of the storage that it looks at.
    own = bucket.data.to(device="cpu", copy=True)
    return _dumps({"flattened_tensor": own, "metadata": _metadata(bucket)})


class FlattenedTensorMetadata:
    """Stands in a pickle for SGLang's class of this name, which need not be installed here."""

    def __init__(self, **facts: Any) -> None:  # noqa: ANN401 -- SGLang's fields
        """Keep what SGLang's class keeps."""
        self.__dict__.update(facts)


def _metadata(bucket: Bucket) -> list[FlattenedTensorMetadata]:
    return [
        FlattenedTensorMetadata(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=bucket.dtype,
            start_idx=entry.start_bytes,
            end_idx=entry.end_bytes,
            numel=entry.end_bytes - entry.start_bytes,
        )
        for entry in bucket.entries
    ]


_PythonPickler: Any = pickle._Pickler
"""The pickler in Python: the one in C looks every name up in this process."""


class _Pickler(_PythonPickler):
    """Writes the server's names of classes and functions, without importing them.

    What it writes is short: the bytes of the weights go through in one piece.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:  # noqa: ANN401 -- pickle's
        if obj is FlattenedTensorMetadata:
            self._save_name("sglang.srt.weight_sync.tensor_bucket", obj.__name__)
        elif obj is _rebuild_cuda_tensor_modified:
            self._save_name("sglang.srt.utils.patch_torch", obj.__name__)
        elif obj is torch.storage._load_from_bytes:
            # Importing megatron-core puts its own function there, which no server has.
            self._save_name("torch.storage", "_load_from_bytes")
        else:
            super().save_global(obj, name)

    def _save_name(self, module: str, name: str) -> None:
        self.save(module)
        self.save(name)
        self.write(pickle.STACK_GLOBAL)

    dispatch: ClassVar = {**_PythonPickler.dispatch, FunctionType: save_global}


def _dumps(content: dict[str, Tensor | GpuHandle | list[FlattenedTensorMetadata]]) -> str:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(content)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")
