"""Weights inside the request: by value, or as a handle of GPU memory that both sides can see."""

import base64
import io
import pickle
from collections.abc import Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefixrl_mcore.rollout.weight_sync.buckets import Bucket
from prefixrl_mcore.rollout.weight_sync.transport import Failures, SyncTarget, on_all


class TensorByValue:
    """Sends the bytes of the weights over HTTP; works everywhere, in about five copies."""

    name = "tensor (by value)"
    has_session = True
    innocent: frozenset[str] = frozenset()

    def open(self, targets: Sequence[SyncTarget]) -> Failures:
        """Do nothing."""
        return {}

    def send(self, bucket: Bucket, targets: Sequence[SyncTarget]) -> Failures:
        """Post the bucket to all targets at once."""
        payload = flattened_bucket(bucket)
        return on_all(
            targets,
            lambda target: target.client.update_from_tensor([payload] * target.num_ranks),
        )

    def finish(self, targets: Sequence[SyncTarget]) -> Failures:
        """Do nothing: a server answers when it has loaded a bucket."""
        return {}

    def close(self) -> None:
        """Do nothing."""


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


def _dumps(content: dict[str, Tensor | list[FlattenedTensorMetadata]]) -> str:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=4).dump(content)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")
