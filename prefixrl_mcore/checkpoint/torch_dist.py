"""Reading and writing ``torch_dist`` weights in one process, without a model or process group.

The format stores whole tensors in pieces: ``.metadata`` says which piece of which tensor lies at
which bytes of which ``*.distcp`` file. One tensor (or one layer of a stack of layers) is held in
memory at a time.
"""

import io
import json
import os
import pathlib
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from prefixrl_mcore.checkpoint.manifest import CheckpointError, StorageReadError

SHARDING_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""How Megatron names and cuts the tensors: the variant that any other layout can load."""

_METADATA_NAME = ".metadata"
_DATA_NAME = "__0_0.distcp"
_BACKEND_NAME = "metadata.json"
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_STATE_KEY = "common_state/shard_0_1"  # Megatron's name of what is not a tensor
_DCP_VERSION = "1.0.0"

_SAFE_CLASSES = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
                *("StorageMeta", "TensorProperties", "TensorStorageMetadata"),
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }
)
"""All that a ``.metadata`` file may name; anything else could run code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a whole tensor, to be written."""

    name: str
    """Name of the whole tensor."""

    full_shape: tuple[int, ...]
    """Shape of the whole tensor."""

    offsets: tuple[int, ...]
    """Where the part begins in the whole."""

    tensor: Tensor
    """The part, with as many dimensions as the whole."""


class TorchDistReader:
    """The tensors of one ``torch_dist`` folder."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: if it is missing, damaged, or names anything but tensors' places.
        """
        self.folder = folder
        """What is read."""
        self._metadata = _read_metadata(folder / _METADATA_NAME)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(entry.size)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }
        """Shape of each whole tensor, by name."""
        self.dtypes: dict[str, torch.dtype] = {
            name: entry.properties.dtype
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }
        """Data type of each tensor, by name."""
        self.objects: frozenset[str] = frozenset(
            name.split("/shard_")[0]
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, dcp.BytesStorageMetadata)
        )
        """Names of what is stored besides tensors."""

    def read(self, name: str, *indices: int) -> Tensor:
        """Return a whole tensor, or the entry ``indices`` along its first dimensions.

        Raises:
            CheckpointError: if a piece is missing or its file is damaged.
        """
        entry = self._metadata.state_dict_metadata[name]
        if not isinstance(entry, dcp.TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: {name} is no tensor; use another checkpoint")
        shape = tuple(entry.size)[len(indices) :]
        result = torch.empty(shape, dtype=entry.properties.dtype)
        num_filled = 0
        for chunk in entry.chunks:
            piece = self._read_chunk_part(name, chunk, indices)
            if piece is None:
                continue
            offsets = tuple(chunk.offsets)[len(indices) :]
            part = result[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))]
            part.copy_(piece)
            num_filled += piece.numel()
        if num_filled != result.numel():
            raise CheckpointError(
                f"{self.folder}: {name}{list(indices) or ''} has pieces of {num_filled} numbers, "
                f"expected {result.numel()}; use another checkpoint"
            )
        return result

    def read_piece(self, name: str, offsets: tuple[int, ...]) -> Tensor:
        """Return the stored piece of a tensor that begins at ``offsets``.

        Raises:
            CheckpointError: if there is no such piece or its file is damaged.
        """
        entry = self._metadata.state_dict_metadata.get(name)
        chunks = entry.chunks if isinstance(entry, dcp.TensorStorageMetadata) else []
        for chunk in chunks:
            if tuple(chunk.offsets) == offsets:
                return self._read_chunk(name, chunk)
        raise CheckpointError(
            f"{self.folder}: holds no piece of {name} at {offsets}, expected one of "
            f"{len(chunks)}; use another checkpoint"
        )

    def _read_chunk_part(
        self, name: str, chunk: dcp.ChunkStorageMetadata, indices: tuple[int, ...]
    ) -> Tensor | None:
        """Return a stored piece, or its share of ``indices``; None if it has none."""
        inside = tuple(i - o for i, o in zip(indices, chunk.offsets, strict=False))
        if any(not 0 <= i < size for i, size in zip(inside, chunk.sizes, strict=False)):
            return None
        return self._read_chunk(name, chunk)[inside]

    def _read_chunk(self, name: str, chunk: dcp.ChunkStorageMetadata) -> Tensor:
        place = self._metadata.storage_data.get(dcp.MetadataIndex(name, chunk.offsets))
        if place is None or place.transform_descriptors:
            raise CheckpointError(
                f"{self.folder / _METADATA_NAME}: does not say where {name} at "
                f"{tuple(chunk.offsets)} lies, expected a plain piece; use another checkpoint"
            )
        path = self.folder / Path(place.relative_path).name
        content = _read_bytes(path, place.offset, place.length)
        try:
            tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle raises almost anything
            raise CheckpointError(
                f"{path}: {name} cannot be read ({error}); use another checkpoint"
            ) from None
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise CheckpointError(
                f"{path}: {name} got {getattr(tensor, 'shape', type(tensor))}, expected "
                f"{tuple(chunk.sizes)}; use another checkpoint"
            )
        return tensor


def write_torch_dist(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write pieces of tensors, one at a time, into an existing, empty folder.

    Megatron loads the result as it loads its own. Files are not made durable here.
    """
    tensors: dict[str, Any] = {}
    places: dict[dcp.MetadataIndex, Any] = {}
    with (folder / _DATA_NAME).open("wb") as file:
        for piece in pieces:
            entry = tensors.setdefault(
                piece.name,
                dcp.TensorStorageMetadata(
                    properties=dcp.TensorProperties(dtype=piece.tensor.dtype),
                    size=torch.Size(piece.full_shape),
                    chunks=[],
                ),
            )
            offsets, sizes = torch.Size(piece.offsets), piece.tensor.shape
            index = dcp.MetadataIndex(piece.name, offsets, len(entry.chunks))
            entry.chunks.append(dcp.ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            places[index] = _append(file, piece.tensor.contiguous().clone())
        # Megatron reads the first entry of a list.
        places[dcp.MetadataIndex(_COMMON_STATE_KEY)] = _append(
            file, [{"content_metadata": SHARDING_METADATA}]
        )
    metadata = dcp.Metadata(
        state_dict_metadata={**tensors, _COMMON_STATE_KEY: dcp.BytesStorageMetadata()},
        storage_data=places,
        storage_meta=dcp.StorageMeta(),
        version=_DCP_VERSION,
    )
    (folder / _METADATA_NAME).write_bytes(pickle.dumps(metadata))
    (folder / _BACKEND_NAME).write_text(json.dumps(_BACKEND), encoding="utf-8")


def _append(file: io.BufferedWriter, value: object) -> filesystem._StorageInfo:
    offset = file.seek(0, os.SEEK_END)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    file.write(buffer.getbuffer())
    return filesystem._StorageInfo(_DATA_NAME, offset, buffer.tell())


def _read_bytes(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(length)
    except OSError as error:
        raise StorageReadError(
            f"{path}: cannot be read ({error}); look at the storage, or use another checkpoint"
        ) from None
    if len(content) != length:
        raise StorageReadError(
            f"{path}: got {len(content)} bytes at {offset}, expected {length}; use another "
            "checkpoint"
        )
    return content


def _read_metadata(path: Path) -> dcp.Metadata:
    try:
        metadata = _SafeUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise StorageReadError(
            f"{path}: is missing, expected a torch_dist checkpoint; use another checkpoint"
        ) from None
    except OSError as error:
        raise StorageReadError(
            f"{path}: cannot be read ({error}); look at the storage, or use another checkpoint"
        ) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path}: is damaged or not to be trusted ({error}); use another checkpoint"
        ) from None
    if not isinstance(metadata, dcp.Metadata):
        raise CheckpointError(
            f"{path}: got {type(metadata).__name__}, expected the metadata of a torch_dist "
            "checkpoint; use another checkpoint"
        )
    return metadata


class _SafeUnpickler(pickle.Unpickler):
    """Refuses every name that a ``.metadata`` file has no use for."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  (signature of pickle)
        """Return an allowed class or torch dtype."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _SAFE_CLASSES:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        if module == "pathlib":
            return getattr(pathlib, "Pure" + name.removeprefix("Pure"))
        return super().find_class(module, name)
