"""Which weights an engine keeps fused into one: query, key and value; gate and up."""

import re
from dataclasses import dataclass

_PART = re.compile(r"^(?P<module>.*)\.(?P<part>q|k|v|gate|up)_proj\.(?P<kind>weight|bias)$")
_FUSED = {
    "q": "qkv_proj",
    "k": "qkv_proj",
    "v": "qkv_proj",
    "gate": "gate_up_proj",
    "up": "gate_up_proj",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedPart:
    """A weight that is part of a fused one."""

    part: str
    """``q``, ``k``, ``v``, ``gate`` or ``up``."""

    fused: str
    """Name of the fused module; what its parts, and only they, have in common."""

    kind: str
    """``weight`` or ``bias``."""


def fused_part(name: str) -> FusedPart | None:
    """Return which part of what a Hugging Face weight is; None if it is kept as it comes."""
    match = _PART.match(name)
    if match is None:
        return None
    part = match["part"]
    return FusedPart(part=part, fused=f"{match['module']}.{_FUSED[part]}", kind=match["kind"])


def fused_name(name: str) -> str:
    """Return a name that the parts of one fused weight, and only they, have in common."""
    part = fused_part(name)
    return name if part is None else part.fused
