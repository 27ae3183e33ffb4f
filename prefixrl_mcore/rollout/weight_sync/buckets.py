"""A stream of weights as buckets of bounded size, ready to be sent to engines."""

import math
from collections import Counter
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.weight_names import WeightCoverage
from prefixrl_mcore.rollout.weight_sync.fused import fused_name

_Named = tuple[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketEntry:
    """Where one weight lies in a bucket."""

    name: str
    """Hugging Face name."""

    shape: tuple[int, ...]
    """Shape of the full weight."""

    start_bytes: int
    """Offset in the bucket; a multiple of the size of an element."""

    end_bytes: int
    """Offset of what comes after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Some weights, one after the other in one buffer."""

    data: Tensor
    """[num_bytes] uint8 on the stream's device; owned by the bucket, shared with nothing."""

    dtype: torch.dtype
    """Type of all the weights, the one that the engine keeps them in. One type for all means that
    no weight in ``data`` is unaligned."""

    entries: tuple[BucketEntry, ...]
    """The weights, in the order of ``data``, without gaps."""

    @property
    def num_bytes(self) -> int:
        """Return the size of the weights."""
        return self.data.numel()

    def weights(self) -> Iterator[_Named]:
        """Yield (name, full weight); views of ``data``."""
        for entry in self.entries:
            flat = self.data[entry.start_bytes : entry.end_bytes].view(self.dtype)
            yield entry.name, flat.view(entry.shape)


def pack_buckets(
    weights: Iterator[_Named], coverage: WeightCoverage, *, dtype: torch.dtype, bucket_bytes: int
) -> Generator[Bucket]:
    """Yield the weights in buckets of at most ``bucket_bytes``, in the order of the stream.

    Query, key and value weights of a layer are never apart, nor are gate and up weights: an
    engine that fuses them may derive something from the whole. What belongs together and is larger
    than ``bucket_bytes`` is a bucket of its own. Every weight is copied once, into the bucket and
    to ``dtype``, as soon as it comes; nothing is kept of what was yielded.

    Args:
        weights: (Hugging Face name, full weight) pairs.
        coverage: a fresh one of the engine's model; every weight is ticked off in it.
        dtype: type that the engine keeps its weights in.
        bucket_bytes: limit of a bucket in ``dtype``.

    Raises:
        EngineError: if the weights are not exactly those of ``coverage``, or if parts that belong
            together do not follow each other. What came before has been yielded by then.
    """
    unit_bytes: Counter[str] = Counter()
    for name, shape in coverage.shapes.items():
        unit_bytes[fused_name(name)] += math.prod(shape) * dtype.itemsize
    model_bytes = unit_bytes.total()
    complete: set[str] = set()
    unit = ""
    filling: _Filling | None = None
    for name, weight in weights:
        if not coverage.is_to_load(name, tuple(weight.shape)):
            continue
        if unit != fused_name(name):
            complete.add(unit)
            unit = fused_name(name)
            _check_is_new(unit, complete)
            if filling is not None and not filling.has_room(unit_bytes[unit]):
                yield filling.bucket()
                filling = None
        if filling is None:
            capacity = max(unit_bytes[unit], min(bucket_bytes, model_bytes))
            filling = _Filling(capacity, dtype, weight.device)
        filling.add(name, weight)
    coverage.check_complete()
    if filling is not None:
        yield filling.bucket()


class _Filling:
    """A bucket that is being filled."""

    def __init__(self, capacity_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take the memory."""
        self._flat = torch.empty(capacity_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._entries: list[BucketEntry] = []
        self._num_elements = 0

    def has_room(self, num_bytes: int) -> bool:
        """Return whether so many more bytes fit in."""
        return num_bytes <= (self._flat.numel() - self._num_elements) * self._flat.itemsize

    def add(self, name: str, weight: Tensor) -> None:
        """Copy a weight in; it must fit."""
        start, end = self._num_elements, self._num_elements + weight.numel()
        self._flat[start:end].view(weight.shape).copy_(weight.detach())
        self._num_elements = end
        self._entries.append(
            BucketEntry(
                name=name,
                shape=tuple(weight.shape),
                start_bytes=start * self._flat.itemsize,
                end_bytes=end * self._flat.itemsize,
            )
        )

    def bucket(self) -> Bucket:
        """Return what was added."""
        return Bucket(
            data=self._flat[: self._num_elements].view(torch.uint8),
            dtype=self._flat.dtype,
            entries=tuple(self._entries),
        )


def _check_is_new(unit: str, complete: Container[str]) -> None:
    """Refuse weights whose neighbours may have been sent before them.

    Raises:
        EngineError: naming what belongs together.
    """
    if unit in complete:
        raise EngineError(
            f"weights: the parts of {unit!r} do not follow each other in the stream, expected "
            "query, key and value (gate and up) one after the other"
        )
