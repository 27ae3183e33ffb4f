"""Reading ``torch_dist`` weights in one process, without a model or process group.

The format stores whole tensors in pieces: ``.metadata`` says which piece of which tensor lies at
which bytes of which ``*.distcp`` file. Files are mapped: a tensor that was stored in one piece is
not copied.
"""

import io
import itertools
import mmap
import pathlib
import pickle
from pathlib import Path
from string import digits
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from prefixrl_mcore.checkpoint.manifest import CheckpointError, StorageReadError
from prefixrl_mcore.checkpoint.torch_archive import (
    ArchiveError,
    advise_of_read,
    map_file,
    read_tensor,
)

SHARDING_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""How Megatron names and cuts the tensors: the variant that any other layout can load."""

METADATA_NAME = ".metadata"
_EXTRA_STATE = "_extra_state"

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


class TorchDistReader:
    """The tensors of one ``torch_dist`` folder."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: if it is missing, damaged, or names anything but tensors' places.
        """
        self.folder = folder
        """What is read."""
        self._metadata = _read_metadata(folder / METADATA_NAME)
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
        self._mappings: dict[Path, mmap.mmap] = {}
        self._chunks: dict[
            tuple[str, int], dict[tuple[int, ...], list[dcp.ChunkStorageMetadata]]
        ] = {}
        self._whole_pieces: tuple[str, dict[tuple[int, ...], Tensor]] = ("", {})

    def read(self, name: str, *indices: int) -> Tensor:
        """Return a whole tensor, or the entry ``indices`` along its first dimensions.

        Where one stored piece is all of it, the result is a view of the mapped file and must not
        be written to. A piece that holds several entries (the experts of a layer) is checked once
        if they are read one after the other.

        Raises:
            CheckpointError: if a piece is missing or its file is damaged.
        """
        entry = self._entry(name)
        shape = tuple(entry.size)[len(indices) :]
        pieces = [
            (chunk, self._map_chunk(name, chunk)[_inside(chunk, indices)])
            for chunk in self._chunks_at(name, indices)
        ]
        num_filled = sum(piece.numel() for _, piece in pieces)
        if num_filled != torch.Size(shape).numel():
            raise CheckpointError(
                f"{self.folder}: {name}{list(indices) or ''} has pieces of {num_filled} numbers, "
                f"expected {torch.Size(shape).numel()}; use another checkpoint"
            )
        if len(pieces) == 1:
            return pieces[0][1]
        self._refuse_overlap(name, [chunk for chunk, _ in pieces])
        result = torch.empty(shape, dtype=entry.properties.dtype)
        for chunk, piece in pieces:
            offsets = tuple(chunk.offsets)[len(indices) :]
            part = result[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))]
            part.copy_(piece)
        return result

    def _refuse_overlap(self, name: str, chunks: list[dcp.ChunkStorageMetadata]) -> None:
        """Refuse pieces that share numbers: as many as the whole has, they leave a hole."""
        for one, other in itertools.combinations(chunks, 2):
            dims = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            if all(max(o, p) < min(o + n, p + m) for o, n, p, m in dims):
                raise CheckpointError(
                    f"{self.folder}: {name} has pieces that overlap, at {tuple(one.offsets)} and "
                    f"{tuple(other.offsets)}; use another checkpoint"
                )

    def read_piece(self, name: str, offsets: tuple[int, ...]) -> Tensor:
        """Return the stored piece of a tensor that begins at ``offsets``.

        Raises:
            CheckpointError: if there is no such piece or its file is damaged.
        """
        entry = self._metadata.state_dict_metadata.get(name)
        chunks = entry.chunks if isinstance(entry, dcp.TensorStorageMetadata) else []
        for chunk in chunks:
            if tuple(chunk.offsets) == offsets:
                return self._read_chunk(name, chunk, is_mapped=False)
        raise CheckpointError(
            f"{self.folder}: holds no piece of {name} at {offsets}, expected one of "
            f"{len(chunks)}; use another checkpoint"
        )

    def prefetch(self, name: str, *indices: int) -> None:
        """Let the operating system read ahead what ``read`` of the same arguments will want."""
        for chunk in self._chunks_at(name, indices):
            if self._whole_pieces[0] == name and tuple(chunk.offsets) in self._whole_pieces[1]:
                continue
            place = self._place(name, chunk)
            advise_of_read(self._mapping(self._path(place)), place.offset, place.length)

    def _entry(self, name: str) -> dcp.TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata[name]
        if not isinstance(entry, dcp.TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: {name} is no tensor; use another checkpoint")
        return entry

    def _chunks_at(self, name: str, indices: tuple[int, ...]) -> list[dcp.ChunkStorageMetadata]:
        """Return the pieces that have a share of ``indices``.

        Looked up and not searched for, because a stack of experts has thousands of pieces.
        """
        key = (name, len(indices))
        if key not in self._chunks:
            by_place: dict[tuple[int, ...], list[dcp.ChunkStorageMetadata]] = {}
            for chunk in self._entry(name).chunks:
                ranges = zip(chunk.offsets, chunk.sizes, strict=True)
                covered = [range(o, o + size) for o, size in ranges][: len(indices)]
                for place in itertools.product(*covered):
                    by_place.setdefault(place, []).append(chunk)
            self._chunks[key] = by_place
        return self._chunks[key].get(indices, [])

    def _map_chunk(self, name: str, chunk: dcp.ChunkStorageMetadata) -> Tensor:
        """Return a stored piece as a view of its file.

        Those of the last tensor are kept: checking all experts' piece for each of them would take
        quadratic time. They hold no memory but the mapping, which stays anyway.
        """
        if self._whole_pieces[0] != name:
            self._whole_pieces = (name, {})
        pieces, offsets = self._whole_pieces[1], tuple(chunk.offsets)
        if offsets not in pieces:
            pieces[offsets] = self._read_chunk(name, chunk, is_mapped=True)
        return pieces[offsets]

    def _read_chunk(self, name: str, chunk: dcp.ChunkStorageMetadata, *, is_mapped: bool) -> Tensor:
        """Return a stored piece; an error of the storage kills a process that has it mapped."""
        place = self._place(name, chunk)
        path = self._path(place)
        try:
            if is_mapped:
                tensor = read_tensor(self._mapping(path), place.offset, place.length)
            else:
                content = _read_bytes(path, place.offset, place.length)
                tensor = read_tensor(content, 0, len(content))
        except ArchiveError as error:
            raise CheckpointError(
                f"{path}: {error} in {name} at {tuple(chunk.offsets)}; use another checkpoint or "
                "restore the file"
            ) from None
        expected = (chunk.sizes, self.dtypes[name])
        if (tensor.shape, tensor.dtype) != expected:
            raise CheckpointError(
                f"{path}: {name} got {tuple(tensor.shape)} {tensor.dtype}, expected "
                f"{tuple(expected[0])} {expected[1]}; use another checkpoint"
            )
        return tensor

    def _place(self, name: str, chunk: dcp.ChunkStorageMetadata) -> filesystem._StorageInfo:
        place = self._metadata.storage_data.get(dcp.MetadataIndex(name, chunk.offsets))
        if place is None or place.transform_descriptors:
            raise CheckpointError(
                f"{self.folder / METADATA_NAME}: does not say where {name} at "
                f"{tuple(chunk.offsets)} lies, expected a plain piece; use another checkpoint"
            )
        return place

    def _path(self, place: filesystem._StorageInfo) -> Path:
        return self.folder / Path(place.relative_path).name

    def _mapping(self, path: Path) -> mmap.mmap:
        """Return a data file, mapped once."""
        if path not in self._mappings:
            try:
                self._mappings[path] = map_file(path)
            except (OSError, ValueError) as error:
                raise StorageReadError(
                    f"{path}: cannot be read ({error}); use another checkpoint"
                ) from None
        return self._mappings[path]


def is_extra_state(name: str) -> bool:
    """Return whether a name is of Transformer Engine's private state, which is no weight.

    Grouped experts number theirs: ``_extra_state``, ``_extra_state1`` and so on.
    """
    return name.rstrip(digits).endswith(_EXTRA_STATE)


def _inside(chunk: dcp.ChunkStorageMetadata, indices: tuple[int, ...]) -> tuple[int, ...]:
    """Return the place of ``indices`` in a piece."""
    return tuple(i - o for i, o in zip(indices, chunk.offsets, strict=False))


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
