"""``python -m tests.support.settings_page --write docs/settings.md``: the page of all settings."""

import argparse
import inspect
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from prefixrl_mcore.config.base import Config
from prefixrl_mcore.config.continuation import MAY_CHANGE
from prefixrl_mcore.config.run import RunConfig

_HEAD = """\
# Settings

Every setting of a run, with the default that holds where a config does not say otherwise. In a
config, `policy.optimizer.lr` is `lr` in the section `[policy.optimizer]`; on the command line it is
`--policy.optimizer.lr 1e-5`, with dashes for underscores, or, for `prefixrl launch`,
`policy.optimizer.lr=1e-5`. An unknown key, or a value out of range, is an error.

*Resume* says whether a run that goes on may change the setting: `free` settings say how long, where
and with how much memory (`trainer.num_steps` is one under a constant learning rate only), the
others what is computed ([checkpoints](checkpoints.md)). `prefixrl check CONFIG --help-settings`
shows the values of a config.

Made by `python -m tests.support.settings_page --write docs/settings.md`; a test compares the two.
"""
_PLAIN = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path"}
_BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


def page() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *_section(RunConfig, "")])


def sections_of(field: FieldInfo) -> list[type[Config]]:
    """Return the section that a field holds, in a list; an empty one for a setting."""
    candidates = (field.annotation, *get_args(field.annotation))
    return [c for c in candidates if isinstance(c, type) and issubclass(c, Config)]


def _section(config_cls: type[Config], path: str) -> Iterator[str]:
    """Yield the lines of a section, its own settings first."""
    yield f"## {path.removesuffix('.') or 'The run'}\n"
    yield f"{_prose(inspect.getdoc(config_cls) or '')}\n"
    fields = config_cls.model_fields
    settings = {name: field for name, field in fields.items() if not sections_of(field)}
    if settings:
        yield "| setting | default | values | resume | meaning |\n|---|---|---|---|---|"
        for name, field in settings.items():
            resume = "free" if f"{path}{name}".startswith(MAY_CHANGE) else ""
            cells = (f"`{name}`", _default(field), _values(field), resume, _meaning(field))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        yield ""
    for name, field in fields.items():
        for section in sections_of(field):
            if type(None) in get_args(field.annotation):
                yield f"`{path}{name}`: left out by default. {_meaning(field)}\n"
            yield from _section(section, f"{path}{name}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    if value is None:
        return "none"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _values(field: FieldInfo) -> str:
    """Return what a value can be: type or choices, and bounds."""
    return f"{_kind(field.annotation)} {' and '.join(_bounds(field.metadata))}".strip()


def _bounds(metadata: list[object]) -> Iterator[str]:
    for bound in metadata:
        if type(bound) in _BOUNDS:
            sign, name = _BOUNDS[type(bound)]
            yield f"{sign} {getattr(bound, name):g}"


def _kind(annotation: object) -> str:
    """Return the type in words; None is among a setting's values where its default is none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return _kind(next(kind for kind in arguments if kind is not type(None)))
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is tuple:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"table, name = {_kind(arguments[1])}"
    return _PLAIN[annotation]  # type: ignore[index]  # a KeyError names a type without words


def _meaning(field: FieldInfo) -> str:
    return _prose(field.description or "")


def _prose(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="file that is written")
    target: Path | None = parser.parse_args().write
    if target is None:
        sys.stdout.write(page())
    else:
        target.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
