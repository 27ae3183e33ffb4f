"""Tensors that ``torch.save`` wrote, read in place.

``torch.load`` copies what it reads, and does not look at the checksums that ``torch.save`` writes.
Here the result is a view of the mapped file: nothing is copied, and every byte is compared with
its CRC-32. The pickle inside may describe one plain tensor and nothing else.
"""

import io
import mmap
import pickle
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LOCAL_HEADER = struct.Struct("<26xHH")  # ends with the lengths of name and extra field
_UNREADABLE = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, struct.error, NotImplementedError, OSError),
    *(AttributeError, EOFError, IndexError, KeyError, RuntimeError, TypeError, ValueError),
)
"""What zipfile and pickle raise on bytes that are not what they expect."""


class ArchiveError(ValueError):
    """The bytes are not a plain tensor's archive, or were changed since they were written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """A tensor's place in the storage that is stored beside its description."""

    dtype: torch.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def map_file(path: Path) -> mmap.mmap:
    """Return a file's content, mapped to be read."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def advise_of_read(mapping: mmap.mmap, offset: int, length: int) -> None:
    """Let the operating system read a part of a mapped file ahead."""
    begin = offset - offset % mmap.PAGESIZE
    end = min(offset + length, len(mapping))
    if 0 <= begin < end:
        mapping.madvise(mmap.MADV_WILLNEED, begin, end - begin)


def read_tensor(mapping: mmap.mmap | bytes, offset: int, length: int) -> Tensor:
    """Return the tensor whose archive has ``length`` bytes from ``offset`` of a file's content on.

    The tensor is a view of the content, which it keeps alive; writing to it would be a fault.

    Raises:
        ArchiveError: saying what is wrong.
    """
    if offset < 0 or length <= 0 or offset + length > len(mapping):
        raise ArchiveError(f"bytes {offset} to {offset + length} of {len(mapping)} in the file")
    try:
        with zipfile.ZipFile(_Window(mapping, offset, length)) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            layout = _read_layout(archive, members)
            return _tensor(mapping, offset, members[f"data/{layout.key}"], layout)
    except ArchiveError:
        raise
    except _UNREADABLE as error:
        raise ArchiveError(f"content is damaged ({type(error).__name__}: {error})") from None


def _read_layout(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> _Layout:
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise ArchiveError("written on a machine of another byte order")
    layout = _LayoutUnpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
    if not isinstance(layout, _Layout):
        raise ArchiveError(f"describes {type(layout).__name__}, expected a plain tensor")
    return layout


def _tensor(
    mapping: mmap.mmap | bytes, offset: int, info: zipfile.ZipInfo, layout: _Layout
) -> Tensor:
    """Return the view of a storage's bytes, once they are found to be the written ones."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ArchiveError("is compressed")
    header = offset + info.header_offset
    name_length, extra_length = _LOCAL_HEADER.unpack_from(mapping, header)
    begin = header + _LOCAL_HEADER.size + name_length + extra_length
    content = memoryview(mapping)[begin : begin + info.file_size]
    checksum = zlib.crc32(content)
    if checksum != info.CRC or len(content) != info.file_size:
        raise ArchiveError(f"content is damaged, got CRC-32 {checksum:08x}, wrote {info.CRC:08x}")
    if not content:
        return torch.empty(layout.shape, dtype=layout.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        storage = torch.frombuffer(content, dtype=layout.dtype)
    return storage.as_strided(layout.shape, layout.stride, layout.offset)


class _LayoutUnpickler(pickle.Unpickler):
    """Reads the description of a tensor; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  (signature of pickle)
        """Return the few names that describe a plain tensor."""
        if (module, name) in _SAFE_NAMES:
            return _SAFE_NAMES[module, name]
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, not to be trusted")

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:  # noqa: ANN401  (ditto)
        """Return type and key of a storage."""
        _tag, dtype, key, _location, _num_elements = pid
        return dtype, key


def _rebuild(
    storage: tuple[torch.dtype, str],
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool,
    _hooks: object,
    dtype: torch.dtype | None = None,
    *_metadata: object,
) -> _Layout:
    """Stand for torch's functions of this kind; the third has the type, not the storage."""
    stored_dtype, key = storage
    return _Layout(
        dtype=stored_dtype if dtype is None else dtype,
        key=key,
        offset=offset,
        shape=tuple(shape),
        stride=tuple(stride),
    )


_STORAGE_DTYPES: Mapping[str, torch.dtype] = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}
"""Classes of the format that stand for a type; younger types are named themselves."""

_SAFE_NAMES: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild,
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Window(io.RawIOBase):
    """A part of a mapped file, as a file of its own."""

    def __init__(self, mapping: mmap.mmap | bytes, offset: int, length: int) -> None:
        self._mapping = mapping
        self._offset = offset
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("seek before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  (a writable buffer)
        number = max(0, min(len(buffer), self._length - self._position))
        begin = self._offset + self._position
        buffer[:number] = self._mapping[begin : begin + number]
        self._position += number
        return number
