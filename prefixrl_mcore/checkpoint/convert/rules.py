"""What a family table says, and how it is looked up.

A table lists, for one Hugging Face ``model_type``, which Hugging Face weights make up which
Megatron weight. A family's is ``TABLE`` in ``tables/<model_type>.py``; docs/convert.md says what
else a new one needs.
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
from prefixrl_mcore.config.model_shape import read_model_shape

Dim = Literal["hidden", "query", "key_value", "head", "ffn", "vocab", "experts", "expert_ffn"]

_LAYER = "{layer}"
_EXPERT = "{expert}"
_MAX_NAMES_IN_ERROR = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDims:
    """Sizes of one model, as far as its weights depend on them."""

    num_layers: int
    """Decoder layers."""

    num_groups: int
    """Key/value heads."""

    num_experts: int
    """Experts of each mixture-of-experts layer; 0 in a dense model."""

    is_tied: bool
    """The output head is the embedding; Hugging Face then stores no ``lm_head.weight``."""

    sizes: Mapping[Dim, int]
    """``hidden``; ``query``: query heads x head size; ``key_value``: key/value heads x head size;
    ``head``: head size; ``vocab`` without padding; ``ffn``, in a mixture of experts ``experts``
    and ``expert_ffn`` instead."""

    @classmethod
    def from_hf_config(cls, hf_config: Mapping[str, Any]) -> "ModelDims":
        """Return the sizes that a ``config.json`` states.

        Raises:
            ConfigError: as ``read_model_shape``, if it is not of a supported model.
        """
        shape = read_model_shape(hf_config)
        head = shape.kv_channels
        sizes: dict[Dim, int] = {
            "hidden": shape.hidden_size,
            "query": shape.num_attention_heads * head,
            "key_value": shape.num_query_groups * head,
            "head": head,
            "vocab": shape.vocab_size,
        }
        if shape.mixture is None:
            sizes["ffn"] = shape.ffn_hidden_size
        else:
            sizes["experts"] = shape.mixture.num_experts
            sizes["expert_ffn"] = shape.ffn_hidden_size
        return cls(
            num_layers=shape.num_layers,
            num_groups=shape.num_query_groups,
            num_experts=shape.mixture.num_experts if shape.mixture else 0,
            is_tied=shape.tie_word_embeddings,
            sizes=sizes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which of a rule's weights is meant."""

    layer: int | None = None
    """Index of the decoder layer; None for a weight outside the layers."""

    expert: int | None = None
    """Index of the expert in its layer; None for a weight that is no expert's."""

    def fill(self, name: str) -> str:
        """Return a name with the indices in it."""
        return name.replace(_LAYER, str(self.layer)).replace(_EXPERT, str(self.expert))


@dataclass(frozen=True, kw_only=True, slots=True)
class HfWeight:
    """A Hugging Face weight: its name, with places for indices, and its shape."""

    name: str
    """Name in the safetensors files; ``{layer}`` and ``{expert}`` stand for the indices."""

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
    """Names of the weight in a model: Transformer Engine's first, then those of other specs where
    they differ. A name without an index of the expert is a stack of the rank's experts."""

    hf: tuple[HfWeight, ...]
    """In the order that ``layout.hf_to_full`` takes."""

    stored: str | None = None
    """Name in a checkpoint of either spec; None is the first of ``megatron``. The experts of a
    layer are one tensor there, with a new first dimension."""

    is_output_head: bool = False
    """The head that a model with tied embeddings does not have."""

    @property
    def is_per_layer(self) -> bool:
        """The weight exists once in each decoder layer."""
        return _LAYER in self.megatron[0]

    @property
    def is_per_expert(self) -> bool:
        """The weight exists once for each expert; its parts are on expert tensor-parallel ranks."""
        return _EXPERT in self.hf[0].name

    @property
    def checkpoint_name(self) -> str:
        """The name in a checkpoint, which stacks all layers along a new first dimension."""
        return (self.stored or self.megatron[0]).replace(f"{_LAYER}.", "")

    def checkpoint_shape(self, dims: ModelDims) -> tuple[int, ...]:
        """Return the shape in a checkpoint: layers, experts, and the weight without padding."""
        layers = (dims.num_layers,) if self.is_per_layer else ()
        experts = (dims.num_experts,) if self.is_per_expert else ()
        return (*layers, *experts, *self.full_shape(dims))

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
        return [(_pattern(name), rule) for rule in self.rules for name in rule.megatron]

    def find(self, megatron_name: str, dims: ModelDims) -> tuple[Rule, Place] | None:
        """Return the rule of a Megatron weight and the indices in its name; None if unknown."""
        for pattern, rule in self._by_pattern:
            match = pattern.fullmatch(megatron_name)
            if match and not (rule.is_output_head and dims.is_tied):
                indices = {name: int(index) for name, index in match.groupdict().items()}
                return rule, Place(**indices)
        return None

    def weights(self, dims: ModelDims) -> Iterator[tuple[Rule, Place]]:
        """Yield every (rule, place) that a model has, in the order of Hugging Face's files.

        Globals before the layers, then layer by layer, then the globals after them.
        """
        per_layer = [rule for rule in self.rules if rule.is_per_layer]
        seen_layers = False
        for rule in self.rules:
            if rule.is_per_layer:
                if not seen_layers:
                    for layer in range(dims.num_layers):
                        yield from _in_layer(per_layer, layer, dims)
                seen_layers = True
            elif not (rule.is_output_head and dims.is_tied):
                yield rule, Place()

    def hf_shapes(self, dims: ModelDims) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every weight that the Hugging Face folder must hold."""
        return {
            hf_name(weight, place): weight.shape(dims)
            for rule, place in self.weights(dims)
            for weight in rule.hf
        }


def hf_name(weight: HfWeight, place: Place) -> str:
    """Return the full name of a Hugging Face weight."""
    return place.fill(weight.name)


def _pattern(name: str) -> re.Pattern[str]:
    """Return the expression that finds the indices in a Megatron name."""
    escaped = re.escape(name)
    for index in (_LAYER, _EXPERT):
        escaped = escaped.replace(re.escape(index), rf"(?P<{index[1:-1]}>\d+)")
    return re.compile(escaped)


def _in_layer(rules: list[Rule], layer: int, dims: ModelDims) -> Iterator[tuple[Rule, Place]]:
    """Yield the weights of one layer."""
    for rule in rules:
        if rule.is_per_expert:
            yield from ((rule, Place(layer=layer, expert=e)) for e in range(dims.num_experts))
        else:
            yield rule, Place(layer=layer)


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
