"""Writing ``torch_dist`` weights in one process, without a model or process group.

Tensors go into several data files of bounded size, so that a killed conversion can keep those that
it has finished.
"""

import io
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from prefixrl_mcore.checkpoint.hashed_file import HashedFile
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.torch_dist import METADATA_NAME, SHARDING_METADATA

_COMMON_NAME = "__0_0.distcp"
_COMMON_STATE_KEY = "common_state/shard_0_1"  # Megatron's name of what is not a tensor
_BACKEND_NAME = "metadata.json"
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_DCP_VERSION = "1.0.0"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPiece:
    """Where a part of a whole tensor lies in a data file; plain values, for a journal."""

    name: str
    """Name of the whole tensor."""

    full_shape: list[int]
    """Shape of the whole tensor."""

    offsets: list[int]
    """Where the part begins in the whole."""

    sizes: list[int]
    """Shape of the part."""

    dtype: str
    """Name of its type in torch."""

    begin: int
    """First byte in the file."""

    length: int
    """Bytes in the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """A data file that was written and is durable."""

    size_bytes: int
    """Its length."""

    sha256: str
    """Hexadecimal digest of its content."""

    pieces: list[StoredPiece]
    """What it holds."""


class TorchDistWriter:
    """Writes whole tensors, in pieces, into an existing folder, so that Megatron loads them.

    Every piece is an entry of one of several data files. ``finish`` writes the index.
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder; it holds nothing of that format yet but data files of this class."""
        self._folder = folder
        self._tensors: dict[str, Any] = {}
        self._places: dict[dcp.MetadataIndex, Any] = {}

    def write_file(
        self,
        name: str,
        pieces: Iterable[Piece],
        on_bytes: Callable[[int], object] | None = None,
    ) -> DataFile:
        """Write a data file; one piece is held in memory at a time.

        Args:
            name: a name that ``data_file_name`` returned.
            pieces: in the order of the file.
            on_bytes: called with the size of each block that was written.

        Raises:
            SaveError: if the storage refuses.
            CheckpointError: as ``adopt``.
        """
        written: list[StoredPiece] = []
        with HashedFile(self._folder / name, on_bytes) as file:
            for piece in pieces:
                begin = file.size_bytes
                _save(piece.tensor, file)
                file.raise_kept()
                written.append(
                    StoredPiece(
                        name=piece.name,
                        full_shape=list(piece.full_shape),
                        offsets=list(piece.offsets),
                        sizes=list(piece.tensor.shape),
                        dtype=str(piece.tensor.dtype).removeprefix("torch."),
                        begin=begin,
                        length=file.size_bytes - begin,
                    )
                )
            sha256 = file.close_durably()
            size_bytes = file.size_bytes
        self.adopt(name, written)
        return DataFile(size_bytes=size_bytes, sha256=sha256, pieces=written)

    def adopt(self, name: str, pieces: Iterable[StoredPiece]) -> None:
        """Take a data file that was written before into the index.

        Raises:
            CheckpointError: if a piece is of another type than the tensor's other pieces.
        """
        for piece in pieces:
            entry = self._tensors.setdefault(
                piece.name,
                dcp.TensorStorageMetadata(
                    properties=dcp.TensorProperties(dtype=getattr(torch, piece.dtype)),
                    size=torch.Size(piece.full_shape),
                    chunks=[],
                ),
            )
            expected = str(entry.properties.dtype).removeprefix("torch.")
            if piece.dtype != expected:
                raise CheckpointError(
                    f"{self._folder / name}: the piece of {piece.name} at {tuple(piece.offsets)} "
                    f"is {piece.dtype}, expected {expected} as its other pieces; write one type"
                )
            offsets, sizes = torch.Size(piece.offsets), torch.Size(piece.sizes)
            index = dcp.MetadataIndex(piece.name, offsets, len(entry.chunks))
            entry.chunks.append(dcp.ChunkStorageMetadata(offsets=offsets, sizes=sizes))
            self._places[index] = filesystem._StorageInfo(name, piece.begin, piece.length)

    def finish(self) -> None:
        """Write the index and what is not a tensor. Not made durable here."""
        buffer = io.BytesIO()
        # Megatron reads the first entry of a list.
        torch.save([{"content_metadata": SHARDING_METADATA}], buffer)
        (self._folder / _COMMON_NAME).write_bytes(buffer.getvalue())
        common = filesystem._StorageInfo(_COMMON_NAME, 0, buffer.tell())
        metadata = dcp.Metadata(
            state_dict_metadata={**self._tensors, _COMMON_STATE_KEY: dcp.BytesStorageMetadata()},
            storage_data={**self._places, dcp.MetadataIndex(_COMMON_STATE_KEY): common},
            storage_meta=dcp.StorageMeta(),
            version=_DCP_VERSION,
        )
        (self._folder / METADATA_NAME).write_bytes(pickle.dumps(metadata))
        (self._folder / _BACKEND_NAME).write_text(json.dumps(_BACKEND), encoding="utf-8")


def data_file_name(number: int) -> str:
    """Return the name of a data file; its suffix is the format's."""
    return f"__0_{number + 1}.distcp"


def _save(tensor: Tensor, file: HashedFile) -> None:
    """Append a tensor, without copying it where its bytes lie in one run."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.untyped_storage().nbytes() != flat.nbytes and flat.numel():
        # torch.save writes the whole storage of a view.
        flat = torch.frombuffer(flat.view(torch.uint8).numpy(), dtype=tensor.dtype)
    torch.save(flat.view(tensor.shape), cast(IO[bytes], file))  # it needs write and flush only
