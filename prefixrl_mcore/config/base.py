"""The strict base class of every configuration node, and how one is read and validated.

A run is described by one TOML file. Dotted command-line flags are applied on top of it.
Nothing in this package imports torch.
"""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

_EXPECTED = {
    "tuple_type": "must be a list, [...]",
    "string_type": "must be text, in quotes",
}
"""What pydantic says in words that are not TOML's."""


class Config(BaseModel):
    """A frozen configuration node that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, got, expected, remedy."""


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file.

    Raises:
        ConfigError: if the file is missing or is not valid TOML.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"config file {path}: does not exist") from None
    except OSError as error:
        raise ConfigError(f"config file {path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        line = _line_of(text, str(error))
        raise ConfigError(f"config file {path}: not valid TOML: {error}{line}") from None


def _line_of(text: str, error: str) -> str:
    """Return the line that TOML's parser stopped in, with the fault that is most common."""
    number = re.search(r"at line (\d+)", error)
    if number is None:
        return ""
    return f": {text.splitlines()[int(number[1]) - 1].strip()!r} (text stands in quotes)"


def validate[T: Config](config_cls: type[T], values: dict[str, Any], *, where: str) -> T:
    """Return ``values`` as a ``config_cls``, or raise one readable error for all faults.

    Args:
        config_cls: the node to build.
        values: nested dictionaries as read from TOML or JSON.
        where: file name or other origin, named in the error.

    Raises:
        ConfigError: if a key is unknown (the nearest name is suggested) or a value is refused.
    """
    try:
        return config_cls.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_describe(config_cls, detail)}" for detail in error.errors()]
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(lines)) from None


def _describe(config_cls: type[Config], detail: ErrorDetails) -> str:
    """Render one pydantic error with its dotted path, the value and the nearest known key."""
    location = [str(part) for part in detail["loc"]]
    path = ".".join(location) or "(whole file)"
    if detail["type"] == "extra_forbidden":
        known = _known_keys(config_cls, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{path}: required and not given"
    message = _EXPECTED.get(detail["type"], detail["msg"].removeprefix("Value error, "))
    if not location:
        return message
    return f"{path}: {message}, got {detail['input']!r}"


def _known_keys(config_cls: type[Config], location: list[str]) -> list[str]:
    """Return the field names of the node that ``location`` points at."""
    node: type[Config] = config_cls
    for part in location:
        field = node.model_fields.get(part)
        if field is None:
            break
        candidates = [field.annotation, *get_args(field.annotation)]
        nodes = [c for c in candidates if isinstance(c, type) and issubclass(c, Config)]
        if not nodes:
            break
        node = nodes[0]
    return sorted(node.model_fields)
