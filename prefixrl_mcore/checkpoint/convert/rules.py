"""What a family table says, and how it is looked up.

A table lists, for one Hugging Face ``model_type``, which Hugging Face weights make up which
Megatron weight. Adding a family is adding ``tables/<model_type>.py`` with a ``TABLE``.
"""

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from prefixrl_mcore.checkpoint.convert.layout import Kind
from prefixrl_mcore.checkpoint.manifest import CheckpointError

Dim = Literal["hidden", "query", "key_value", "head", "ffn", "vocab"]

_LAYER = "{layer}"
_MAX_NAMES_IN_ERROR = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDims:
    """Sizes of one model, as far as its weights depend on them."""

    num_layers: int
    """Decoder layers."""

    num_groups: int
    """Key/value heads."""

    is_tied: bool
    """The output head is the embedding; Hugging Face then stores no ``lm_head.weight``."""

    sizes: Mapping[Dim, int]
    """``hidden``; ``query``: query heads x head size; ``key_value``: key/value heads x head size;
    ``head``: head size; ``ffn``; ``vocab`` without padding."""

    @classmethod
    def from_hf_config(cls, hf_config: Mapping[str, Any]) -> "ModelDims":
        """Return the sizes that a ``config.json`` states.

        Raises:
            CheckpointError: if a needed key is missing.
        """
        try:
            num_heads = int(hf_config["num_attention_heads"])
            hidden = int(hf_config["hidden_size"])
            num_groups = int(hf_config["num_key_value_heads"])
            head = int(hf_config.get("head_dim") or hidden // num_heads)
            return cls(
                num_layers=int(hf_config["num_hidden_layers"]),
                num_groups=num_groups,
                is_tied=bool(hf_config.get("tie_word_embeddings", False)),
                sizes={
                    "hidden": hidden,
                    "query": num_heads * head,
                    "key_value": num_groups * head,
                    "head": head,
                    "ffn": int(hf_config["intermediate_size"]),
                    "vocab": int(hf_config["vocab_size"]),
                },
            )
        except KeyError as error:
            raise CheckpointError(
                f"config.json: key {error} is missing, expected it in a config of model_type "
                f"{hf_config.get('model_type')!r}; check the model folder"
            ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class HfWeight:
    """A Hugging Face weight: its name (``{layer}`` for the layer) and its shape."""

    name: str
    """Name in the safetensors files; ``{layer}`` stands for the layer's index."""

    dims: tuple[Dim, ...]
    """Shape, by the names of ``ModelDims.sizes``."""

    def shape(self, dims: ModelDims) -> tuple[int, ...]:
        """Return the shape in numbers."""
        return tuple(dims.sizes[dim] for dim in self.dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One Megatron weight and the Hugging Face weights it is made of."""

    kind: Kind
    """Layout; see ``layout.py``."""

    megatron: tuple[str, ...]
    """Names of the weight in a model: Transformer Engine's first, then the local spec's where
    it differs. The first is also the name in a checkpoint, under either spec."""

    hf: tuple[HfWeight, ...]
    """In the order that ``layout.hf_to_full`` takes."""

    is_output_head: bool = False
    """The head that a model with tied embeddings does not have."""

    @property
    def is_per_layer(self) -> bool:
        """The weight exists once in each decoder layer."""
        return _LAYER in self.megatron[0]

    def checkpoint_name(self, layer: int | None) -> str:
        """Return the name in a checkpoint that stores each layer under its own name."""
        return self.megatron[0].replace(_LAYER, str(layer))

    def stacked_checkpoint_name(self) -> str:
        """Return the name in a checkpoint that stacks all layers along a new first dimension."""
        return self.megatron[0].replace(f"{_LAYER}.", "")

    def full_shape(self, dims: ModelDims) -> tuple[int, ...]:
        """Return the shape of the whole Megatron weight, without vocabulary padding."""
        shapes = [weight.shape(dims) for weight in self.hf]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def rows(self, dims: ModelDims) -> list[int]:
        """Return the number of rows of each Hugging Face weight."""
        return [weight.shape(dims)[0] for weight in self.hf]


@dataclass(frozen=True)
class FamilyTable:
    """All rules of one Hugging Face ``model_type``."""

    model_type: str
    """Value of ``model_type`` in ``config.json``."""

    rules: tuple[Rule, ...]
    """In the order in which weights are exported."""

    embedding: Rule
    """The rule of the input embedding, which a tied output head is a copy of."""

    output_head_name: str = "output_layer.weight"
    """Megatron's name of the output head."""

    @cached_property
    def _by_pattern(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [
            (re.compile(re.escape(name).replace(re.escape(_LAYER), r"(?P<layer>\d+)")), rule)
            for rule in self.rules
            for name in rule.megatron
        ]

    def find(self, megatron_name: str, dims: ModelDims) -> tuple[Rule, int | None] | None:
        """Return the rule of a Megatron weight and the layer in its name; None if unknown."""
        for pattern, rule in self._by_pattern:
            match = pattern.fullmatch(megatron_name)
            if match and not (rule.is_output_head and dims.is_tied):
                layer = match.groupdict().get("layer")
                return rule, None if layer is None else int(layer)
        return None

    def weights(self, dims: ModelDims) -> Iterator[tuple[Rule, int | None]]:
        """Yield every (rule, layer) that a model has, in the order of Hugging Face's files.

        Globals before the layers, then layer by layer, then the globals after them.
        """
        per_layer = [rule for rule in self.rules if rule.is_per_layer]
        seen_layers = False
        for rule in self.rules:
            if rule.is_per_layer:
                if not seen_layers:
                    yield from ((r, layer) for layer in range(dims.num_layers) for r in per_layer)
                seen_layers = True
            elif not (rule.is_output_head and dims.is_tied):
                yield rule, None

    def hf_shapes(self, dims: ModelDims) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every weight that the Hugging Face folder must hold."""
        return {
            hf_name(weight, layer): weight.shape(dims)
            for rule, layer in self.weights(dims)
            for weight in rule.hf
        }


def hf_name(weight: HfWeight, layer: int | None) -> str:
    """Return the full name of a Hugging Face weight."""
    return weight.name.replace(_LAYER, str(layer))


def find_table(hf_config: Mapping[str, Any]) -> FamilyTable:
    """Return the table of the family that a ``config.json`` names.

    Raises:
        CheckpointError: if there is no table for its ``model_type``.
    """
    model_type = hf_config.get("model_type")
    package = f"{__package__}.tables"
    known = sorted(path.stem for path in (Path(__file__).parent / "tables").glob("[a-z]*.py"))
    if model_type not in known:
        raise CheckpointError(
            f"config.json: model_type {model_type!r} cannot be converted, expected one of "
            f"{', '.join(known)}; add a table for it to {package}"
        )
    return importlib.import_module(f"{package}.{model_type}").TABLE


def check_hf_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Refuse a set of Hugging Face weights that is not exactly the expected one.

    Raises:
        CheckpointError: naming missing, unexpected and wrongly shaped weights.
    """
    faults = [
        _faults("missing", sorted(expected.keys() - found.keys())),
        _faults("unexpected", sorted(found.keys() - expected.keys())),
        _faults(
            "wrong shape",
            [
                f"{name} got {list(found[name])}, expected {list(expected[name])}"
                for name in sorted(expected.keys() & found.keys())
                if tuple(found[name]) != tuple(expected[name])
            ],
        ),
    ]
    if any(faults):
        raise CheckpointError(
            f"{where}: weights do not fit its config.json: {'; '.join(filter(None, faults))}; "
            "use weights and config.json of the same model"
        )


def _faults(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = len(names) - _MAX_NAMES_IN_ERROR
    shown = ", ".join(names[:_MAX_NAMES_IN_ERROR]) + (f" and {more} more" if more > 0 else "")
    return f"{len(names)} {what}: {shown}"
