"""Writing Hugging Face model folders: weights in files of bounded size, and the index of them."""

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.hf_folder import (
    INDEX_NAME,
    SINGLE_FILE,
    read_assets,
    write_assets,
)
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, check_hf_shapes, find_table
from prefixrl_mcore.checkpoint.convert.safetensors_file import TensorInfo, write_safetensors
from prefixrl_mcore.checkpoint.manifest import SaveError
from prefixrl_mcore.checkpoint.resumable import ResumableFolder, refuse_unless_sealing
from prefixrl_mcore.config.model_shape import read_hf_config

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 5 * 10**9
"""Size above which a new file is begun, unless another is asked for."""


class HfSource(Protocol):
    """Weights under their Hugging Face names, read one by one."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Return shape and type by name, in the order in which reading is cheapest."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one weight."""
        ...

    def prefetch(self, name: str) -> None:
        """Let the operating system read one weight ahead."""
        ...


def write_hf_folder(
    source: HfSource,
    assets: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    task: Mapping[str, Any] | None = None,
    more_files: Mapping[str, str] | None = None,
    before_sealing: Callable[[], object] = lambda: None,
    on_bytes: Callable[[int], object] | None = None,
    on_kept: Callable[[int], object] | None = None,
) -> None:
    """Write a complete Hugging Face folder: weights, and the other files of ``assets``.

    Written under a temporary name and renamed at the end. After a kill, finished weight files are
    kept if the call is repeated. One weight is held in memory at a time.

    Args:
        source: exactly the weights that ``config.json`` describes.
        assets: folder with ``config.json`` and tokenizer files; its weights are ignored.
        out: folder to make; must not exist, or be empty.
        dtype: type of the written weights; None keeps each as it is.
        max_file_bytes: size of weights above which a new file is begun.
        task: what decides the content of ``source``, JSON; see ``ResumableFolder``.
        more_files: text of further files, by name.
        before_sealing: called when everything is written; an error leaves no folder.
        on_bytes: called with the size of each block that was written.
        on_kept: called with the size of each file that a killed call had finished.

    Raises:
        CheckpointError: if ``out`` holds something, or the weights are not those of the config;
            missing, unexpected and wrongly shaped ones are named.
        SaveError: if the storage refuses; finished files are kept.
    """
    refuse_unless_sealing(out)
    hf_config = read_hf_config(assets)
    asset_contents = read_assets(assets)  # refuses what cannot be read, before hours of writing
    expected = find_table(hf_config).hf_shapes(ModelDims.from_hf_config(hf_config))
    infos = {name: info.as_type(dtype) for name, info in source.infos.items()}
    check_hf_shapes({n: info.shape for n, info in infos.items()}, expected, where=str(out))
    files = plan_files(infos, max_file_bytes)
    settings = {"files": {n: list(names) for n, names in files.items()}, "dtype": str(dtype)}
    everything = {**settings, "of": task, "more": dict(more_files or {})}
    resumable = ResumableFolder(out, everything, on_kept)
    if not resumable.is_sealed():
        with resumable as folder:
            for name, names in files.items():
                if name in folder.finished:
                    continue
                size_bytes, sha256 = write_safetensors(
                    folder.path / name,
                    {one: infos[one] for one in names},
                    _reader_ahead(source, names),
                    on_bytes,
                )
                folder.finish(name, size_bytes=size_bytes, sha256=sha256)
            _write_rest(folder.path, files, infos, asset_contents, more_files or {})
            before_sealing()
            folder.seal(with_manifest=False)
    _warn_of_other_dtype(hf_config, {info.dtype for info in infos.values()}, out)


def plan_files(infos: Mapping[str, TensorInfo], max_file_bytes: int) -> dict[str, list[str]]:
    """Return which weights go into which file, in the order of the file.

    Larger types come first in a file, so that every tensor is aligned to its type.
    """
    groups: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if groups[-1] and size + info.num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += info.num_bytes
    for group in groups:
        group.sort(key=lambda name: -infos[name].dtype.itemsize)
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _reader_ahead(source: HfSource, names: list[str]) -> Callable[[str], Tensor]:
    """Return ``source.read`` that also has the next weight read ahead."""
    following = dict(itertools.pairwise(names))

    def read(name: str) -> Tensor:
        if name in following:
            source.prefetch(following[name])
        return source.read(name)

    return read


def _write_rest(
    folder: Path,
    files: Mapping[str, list[str]],
    infos: Mapping[str, TensorInfo],
    assets: Mapping[str, bytes],
    more_files: Mapping[str, str],
) -> None:
    """Write the index, if there are several files, and everything but weights."""
    try:
        if len(files) > 1:
            weight_map = {name: file for file, names in files.items() for name in names}
            total_size = sum(info.num_bytes for info in infos.values())
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / INDEX_NAME).write_text(text, encoding="utf-8")
        write_assets(assets, folder)
        for name, text in more_files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{folder}: the storage refused: {error}; repeat the command") from error


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
