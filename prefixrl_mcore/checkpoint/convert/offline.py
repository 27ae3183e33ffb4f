"""Conversion between checkpoints and Hugging Face folders without a model, GPU or other ranks.

One process, one weight at a time. Weights are views of mapped files wherever the two formats hold
the same bytes in the same order, so memory is at most the largest weight and a block.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prefixrl_mcore.checkpoint.convert import layout
from prefixrl_mcore.checkpoint.convert.checkpoint_weights import (
    CheckpointWeights,
    checkpoint_facts,
    refuse_changed_checkpoint,
)
from prefixrl_mcore.checkpoint.convert.hf_folder import (
    HfWeights,
    read_assets,
    write_assets,
)
from prefixrl_mcore.checkpoint.convert.hf_writer import MAX_FILE_BYTES, write_hf_folder
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, Place, Rule, find_table, hf_name
from prefixrl_mcore.checkpoint.manifest import CheckpointError, SaveError
from prefixrl_mcore.checkpoint.resumable import ResumableFolder, refuse_unless_sealing
from prefixrl_mcore.checkpoint.run_checkpoints import (
    HF_FOLDER,
    MEGATRON_FOLDER,
    TrainerState,
    read_trainer_state,
    resolve_checkpoint,
    write_trainer_state,
)
from prefixrl_mcore.checkpoint.torch_dist_writer import (
    Piece,
    StoredPiece,
    TorchDistWriter,
    data_file_name,
)
from prefixrl_mcore.config.model_shape import read_hf_config, read_model_shape

logger = logging.getLogger(__name__)

OnStart = Callable[[int], Callable[[int], object]]
"""Called with the bytes of weights of the whole; what it returns, with those of each block that
was written."""


def convert_to_hf(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    more_files: Mapping[str, str] | None = None,
    on_start: OnStart | None = None,
    on_kept: Callable[[int], object] | None = None,
) -> Path:
    """Write the weights of a checkpoint as a Hugging Face folder; return the checkpoint's path.

    Config, generation config, tokenizer and template files are those of the initial model, byte
    for byte. An interrupted call leaves no folder of the name ``out``; repeated, it goes on.

    Args:
        checkpoint: a checkpoint, or a folder of checkpoints, whose latest is taken.
        out: folder to make; must not exist, or be empty.
        dtype: type of the written weights; None keeps the checkpoint's.
        max_file_bytes: size of weights above which a new file is begun.
        more_files: text of further files, by name.
        on_start: for progress.
        on_kept: called with the bytes of each file that a killed conversion had finished.

    Raises:
        CheckpointError: if the checkpoint is missing, incomplete or damaged, or was replaced
            meanwhile, a weight is missing or of the wrong shape, or ``out`` holds something.
        SaveError: if the storage refuses.
    """
    refuse_unless_sealing(out)
    path = resolve_checkpoint(checkpoint)
    facts = checkpoint_facts(path)
    weights = CheckpointWeights(path)
    sizes = (info.as_type(dtype).num_bytes for info in weights.infos.values())
    write_hf_folder(
        weights,
        path / HF_FOLDER,
        out,
        dtype=dtype,
        max_file_bytes=max_file_bytes,
        task=facts,
        more_files=more_files,
        before_sealing=lambda: refuse_changed_checkpoint(path, facts),
        on_bytes=None if on_start is None else on_start(sum(sizes)),
        on_kept=on_kept,
    )
    logger.info("wrote %s from step %d of %s", out, read_trainer_state(path).step, path)
    return path


def convert_from_hf(
    source: Path,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_start: OnStart | None = None,
    on_kept: Callable[[int], object] | None = None,
) -> None:
    """Write the weights of a Hugging Face folder as a checkpoint of step 0, without optimizer.

    ``load_checkpoint`` loads it in any parallel layout; optimizer and schedule begin anew. An
    interrupted call leaves no folder of the name ``out``; repeated, it goes on.

    Args:
        source: folder with ``config.json``, safetensors weights and tokenizer files.
        out: checkpoint folder to make; must not exist, or be empty.
        dtype: type of the stored weights; None keeps each as it is, and refuses several types in
            what is one weight in Megatron.
        max_file_bytes: size of weights above which a new file is begun.
        on_start: for progress.
        on_kept: called with the bytes of each file that a killed conversion had finished.

    Raises:
        ConfigError: if ``config.json`` is of an unsupported model or has a field that is not
            understood.
        CheckpointError: naming a damaged file, or a weight that is missing, unexpected, of the
            wrong shape or of another type; or if ``out`` holds something.
        SaveError: if the storage refuses.
    """
    refuse_unless_sealing(out)
    hf_config = read_hf_config(source)
    assets = read_assets(source)  # refuses what cannot be read, before hours of writing weights
    read_model_shape(hf_config)  # refuses what training would refuse, above all unknown fields
    with HfWeights(source) as weights:
        weights.check(hf_config)
        conversion = _FromHf(weights, hf_config, dtype)
        facts = _hf_facts(weights, assets)
        task = {
            "of": facts,
            "dtype": str(dtype),
            "max_file_bytes": max_file_bytes,
        }
        resumable = ResumableFolder(out, task, on_kept)
        if resumable.is_sealed():
            return
        with resumable as folder:
            (folder.path / MEGATRON_FOLDER).mkdir(exist_ok=True)
            conversion.write(folder, max_file_bytes, on_start)
            try:
                write_assets(assets, folder.path / HF_FOLDER)
                write_trainer_state(
                    folder.path,
                    TrainerState(
                        step=0, policy_version=0, has_optimizer=False, world_size=0, extra_state={}
                    ),
                )
            except OSError as error:
                raise SaveError(f"{out}: the storage refused: {error}; repeat") from error
            _refuse_changed(source, weights, facts)
            folder.seal(with_manifest=True)
    logger.info("wrote checkpoint %s from %s", out, source)


class _FromHf:
    """The Megatron weights that a Hugging Face folder makes."""

    def __init__(
        self, weights: HfWeights, hf_config: Mapping[str, Any], dtype: torch.dtype | None
    ) -> None:
        self._weights = weights
        self._dtype = dtype
        self._dims = ModelDims.from_hf_config(hf_config)
        self._all = list(find_table(hf_config).weights(self._dims))
        if dtype is None:
            self._refuse_mixed_types()

    def write(self, folder: ResumableFolder, max_file_bytes: int, on_start: OnStart | None) -> None:
        """Write all data files but those that are finished, and their index."""
        on_bytes = None
        if on_start is not None:
            on_bytes = on_start(sum(self._num_bytes(*one) for one in self._all))
        writer = TorchDistWriter(folder.path / MEGATRON_FOLDER)
        for number, group in enumerate(self._groups(max_file_bytes)):
            name = data_file_name(number)
            path = f"{MEGATRON_FOLDER}/{name}"
            if path in folder.finished:
                done = folder.finished[path]
                writer.adopt(name, [StoredPiece(**piece) for piece in done.notes])
                continue
            file = writer.write_file(name, self._pieces(group), on_bytes)
            notes = [asdict(piece) for piece in file.pieces]
            folder.finish(path, size_bytes=file.size_bytes, sha256=file.sha256, notes=notes)
        writer.finish()

    def _groups(self, max_file_bytes: int) -> Iterator[list[tuple[Rule, Place]]]:
        """Yield the weights of each data file."""
        group: list[tuple[Rule, Place]] = []
        size = 0
        for rule, place in self._all:
            num_bytes = self._num_bytes(rule, place)
            if group and size + num_bytes > max_file_bytes:
                yield group
                group, size = [], 0
            group.append((rule, place))
            size += num_bytes
        yield group

    def _num_bytes(self, rule: Rule, place: Place) -> int:
        infos = [self._weights.infos[hf_name(weight, place)] for weight in rule.hf]
        return sum(info.as_type(self._dtype).num_bytes for info in infos)

    def _refuse_mixed_types(self) -> None:
        """Refuse weights of several types where Megatron stores one, with all layers and experts.

        Raises:
            CheckpointError: naming two weights with their types.
        """
        first: dict[str, tuple[str, torch.dtype]] = {}
        for rule, place in self._all:
            stored = rule.checkpoint_name
            for name in (hf_name(weight, place) for weight in rule.hf):
                dtype = self._weights.infos[name].dtype
                other, expected = first.setdefault(stored, (name, dtype))
                if dtype != expected:
                    raise CheckpointError(
                        f"{self._weights.folder}: {other} is {expected} and {name} is {dtype}, "
                        f"expected one type, because both are parts of Megatron's {stored}; "
                        "choose one with --dtype"
                    )

    def _pieces(self, group: list[tuple[Rule, Place]]) -> Iterator[Piece]:
        """Yield Megatron weights; layers as pieces of a stack, as Megatron stores them."""
        for index, (rule, place) in enumerate(group):
            for weight in (w for r, p in group[index + 1 : index + 2] for w in r.hf):
                self._weights.prefetch(hf_name(weight, group[index + 1][1]))
            yield self._piece(rule, place)

    def _piece(self, rule: Rule, place: Place) -> Piece:
        names = [hf_name(weight, place) for weight in rule.hf]
        tensors = [self._weights.read(name) for name in names]
        full = layout.hf_to_full(rule.kind, tensors, num_groups=self._dims.num_groups)
        full = full.to(dtype=self._dtype)  # after the merge: one weight in the larger type, not two
        place_in_stack = tuple(i for i in (place.layer, place.expert) if i is not None)
        return Piece(
            name=rule.checkpoint_name,
            full_shape=rule.checkpoint_shape(self._dims),
            offsets=(*place_in_stack, *(0,) * full.dim()),
            tensor=full[(None,) * len(place_in_stack)],
        )


def _hf_facts(weights: HfWeights, assets: Mapping[str, bytes]) -> dict[str, Any]:
    """Return what tells this model folder's content from any other's, JSON.

    Weight files by place, size and times: hashing them would take as long as converting them. The
    time of the last change of the inode is there because copying tools set the other one.
    """
    files = {path.name: path.resolve() for path in weights.files}
    stats = {name: (str(path), path.stat()) for name, path in files.items()}
    return {
        "files": {
            name: [path, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]
            for name, (path, s) in stats.items()
        },
        "assets": {n: hashlib.sha256(content).hexdigest() for n, content in assets.items()},
    }


def _refuse_changed(source: Path, weights: HfWeights, facts: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the folder is not what it was at the beginning."""
    try:
        is_same = _hf_facts(weights, read_assets(source)) == facts
    except (OSError, CheckpointError):
        is_same = False
    if not is_same:
        raise CheckpointError(
            f"{source}: changed while it was converted, so that the result would mix two models; "
            "wait until nothing writes there, and repeat"
        )
