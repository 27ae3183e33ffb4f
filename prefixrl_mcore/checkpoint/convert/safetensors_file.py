"""One safetensors file: where its tensors lie, and writing it tensor by tensor.

The format is 8 bytes with the length of a JSON header, the header, and the tensors' bytes without
gaps. The library's ``save_file`` wants all tensors of a file in memory; here each is written when
it is there, because names, shapes and types are known before.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.hashed_file import HashedFile

BLOCK_BYTES = 64 * 1024**2
"""What a change of type holds in memory beside the tensor."""

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
TYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Types that weights of a model have; whole numbers are quantized ones or no weights."""

_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in TYPE_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    """Its shape."""

    dtype: torch.dtype
    """Its type."""

    def as_type(self, dtype: torch.dtype | None) -> "TensorInfo":
        """Return the same tensor in another type; None keeps it."""
        return TensorInfo(shape=self.shape, dtype=dtype or self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def dtype_of(type_name: str) -> torch.dtype | None:
    """Return the type that a header names; None for one that is no weight's."""
    return _DTYPES.get(type_name)


def read_places(path: Path) -> dict[str, tuple[int, int]]:
    """Return where each tensor of a file lies: (first byte, length).

    The file must have been opened by the library, which checks the header, before.
    """
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json.loads(file.read(length))
    begin = _LENGTH.size + length
    return {
        name: (
            begin + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    on_bytes: Callable[[int], object] | None = None,
) -> tuple[int, str]:
    """Write a file and return its size and SHA-256; it is durable then.

    Args:
        path: the file.
        infos: the tensors as they are to be written, the larger types first.
        read: returns a tensor by name, of that shape; it is cast to that type in blocks.
        on_bytes: called with the size of each block that was written.

    Raises:
        SaveError: if the storage refuses.
    """
    with HashedFile(path, on_bytes) as file:
        file.write(_header(infos))
        for name, info in infos.items():
            tensor = read(name)
            assert tuple(tensor.shape) == info.shape, f"{name}: planned {info.shape}"
            for block in _blocks(tensor, info.dtype):
                file.write(block)
                file.raise_kept()
        return file.size_bytes, file.close_durably()


def _header(infos: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, info in infos.items():
        end = begin + info.num_bytes
        header[name] = {
            "dtype": TYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


def _blocks(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in its new type."""
    flat = tensor.detach().contiguous().reshape(-1)
    for block in flat.split(BLOCK_BYTES // max(tensor.itemsize, dtype.itemsize)):
        yield memoryview(block.to(dtype).view(torch.uint8).numpy())
