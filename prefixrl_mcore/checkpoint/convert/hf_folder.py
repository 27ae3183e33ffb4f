"""Reading Hugging Face model folders, one tensor at a time.

Only weights are interpreted. ``config.json``, the generation config, tokenizer files and chat
templates are copied byte for byte: a library that reads and writes them again changes them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.fused_experts import FusedPart, fused_parts
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, check_hf_shapes, find_table
from prefixrl_mcore.checkpoint.convert.safetensors_file import (
    TYPE_NAMES,
    TensorInfo,
    dtype_of,
    read_places,
)
from prefixrl_mcore.checkpoint.manifest import CheckpointError

CONFIG_NAME = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
)
_MAX_ASSET_BYTES = 1 << 30
_DIGEST_BYTES = 1 << 20
_DIGEST_TENSOR_BYTES = 1 << 12


def digest_of_weights(folder: Path) -> str:
    """Return a SHA-256 that tells the weights of a model folder from others, wherever it lies.

    Hashed are name, size, first and last MiB of each file (the header is in the first), and the
    bytes around the beginning of each tensor: seconds for any model. Training that leaves those of
    every tensor as they were escapes it (of some rows of an embedding, all else frozen). The same
    weights in other files have another digest.

    Raises:
        CheckpointError: if the folder has no safetensors weights, or they are damaged.
    """
    digest = hashlib.sha256()
    with HfWeights(folder) as weights:
        for path in weights.files:
            size_bytes = path.stat().st_size
            digest.update(f"{path.name} {size_bytes}\n".encode())
            begins = sorted(begin for begin, _ in read_places(path).values())
            with path.open("rb") as file:
                for begin, length in (
                    (0, _DIGEST_BYTES),
                    *((begin - _DIGEST_TENSOR_BYTES, 2 * _DIGEST_TENSOR_BYTES) for begin in begins),
                    (size_bytes - _DIGEST_BYTES, _DIGEST_BYTES),
                ):
                    file.seek(max(0, begin))
                    digest.update(file.read(length))
    return digest.hexdigest()


def asset_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that are neither weights nor hidden, sorted by name.

    Those in ``additional_chat_templates`` are among them.

    Raises:
        CheckpointError: if one is a link to a file that is not there.
    """
    paths = sorted(
        path
        for path in (*folder.iterdir(), *(folder / _TEMPLATES).glob("*"))
        if path.suffix not in _WEIGHT_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name != "manifest.json"
    )
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path}: is a link to {path.readlink()}, which does not exist; download the model "
                "folder again"
            )
    return [path for path in paths if path.is_file()]


def read_assets(folder: Path) -> dict[str, bytes]:
    """Return config, generation config, tokenizer and template files, by path in the folder.

    Read once and kept, some megabytes, where they are written later: the folder may be changed or
    removed in the meantime.

    Raises:
        CheckpointError: if one cannot be read, or is too large to be what it should be.
    """
    assets: dict[str, bytes] = {}
    try:
        for path in asset_files(folder):
            size_bytes = path.stat().st_size
            if size_bytes > _MAX_ASSET_BYTES:
                raise CheckpointError(
                    f"{path}: has {size_bytes} bytes, expected a config, tokenizer or template "
                    f"file of at most {_MAX_ASSET_BYTES}; move it out of the model folder"
                )
            assets[path.relative_to(folder).as_posix()] = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: config and tokenizer files cannot be read ({error}); look at the storage, "
            "or download the model folder again"
        ) from None
    return assets


def write_assets(assets: Mapping[str, bytes], folder: Path) -> None:
    """Write what ``read_assets`` returned into a folder, which is made if needed."""
    for name, content in assets.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class HfWeights:
    """The weights of a Hugging Face folder; a tensor is read when it is asked for.

    Use as a context manager: files stay open, mapped into memory, until it ends.
    """

    def __init__(self, folder: Path) -> None:
        """Open every weight file and read its header.

        Raises:
            CheckpointError: naming a file that is missing, damaged or truncated, or a weight
                that the index and the files disagree on.
        """
        self.folder = folder
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._fused: dict[str, FusedPart] = {}
        self.infos: dict[str, TensorInfo] = {}
        """Shape and type of each weight, by name."""
        self._places: dict[str, tuple[Path, int, int]] = {}
        self.index: dict[str, str] | None = _read_index(folder)
        self.files = _weight_files(folder, self.index)
        """The files that hold them."""
        try:
            for path in self.files:
                self._open(path)
            self._check_index()
            self._split_fused()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> "HfWeights":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """Return one weight, as stored.

        Raises:
            CheckpointError: if there is no such weight.
        """
        if name in self._fused:
            part = self._fused[name]
            return part.cut(self._file_of[part.stored_name].get_slice(part.stored_name))
        if name not in self._file_of:
            raise CheckpointError(
                f"{self.folder}: weight {name} is missing; use a complete model folder"
            )
        return self._file_of[name].get_tensor(name)

    def prefetch(self, name: str) -> None:
        """Let the operating system read one weight ahead."""
        path, begin, length = self._places[name]
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def check(self, hf_config: Mapping[str, Any]) -> None:
        """Refuse weights that are not exactly those of ``hf_config``.

        A tied model may carry a copy of its embedding as ``lm_head.weight`` (some published
        folders do); it must be equal to the embedding, bit for bit.

        Raises:
            CheckpointError: naming missing, unexpected and wrongly shaped weights.
        """
        table, dims = find_table(hf_config), ModelDims.from_hf_config(hf_config)
        self.leave_out_tied_copy(hf_config)
        found = {name: info.shape for name, info in self.infos.items()}
        check_hf_shapes(found, table.hf_shapes(dims), where=str(self.folder))

    def leave_out_tied_copy(self, hf_config: Mapping[str, Any]) -> None:
        """Forget the copy of its embedding that a tied model may carry as its output head.

        Raises:
            CheckpointError: if it is no copy.
        """
        table, dims = find_table(hf_config), ModelDims.from_hf_config(hf_config)
        head = next(rule for rule in table.rules if rule.is_output_head).hf[0].name
        embedding = table.embedding.hf[0].name
        if not dims.is_tied or head not in self.infos or embedding not in self.infos:
            return
        if not torch.equal(self.read(head), self.read(embedding)):
            raise CheckpointError(
                f"{self.folder}: {head} differs from {embedding} although config.json ties "
                "them; set tie_word_embeddings to false or remove the extra weight"
            )
        del self.infos[head]

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: is missing, expected it because {INDEX_NAME} names it; download it again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: is damaged or truncated ({error}), expected a safetensors file; "
                "download it again"
            ) from None
        for name in file.keys():  # noqa: SIM118 # not a dict
            if name in self._file_of:
                raise CheckpointError(
                    f"{path}: weight {name} is in another file too, expected it once; remove "
                    "weight files that do not belong to the model"
                )
            self._file_of[name] = file
            stored = file.get_slice(name)
            dtype = dtype_of(stored.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: weight {name} has type {stored.get_dtype()}, expected one of "
                    f"{', '.join(TYPE_NAMES.values())}; quantized weights cannot be converted"
                )
            self.infos[name] = TensorInfo(shape=tuple(stored.get_shape()), dtype=dtype)
        for name, (begin, length) in read_places(path).items():
            self._places[name] = (path, begin, length)

    def _check_index(self) -> None:
        if self.index is None:
            return
        unlisted = sorted(self._file_of.keys() - self.index.keys())
        absent = sorted(self.index.keys() - self._file_of.keys())
        if unlisted or absent:
            raise CheckpointError(
                f"{self.folder / INDEX_NAME}: does not fit the files: lists {absent[:3]} that no "
                f"file has, lacks {unlisted[:3]}; download the folder again"
            )

    def _split_fused(self) -> None:
        """Let fused experts appear as single ones."""
        for stored_name, info in list(self.infos.items()):
            path, begin, _ = self._places[stored_name]
            parts = list(fused_parts(stored_name, info.shape, where=path))
            for part in parts:
                if part.name in self.infos:
                    raise CheckpointError(
                        f"{self.folder}: has {part.name} as well as {stored_name}, expected one of "
                        "them; remove weight files that do not belong to the model"
                    )
                self._fused[part.name] = part
                shape = (part.num_rows, part.num_columns)
                self.infos[part.name] = TensorInfo(shape=shape, dtype=info.dtype)
                row = part.expert * info.shape[1] + part.first_row
                row_bytes = part.num_columns * info.dtype.itemsize
                self._places[part.name] = (path, begin + row * row_bytes, part.num_rows * row_bytes)
            if parts:
                del self.infos[stored_name]


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    try:
        index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        odd = [
            name for name in index.values() if not isinstance(name, str) or Path(name).name != name
        ]
        if odd:
            raise TypeError(f"{odd[0]!r} is no name of a file in the folder")
        return index
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is damaged ({type(error).__name__}: {error}), expected a weight_map; "
            "download it again"
        ) from None


def _weight_files(folder: Path, index: dict[str, str] | None) -> list[Path]:
    """Return the files that hold the weights.

    Raises:
        CheckpointError: if there are none, or more than that, of which others may read more.
    """
    named = {folder / name for name in ([SINGLE_FILE] if index is None else index.values())}
    if index is None and not (folder / SINGLE_FILE).exists():
        raise CheckpointError(
            f"{folder}: has neither {SINGLE_FILE} nor {INDEX_NAME}; only safetensors weights can "
            "be read, convert the folder's weights to them"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors") if path not in named)
    if others:
        namer = INDEX_NAME if index is not None else f"{SINGLE_FILE}, without an index,"
        raise CheckpointError(
            f"{folder}: has weight files that {namer} does not name: {others[:3]}, of which other "
            "programs may read another model; remove what does not belong to it"
        )
    return sorted(named)
