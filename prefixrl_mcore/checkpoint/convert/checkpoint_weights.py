"""The weights of a checkpoint under their Hugging Face names, one by one, without a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from prefixrl_mcore.checkpoint import manifest
from prefixrl_mcore.checkpoint.convert import layout
from prefixrl_mcore.checkpoint.convert.rules import ModelDims, Place, Rule, find_table, hf_name
from prefixrl_mcore.checkpoint.convert.safetensors_file import TensorInfo
from prefixrl_mcore.checkpoint.manifest import CheckpointError
from prefixrl_mcore.checkpoint.run_checkpoints import HF_FOLDER, MEGATRON_FOLDER
from prefixrl_mcore.checkpoint.torch_dist import TorchDistReader, is_extra_state
from prefixrl_mcore.config.model_shape import read_hf_config

_DATA_SUFFIX = ".distcp"
_NO_WEIGHT_PREFIXES = ("optimizer.", "chained_")  # Megatron's, of the optimizer's state


class CheckpointWeights:
    """The weights of one checkpoint as Hugging Face has them; read when they are asked for.

    Sizes of all files, and contents of all but the tensors, are compared with the manifest at
    once. Tensors are compared with their own checksums when they are read: a checkpoint of a run
    is mostly optimizer state, which nobody needs to read for this.
    """

    def __init__(self, path: Path) -> None:
        """Read what is not a tensor.

        Raises:
            CheckpointError: if the checkpoint is incomplete or damaged, or its weights are not
                those of its ``config.json``.
        """
        self.path = path
        """The checkpoint."""
        listed = manifest.verify(path, checksums=False)
        manifest.verify_contents(
            path, {n: file for n, file in listed.files.items() if not n.endswith(_DATA_SUFFIX)}
        )
        self.hf_config: dict[str, Any] = read_hf_config(path / HF_FOLDER)
        """Content of ``config.json``."""
        self.infos: dict[str, TensorInfo] = {}
        """Shape and type of each weight, by name, in the order of the family's table."""
        self._table, self._dims = (
            find_table(self.hf_config),
            ModelDims.from_hf_config(self.hf_config),
        )
        self._reader = TorchDistReader(path / MEGATRON_FOLDER)
        self._sources: dict[str, tuple[Rule, Place, int]] = {}
        self._last: tuple[tuple[Rule, Place] | None, list[Tensor]] = (None, [])
        used: set[str] = set()
        for rule, place in self._table.weights(self._dims):
            stored, _ = self._stored_as(rule, place)
            used.add(stored)
            dtype = self._reader.dtypes[stored]
            for index, weight in enumerate(rule.hf):
                name = hf_name(weight, place)
                self.infos[name] = TensorInfo(shape=weight.shape(self._dims), dtype=dtype)
                self._sources[name] = (rule, place, index)
        self._refuse_unused(used)

    def read(self, name: str) -> Tensor:
        """Return one weight; it may share memory with the file and must not be written to.

        Weights that are one in Megatron are cheapest to read one after the other.

        Raises:
            CheckpointError: if it is damaged.
        """
        rule, place, index = self._sources[name]
        if self._last[0] != (rule, place):
            self._last = (None, [])  # not held while the next one is put together
            stored, indices = self._stored_as(rule, place)
            tensors = layout.full_to_hf(
                rule.kind,
                self._reader.read(stored, *indices),
                rows=rule.rows(self._dims),
                num_groups=self._dims.num_groups,
            )
            self._last = ((rule, place), tensors)
        return self._last[1][index]

    def prefetch(self, name: str) -> None:
        """Let the operating system read one weight ahead."""
        rule, place, _ = self._sources[name]
        if self._last[0] != (rule, place):
            stored, indices = self._stored_as(rule, place)
            self._reader.prefetch(stored, *indices)

    def _stored_as(self, rule: Rule, place: Place) -> tuple[str, tuple[int, ...]]:
        """Return the name of a whole Megatron weight and its place in a stack."""
        name, shapes = rule.checkpoint_name, self._reader.shapes
        if name not in shapes:
            raise CheckpointError(
                f"{self.path}: lacks {name}, expected it as its config.json says; use another "
                "checkpoint"
            )
        self._check_shape(rule, name, shapes[name])
        return name, tuple(index for index in (place.layer, place.expert) if index is not None)

    def _refuse_unused(self, used: set[str]) -> None:
        """Refuse weights that no rule has asked for: the folder would be another model."""
        unused = sorted(
            name
            for name in self._reader.shapes.keys() - used
            if not name.startswith(_NO_WEIGHT_PREFIXES) and not is_extra_state(name)
        )
        if unused:
            raise CheckpointError(
                f"{self.path}: holds {len(unused)} weights that its config.json says nothing of: "
                f"{', '.join(unused[:5])}; use a checkpoint and config.json of the same model"
            )

    def _check_shape(self, rule: Rule, name: str, shape: tuple[int, ...]) -> None:
        expected = rule.checkpoint_shape(self._dims)
        rows = shape[0] if shape else 0
        is_padded = rule.kind == "vocab" and rows >= expected[0]
        if shape[1:] != expected[1:] or not (rows == expected[0] or is_padded):
            raise CheckpointError(
                f"{self.path}: {name} got shape {shape}, expected {expected} as its config.json "
                "says; use another checkpoint"
            )


def checkpoint_facts(path: Path) -> Mapping[str, Any]:
    """Return what tells this checkpoint's content from any other's, JSON.

    Raises:
        CheckpointError: if it has no manifest (any more).
    """
    manifest_path = path / manifest.MANIFEST_NAME
    try:
        return {"manifest": manifest.hash_file(manifest_path)}
    except OSError as error:
        raise CheckpointError(
            f"{manifest_path}: cannot be read ({error}), so {path} is incomplete or no "
            "checkpoint; use another one"
        ) from None


def refuse_changed_checkpoint(path: Path, facts: Mapping[str, Any]) -> None:
    """Refuse what was read of a checkpoint that was replaced or deleted meanwhile.

    Its data files are opened one by one, so that the weights may be of two checkpoints.

    Args:
        path: the checkpoint, from which everything has been read.
        facts: ``checkpoint_facts`` before anything was read.

    Raises:
        CheckpointError: if it is not the same any more.
    """
    try:
        is_same = checkpoint_facts(path) == facts
    except CheckpointError:
        is_same = False
    if not is_same:
        raise CheckpointError(
            f"{path}: was replaced or deleted while it was converted, so that the result would "
            "mix two models; name a checkpoint that stays, and repeat"
        )
