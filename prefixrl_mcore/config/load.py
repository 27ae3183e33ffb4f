"""From a TOML file and command-line flags to one frozen ``RunConfig``."""

import contextlib
import copy
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from pydantic import ValidationError

from prefixrl_mcore.config.base import Config, ConfigError, read_toml, validate
from prefixrl_mcore.config.json_files import read_json_object


def load_config[T: Config](
    config_cls: type[T], path: Path, overrides: list[str], *, prog: str = "prefixrl"
) -> T:
    """Read ``path``, then apply dotted command-line ``overrides`` on top.

    Args:
        config_cls: the tree to build, normally ``RunConfig``.
        path: TOML file, or the JSON that ``dump_json`` wrote.
        overrides: flags such as ``["--policy.optimizer.lr", "1e-5"]``.
        prog: how the program was called, for messages about flags.

    Raises:
        ConfigError: if the file, a key, a value or a cross-field rule is wrong.
        SystemExit: by tyro, with code 2, for a malformed flag.
    """
    from_file = validate(config_cls, read_config_file(path), where=str(path))
    if not overrides:
        return from_file
    try:
        return _parse_flags(config_cls, from_file, overrides, prog)
    except ValidationError as error:
        problems = [str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors()]
        raise ConfigError("flags: " + "; ".join(problems)) from None


def print_settings(config_cls: type[Config], path: Path | None, *, prog: str) -> None:
    """Print every setting as a flag, with its meaning and its value in ``path``.

    Args:
        config_cls: the tree.
        path: a config; None prints the program's defaults.
        prog: how the program was called.

    Raises:
        ConfigError: if the config is wrong.
    """
    known = tyro.MISSING_NONPROP
    if path is not None:
        known = validate(config_cls, read_config_file(path), where=str(path))
    with contextlib.suppress(SystemExit):  # tyro's way to end a help
        _parse_flags(config_cls, known, ["--help"], prog)


def _parse_flags[T: Config](config_cls: type[T], default: T, flags: Sequence[str], prog: str) -> T:
    """Return ``default`` with flags on top."""
    return tyro.cli(
        config_cls,
        default=default,
        args=flags,
        prog=prog,
        config=(tyro.conf.AvoidSubcommands,),
    )


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the content of a config file, TOML or what ``dump_json`` wrote.

    Raises:
        ConfigError: if it is missing or is neither.
    """
    if path.suffix == ".json":
        return read_json_object(path, remedy="give a config, TOML or a run folder's config.json")
    return read_toml(path)


def with_settings(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return a config file's content with ``dotted.key=value`` on top.

    Args:
        values: as read; not changed.
        settings: values are written as in TOML; what is not TOML is a string.

    Raises:
        ConfigError: if one has no ``=``, or goes through something that is no section.
    """
    changed = copy.deepcopy(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if key.startswith("-"):
            raise ConfigError(
                f"{setting!r}: no such option; settings have no dashes in front and are written as "
                "key=value, such as trainer.num_steps=100"
            )
        if not equals or not key:
            raise ConfigError(f"{setting!r}: expected key=value, such as trainer.num_steps=100")
        *sections, name = key.split(".")
        node = changed
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{setting!r}: {section} is no section of the config")
        node[name] = _toml_value(text)
    return changed


def _toml_value(text: str) -> object:
    """Return a value written as in TOML; a string without quotes is one too."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def dump_json(config: Config) -> str:
    """Return the resolved config as indented JSON that ``validate`` reads back equal."""
    return config.model_dump_json(indent=2)
