"""The rotary position embedding that a Hugging Face ``config.json`` describes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from prefixrl_mcore.config.base import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Rotary frequencies of Llama 3: low ones divided by ``factor``, with a smooth transition."""

    factor: float
    """Divisor of low frequencies."""

    low_freq_factor: float
    """Wavelengths above ``original_max_position_embeddings`` / this are scaled in full."""

    high_freq_factor: float
    """Wavelengths below ``original_max_position_embeddings`` / this are left alone."""

    original_max_position_embeddings: int
    """Positions before the extension, tokens."""


def read_rotary(
    hf_config: Mapping[str, Any], rope_types: frozenset[str]
) -> tuple[float, Llama3Scaling | None]:
    """Return rotary base and scaling of a file that transformers 4 or 5 wrote.

    Args:
        hf_config: the parsed file.
        rope_types: kinds of rotary embedding that the model may have.

    Raises:
        ConfigError: if the base is missing, a value is none, the kind is not among those, or the
            file describes two embeddings that differ.
    """
    bases: dict[str, float] = {}
    scalings: dict[str, Llama3Scaling | None] = {}
    if hf_config.get("rope_theta") is not None:
        bases["rope_theta"] = _positive("rope_theta", hf_config["rope_theta"])
    for field in ("rope_parameters", "rope_scaling"):
        value = hf_config.get(field)
        if not value:
            continue
        scalings[field] = _rotary_scaling(field, value, rope_types)
        if value.get("rope_theta") is not None:
            bases[field] = _positive(f"{field}.rope_theta", value["rope_theta"])
    if not bases:
        raise ConfigError("config.json: rope_theta is missing (also in rope_parameters)")
    if len(set(bases.values())) > 1 or len(set(scalings.values())) > 1:
        names = sorted(bases | scalings)
        raise ConfigError(
            "config.json: its rotary embedding is described twice, differently: "
            + ", ".join(f"{name} = {hf_config[name]!r}" for name in names)
            + "; programs differ in which they follow, keep the one that is meant"
        )
    return float(next(iter(bases.values()))), next(iter(scalings.values()), None)


def _rotary_scaling(
    field: str, value: Mapping[str, Any], rope_types: frozenset[str]
) -> Llama3Scaling | None:
    """Return the scaling that one field describes; None for none."""
    names = {one.name for one in fields(Llama3Scaling)}
    kind = value.get("rope_type", value.get("type", "default"))
    given = set(value) - {"rope_type", "type", "rope_theta"}
    is_known = isinstance(kind, str) and kind in rope_types
    if not is_known or given != (names if kind == "llama3" else set()):
        raise ConfigError(
            f"config.json: {field} = {value!r} is not implemented; only rope_type "
            f"{' or '.join(map(repr, sorted(rope_types)))} is"
            + (f", 'llama3' with exactly {sorted(names)}" if kind == "llama3" else "")
            + (" with no further entries" if kind == "default" else "")
        )
    if kind == "default":
        return None
    return Llama3Scaling(**{name: _positive(f"{field}.{name}", value[name]) for name in names})


def _positive(name: str, value: Any) -> Any:  # noqa: ANN401  (JSON value)
    """Return a value that must be a positive number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {name} must be a positive number, got {value!r}")
    return value
