"""Reading and writing Hugging Face model folders, one tensor at a time.

Only weights are interpreted. ``config.json``, the generation config, tokenizer files and chat
templates are copied byte for byte: a library that reads and writes them again changes them.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.fused_experts import FusedPart, fused_parts
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, check_hf_shapes, find_table
from prefixrl_mcore.checkpoint.manifest import CheckpointError, write_folder
from prefixrl_mcore.config.json_files import read_json_object

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
_SINGLE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}
)
_DIGEST_BYTES = 1 << 20
_MAX_SHARD_BYTES = 4 * 1024**3


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's ``config.json``.

    Raises:
        CheckpointError: if it is missing or is not a JSON object.
    """
    return read_json_object(
        folder / CONFIG_NAME,
        remedy="name a Hugging Face model folder, or download it again",
        error_cls=CheckpointError,
    )


def digest_of_weights(folder: Path) -> str:
    """Return a SHA-256 that tells the weights of a model folder from others, wherever it lies.

    Hashed are name, size, first and last MiB of each file (header and names of the tensors are in
    the first): seconds for any model, and no change of training escapes it. The same weights in
    other files have another digest.

    Raises:
        CheckpointError: if the folder has no safetensors weights.
    """
    digest = hashlib.sha256()
    for path in sorted(_weight_files(folder, _read_index(folder))):
        size_bytes = path.stat().st_size
        digest.update(f"{path.name} {size_bytes}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_DIGEST_BYTES))
            file.seek(max(0, size_bytes - _DIGEST_BYTES))
            digest.update(file.read(_DIGEST_BYTES))
    return digest.hexdigest()


def asset_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that are neither weights nor hidden, sorted by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix not in _WEIGHT_SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name != "manifest.json"
    )


def copy_assets(source: Path, target: Path) -> None:
    """Copy config, generation config, tokenizer and template files, byte for byte."""
    target.mkdir(parents=True, exist_ok=True)
    for path in asset_files(source):
        shutil.copyfile(path, target / path.name)


class HfWeights:
    """The weights of a Hugging Face folder; a tensor is read when it is asked for.

    Experts that are stored fused appear as weights of single experts (``fused_experts.py``).
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
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of each weight, by name."""
        self.index: dict[str, str] | None = _read_index(folder)
        try:
            for path in _weight_files(folder, self.index):
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

    def check(self, hf_config: Mapping[str, Any]) -> None:
        """Refuse weights that are not exactly those of ``hf_config``.

        A tied model may carry a copy of its embedding as ``lm_head.weight`` (some published
        folders do); it must be equal to the embedding, bit for bit.

        Raises:
            CheckpointError: naming missing, unexpected and wrongly shaped weights.
        """
        table, dims = find_table(hf_config), ModelDims.from_hf_config(hf_config)
        expected = table.hf_shapes(dims)
        found = dict(self.shapes)
        head = next(rule for rule in table.rules if rule.is_output_head).hf[0].name
        if dims.is_tied and head in found:
            embedding = table.embedding.hf[0].name
            if not torch.equal(self.read(head), self.read(embedding)):
                raise CheckpointError(
                    f"{self.folder}: {head} differs from {embedding} although config.json ties "
                    "them; set tie_word_embeddings to false or remove the extra weight"
                )
            del found[head]
        check_hf_shapes(found, expected, where=str(self.folder))

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: is missing, expected it because {_INDEX} names it; download it again"
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
            self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def _check_index(self) -> None:
        if self.index is None:
            return
        unlisted = sorted(self._file_of.keys() - self.index.keys())
        absent = sorted(self.index.keys() - self._file_of.keys())
        if unlisted or absent:
            raise CheckpointError(
                f"{self.folder / _INDEX}: does not fit the files: lists {absent[:3]} that no file "
                f"has, lacks {unlisted[:3]}; download the folder again"
            )

    def _split_fused(self) -> None:
        """Let fused experts appear as single ones."""
        for stored_name, shape in list(self.shapes.items()):
            parts = list(fused_parts(stored_name, shape))
            for part in parts:
                if part.name in self.shapes:
                    raise CheckpointError(
                        f"{self.folder}: has {part.name} as well as {stored_name}, expected one of "
                        "them; remove weight files that do not belong to the model"
                    )
                self._fused[part.name] = part
                self.shapes[part.name] = (part.num_rows, part.num_columns)
            if parts:
                del self.shapes[stored_name]


def write_hf_folder(
    weights: Iterable[tuple[str, Tensor]],
    source_folder: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    is_writer: bool = True,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Write a complete Hugging Face folder: weights, and the other files of ``source_folder``.

    Written under a temporary name and renamed at the end, so an interrupted call leaves nothing
    that looks complete. At most one file's worth of weights is held in memory.

    Args:
        weights: (Hugging Face name, tensor); exhausted on every rank, because making them may
            take collectives.
        source_folder: folder with ``config.json`` and tokenizer files; its weights are ignored.
        out: folder to make; must not exist, or be empty.
        dtype: type of the written weights; None keeps each as it comes.
        is_writer: False on the ranks that only take part in making ``weights``.
        max_shard_bytes: size above which a new weight file is begun.

    Raises:
        CheckpointError: if ``out`` holds something, or ``weights`` are not exactly those that
            ``config.json`` describes; missing, unexpected and wrongly shaped ones are named.
    """
    if not is_writer:
        for _ in weights:
            pass
        return
    refuse_existing(out)
    hf_config = read_hf_config(source_folder)
    expected = find_table(hf_config).hf_shapes(ModelDims.from_hf_config(hf_config))
    with write_folder(out, with_manifest=False) as folder:
        writer = _ShardWriter(folder, expected, dtype, max_shard_bytes)
        for name, tensor in weights:
            writer.add(name, tensor)
        writer.finish(where=str(out))
        copy_assets(source_folder, folder)
    _warn_of_other_dtype(hf_config, writer.dtypes, out)


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError if ``out`` is a file or a folder that holds something."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(
            f"{out}: exists, expected a new or empty folder; remove it or name another one"
        )
    if out.is_dir():
        out.rmdir()


class _ShardWriter:
    """Collects weights into files of bounded size and keeps the index."""

    def __init__(
        self,
        folder: Path,
        expected: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype | None,
        max_shard_bytes: int,
    ) -> None:
        self._folder = folder
        self._expected = expected
        self._dtype = dtype
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._files: list[tuple[Path, list[str]]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[torch.dtype] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one weight; a name that comes twice is refused at once."""
        if name in self._shapes:
            raise CheckpointError(f"weight {name} was exported twice, expected it once")
        self._shapes[name] = tuple(tensor.shape)
        if self._expected.get(name) != self._shapes[name]:
            check_hf_shapes({**self._expected, **self._shapes}, self._expected, where="export")
        # A copy: the exporter may reuse the memory, and safetensors wants no shared storage.
        kept = tensor.detach().to(device="cpu", dtype=self._dtype, copy=True).contiguous()
        num_bytes = kept.numel() * kept.element_size()
        if self._pending and self._pending_bytes + num_bytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = kept
        self._pending_bytes += num_bytes
        self._total_bytes += num_bytes
        self.dtypes.add(kept.dtype)

    def finish(self, *, where: str) -> None:
        """Write what is left, give the files their final names, and write the index."""
        check_hf_shapes(self._shapes, self._expected, where=where)
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / _SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._files, start=1):
            file_name = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            path.rename(self._folder / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self._folder / _INDEX).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._folder / f"part-{len(self._files):05d}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._files.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / _INDEX
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is damaged ({type(error).__name__}: {error}), expected a weight_map; "
            "download it again"
        ) from None


def _weight_files(folder: Path, index: dict[str, str] | None) -> list[Path]:
    if index is not None:
        return sorted({folder / name for name in index.values()})
    path = folder / _SINGLE_FILE
    if not path.exists():
        raise CheckpointError(
            f"{folder}: has neither {_SINGLE_FILE} nor {_INDEX}; only safetensors weights can be "
            "read, convert the folder's weights to them"
        )
    return [path]


def _warn_of_other_dtype(hf_config: Mapping[str, Any], dtypes: set[torch.dtype], out: Path) -> None:
    stated = hf_config.get("dtype") or hf_config.get("torch_dtype")
    written = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if stated is not None and written != [stated]:
        logger.warning(
            "%s: weights are %s but config.json, copied unchanged, says %s; readers that follow "
            "config.json will cast them (choose a dtype to write another type)",
            out,
            " and ".join(written),
            stated,
        )
