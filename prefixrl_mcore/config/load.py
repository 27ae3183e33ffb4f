"""From a TOML file and command-line flags to one frozen ``RunConfig``."""

from pathlib import Path

import tyro
from pydantic import ValidationError

from prefixrl_mcore.config.base import Config, ConfigError, read_toml, validate


def load_config[T: Config](config_cls: type[T], path: Path, overrides: list[str]) -> T:
    """Read ``path`` (TOML), then apply dotted command-line ``overrides`` on top.

    Args:
        config_cls: the tree to build, normally ``RunConfig``.
        path: TOML file.
        overrides: flags such as ``["--policy.optimizer.lr", "1e-5"]``.

    Raises:
        ConfigError: if the file, a key, a value or a cross-field rule is wrong.
        SystemExit: by tyro, with code 2, for a malformed flag.
    """
    from_file = validate(config_cls, read_toml(path), where=str(path))
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


def dump_json(config: Config) -> str:
    """Return the resolved config as indented JSON that ``validate`` reads back equal."""
    return config.model_dump_json(indent=2)
