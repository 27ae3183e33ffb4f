"""Whether two models, each a Hugging Face folder or a checkpoint, have the same weights."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixrl_mcore.checkpoint.convert.checkpoint_weights import CheckpointWeights
from prefixrl_mcore.checkpoint.convert.hf_folder import CONFIG_NAME, HfWeights
from prefixrl_mcore.checkpoint.convert.hf_writer import HfSource
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, check_hf_shapes, find_table
from prefixrl_mcore.checkpoint.convert.safetensors_file import BLOCK_BYTES
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.run_checkpoints import (
    HF_FOLDER,
    is_model_folder,
    resolve_checkpoint,
)
from prefixrl_mcore.config.model_shape import read_hf_config, read_model_shape, shape_differences

_BLOCK_NUMBERS = BLOCK_BYTES // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenModel:
    """A Hugging Face folder or a checkpoint, opened to be read."""

    path: Path
    """The folder or the checkpoint."""

    assets: Path
    """Folder of its ``config.json`` and tokenizer."""

    hf_config: Mapping[str, Any]
    """Content of ``config.json``."""

    weights: HfSource
    """Its weights under Hugging Face names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One way in which two models differ."""

    name: str
    """The weight, or the property of the model."""

    what: str
    """``missing``, ``shape``, ``type``, ``values`` or ``config``."""

    first: str
    """What the first model has."""

    second: str
    """What the second model has."""

    max_difference: float | None = None
    """Largest absolute difference of two numbers; None where numbers cannot be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The weights of two models side by side."""

    num_weights: int
    """Weights of the first model."""

    num_bytes: int
    """Their bytes."""

    sha256: str
    """Hexadecimal digest of all names, shapes, types and numbers of the first model."""

    differences: tuple[Difference, ...]
    """Empty if the models are the same, bit for bit."""

    faults: tuple[str, ...]
    """How a model's weights do not fit its own ``config.json``; two may lack the same."""


@contextmanager
def open_model(path: Path) -> Iterator[OpenModel]:
    """Yield a Hugging Face folder, a checkpoint, or the latest one of a folder or a run.

    Raises:
        CheckpointError: if it is neither, incomplete or damaged.
    """
    if is_model_folder(path):
        hf_config = read_hf_config(path)
        with HfWeights(path) as weights:
            weights.leave_out_tied_copy(hf_config)
            yield OpenModel(path=path, assets=path, hf_config=hf_config, weights=weights)
        return
    try:
        checkpoint = resolve_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; a Hugging Face folder has a {CONFIG_NAME}") from None
    weights = CheckpointWeights(checkpoint)
    yield OpenModel(
        path=checkpoint,
        assets=checkpoint / HF_FOLDER,
        hf_config=weights.hf_config,
        weights=weights,
    )


def compare_models(
    first: OpenModel, second: OpenModel, on_bytes: Callable[[int], object] | None = None
) -> Comparison:
    """Compare what the configs say of the computation, and every weight, one at a time.

    Args:
        first: a model.
        second: another.
        on_bytes: called with the bytes of each weight of the first that was compared.

    Raises:
        ValueError: if a config is not of a supported model.
        CheckpointError: if a weight is damaged.
    """
    found = _compare_configs(first.hf_config, second.hf_config)
    ours, theirs = first.weights.infos, second.weights.infos
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as thread:
        for name, info in ours.items():
            tensor = first.weights.read(name)
            other = second.weights.read(name) if name in theirs else None
            hashing = thread.submit(_sha256, tensor)
            their_sha256 = None if other is None else _sha256(other)
            our_sha256 = hashing.result()
            digest.update(f"{name} {info.shape} {info.dtype} {our_sha256}\n".encode())
            if other is None or their_sha256 is None:
                found.append(_missing(name, first="there", second="missing"))
            else:
                found += _compare(name, tensor, other, our_sha256, their_sha256)
            if on_bytes is not None:
                on_bytes(info.num_bytes)
    found += [
        _missing(name, first="missing", second="there") for name in theirs if name not in ours
    ]
    return Comparison(
        num_weights=len(ours),
        num_bytes=sum(info.num_bytes for info in ours.values()),
        sha256=digest.hexdigest(),
        differences=tuple(found),
        faults=tuple(_faults(first) + _faults(second)),
    )


def _compare_configs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    differences = shape_differences(read_model_shape(ours), read_model_shape(theirs))
    return [
        Difference(name=name, what="config", first=str(first), second=str(second))
        for name, (first, second) in differences.items()
    ]


def _faults(model: OpenModel) -> list[str]:
    """Return how the weights are not exactly those of the model's ``config.json``."""
    dims = ModelDims.from_hf_config(model.hf_config)
    found = {name: info.shape for name, info in model.weights.infos.items()}
    try:
        check_hf_shapes(found, find_table(model.hf_config).hf_shapes(dims), where=str(model.path))
    except CheckpointError as error:
        return [str(error)]
    return []


def _missing(name: str, *, first: str, second: str) -> Difference:
    return Difference(name=name, what="missing", first=first, second=second)


def _compare(
    name: str, ours: Tensor, theirs: Tensor, our_sha256: str, their_sha256: str
) -> list[Difference]:
    """Return the first of shape, type and values that differs."""
    if ours.shape != theirs.shape:
        what, first, second = "shape", str(list(ours.shape)), str(list(theirs.shape))
        return [Difference(name=name, what=what, first=first, second=second)]
    if ours.dtype != theirs.dtype:
        what, first, second = "type", str(ours.dtype), str(theirs.dtype)
    elif our_sha256 != their_sha256:
        what, first, second = "values", our_sha256[:12], their_sha256[:12]
    else:
        return []
    return [
        Difference(
            name=name,
            what=what,
            first=first.removeprefix("torch."),
            second=second.removeprefix("torch."),
            max_difference=_max_difference(ours, theirs),
        )
    ]


def _max_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference; NaN where only one has a NaN."""
    largest = 0.0
    pairs = zip(
        ours.reshape(-1).split(_BLOCK_NUMBERS),
        theirs.reshape(-1).split(_BLOCK_NUMBERS),
        strict=True,
    )
    for one, other in pairs:
        gap = (one.double() - other.double()).abs()
        gap[one.double() == other.double()] = 0.0  # equal infinities
        gap[one.isnan() & other.isnan()] = 0.0
        largest = max(largest, float(gap.max())) if not gap.isnan().any() else float("nan")
        if largest != largest:  # NaN
            break
    return largest


def _sha256(tensor: Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(content)).hexdigest()
