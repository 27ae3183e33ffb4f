"""Finding a site profile by name or path."""

import os
from pathlib import Path

from prefixrl_mcore.config.base import ConfigError, read_toml, validate
from prefixrl_mcore.config.site import SiteConfig

_PACKAGE = Path(__file__).resolve().parents[2]
_INSTALLED = Path(__file__).resolve().parent / "sites"
_CHECKOUT = _PACKAGE.parent / "slurm" / "sites"


def load_site(name: str) -> SiteConfig:
    """Read a site profile.

    Args:
        name: path of a TOML file, or the name of a profile: of the folder ``PREFIXRL_SITES``, or
            one that the trainer comes with.

    Raises:
        ConfigError: if there is none, or it has a fault.
    """
    file = find_site(name)
    return validate(SiteConfig, read_toml(file), where=str(file))


def find_site(name: str) -> Path:
    """Return the file of a site profile.

    Raises:
        ConfigError: if there is none; names those that there are.
    """
    if name.endswith(".toml") or "/" in name:
        if not Path(name).is_file():
            raise ConfigError(f"--site {name}: there is no such file in {Path.cwd()}")
        return Path(name)
    folders = _folders()
    for folder in folders:
        if (folder / f"{name}.toml").exists():
            return folder / f"{name}.toml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.toml")})
    raise ConfigError(
        f"--site {name}: there is no such profile; known are {', '.join(known) or 'none'}. Give "
        "the path of a .toml file, or put it into the folder that PREFIXRL_SITES names"
    )


def _folders() -> list[Path]:
    """Return where profiles are, the user's own first; a wheel brings a copy of the checkout's."""
    own = os.environ.get("PREFIXRL_SITES")
    return [*([Path(own)] if own else []), _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT]
