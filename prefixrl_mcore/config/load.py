"""From a TOML file and command-line flags to one frozen ``RunConfig``."""

import copy
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from pydantic import ValidationError

from prefixrl_mcore.config.base import Config, ConfigError, read_toml, validate
from prefixrl_mcore.config.json_files import read_json_object


def load_config[T: Config](config_cls: type[T], path: Path, overrides: list[str]) -> T:
    """Read ``path``, then apply dotted command-line ``overrides`` on top.

    Args:
        config_cls: the tree to build, normally ``RunConfig``.
        path: TOML file, or the JSON that ``dump_json`` wrote.
        overrides: flags such as ``["--policy.optimizer.lr", "1e-5"]``.

    Raises:
        ConfigError: if the file, a key, a value or a cross-field rule is wrong.
        SystemExit: by tyro, with code 2, for a malformed flag.
    """
    from_file = validate(config_cls, read_config_file(path), where=str(path))
    if not overrides:
        return from_file
    try:
        return tyro.cli(
            config_cls,
            default=from_file,
            args=overrides,
            prog="prefixrl",
            config=(tyro.conf.AvoidSubcommands,),
        )
    except ValidationError as error:
        problems = [str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors()]
        raise ConfigError("flags: " + "; ".join(problems)) from None


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
