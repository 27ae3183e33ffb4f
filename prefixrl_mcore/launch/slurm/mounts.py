"""What the tasks of a run need of the file system: is it in their container, is it there."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from prefixrl_mcore.config.base import Config, ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.config.site import ContainerConfig, SiteConfig
from prefixrl_mcore.launch.slurm.srun import interpreter

logger = logging.getLogger(__name__)

_SGLANG_PYTHON = "rollout.sglang.python"

_WRITTEN = {"job_folder", "run_folder"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mount:
    """One entry of ``container.mounts``."""

    host: Path
    """Folder of the nodes."""

    container: Path
    """Where tasks see it."""

    flags: tuple[str, ...] = ()
    """Of Enroot, such as ``ro``; ``ro+rprivate`` are two."""

    @classmethod
    def parse(cls, text: str) -> "Mount":
        """Return ``host:container[:flags]``, which the site profile has checked, as a record."""
        host, container, *flags = text.split(":")
        return cls(
            host=Path(host), container=Path(container), flags=tuple("+".join(flags).split("+"))
        )


def needed_paths(
    config: RunConfig, site: SiteConfig, working_directory: Path, *, has_servers: bool
) -> dict[str, Path]:
    """Return the absolute paths that tasks read and write, by the setting that names them.

    Args:
        config: the run.
        site: where.
        working_directory: what relative paths are relative to.
        has_servers: all nodes may start SGLang; its interpreter is needed then, unless it is the
            image's own.
    """
    paths = {"the working directory": working_directory, "job_folder": site.job_folder}
    paths.update((name, path) for name, path in _paths_of(config) if name != _SGLANG_PYTHON)
    python = working_directory / config.rollout.sglang.python
    is_ours = site.container is None or _mount_of(python, _mounts(site.container)) is not None
    if has_servers and config.rollout.starts_servers and is_ours:
        paths[_SGLANG_PYTHON] = python
    return {name: working_directory / path for name, path in paths.items()}


def warn_of_interpreters(site: SiteConfig, needed: Mapping[str, Path]) -> None:
    """Say which interpreter is not here, or a link to what nodes may not see.

    An environment has no interpreter of its own.

    Args:
        site: where.
        needed: absolute paths by setting.
    """
    interpreters = {"python of the site": Path(interpreter(site))}
    if _SGLANG_PYTHON in needed:
        interpreters[_SGLANG_PYTHON] = needed[_SGLANG_PYTHON]
    mounts, home = _mounts(site.container), Path.home().resolve()
    for name, path in interpreters.items():
        target = path.resolve()
        if site.container is not None and not _mount_of(path, mounts):
            continue  # the image's own
        if not path.is_symlink() and not path.exists():
            logger.warning("%s %s is not here; nodes must have it", name, path)
        elif site.container is not None and not _mount_of(target, mounts):
            logger.warning(
                "%s %s is a link to %s, which is not mounted: the image must have it",
                *(name, path, target),
            )
        elif _is_only_target_in(home, path, target) and site.container is None:
            logger.warning(
                "%s %s is a link to %s: nodes must have it, so your home folder must be shared",
                *(name, path, target),
            )


def check_mounts(site: SiteConfig, needed: Mapping[str, Path]) -> None:
    """Refuse a run whose tasks would not see, or lose, what the config names.

    Args:
        site: where; without a container tasks see what the nodes see.
        needed: absolute paths by setting.

    Raises:
        ConfigError: with a line for each path that is not mounted under its own name, and the
            mounts to add.
    """
    if site.container is None:
        return
    mounts = _mounts(site.container)
    for mount in mounts:
        if not mount.host.exists():
            logger.warning(
                "container.mounts: %s is not on this machine; nodes must have it", mount.host
            )
    faults, missing = [], []
    for name, path in needed.items():
        fault, wanted = _fault_of(name, path, mounts)
        faults += [f"  {name} {path}: {fault}"] if fault else []
        missing += [wanted] if wanted else []
    if not faults:
        return
    remedy = ""
    if missing:
        lines = ", ".join(f'"{path}:{path}"' for path in _outermost(missing))
        remedy = f"\nAdd to container.mounts of the site, or any folder above: {lines}"
    raise ConfigError("tasks in the container would not see:\n" + "\n".join(faults) + remedy)


def paths_on_nodes(needed: Mapping[str, Path]) -> dict[str, str]:
    """Return what every node must have: each path as far as it is here now.

    What an earlier stage or the run itself makes is there later; the folder that it goes into is
    there from the beginning.
    """
    found = {}
    for name, path in needed.items():
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if existing != Path("/"):
            found[name] = str(existing)
    return found


def _is_only_target_in(folder: Path, path: Path, target: Path) -> bool:
    """Return whether a link outside of a folder leads into it."""
    return target.is_relative_to(folder) and not path.is_relative_to(folder)


def _mounts(container: ContainerConfig | None) -> list[Mount]:
    """Return the mounts of a container; none without one."""
    return [] if container is None else [Mount.parse(text) for text in container.mounts]


def _paths_of(config: Config, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Return every path of a config by its dotted name."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Config):
            yield from _paths_of(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield from (
                (f"{prefix}{name}.{key}", entry)
                for key, entry in value.items()
                if isinstance(entry, Path)
            )
        elif isinstance(value, Path):
            yield f"{prefix}{name}", value


def _fault_of(name: str, path: Path, mounts: Iterable[Mount]) -> tuple[str, Path | None]:
    """Return what is wrong with a path, and the folder to mount; empty and None if nothing is."""
    mount = _mount_of(path, mounts)
    if mount is None:
        return "not mounted", path if path.is_dir() or not path.suffix else path.parent
    if mount.host != mount.container:
        return f"{mount.host} is mounted there; mount folders under their own path", None
    if name in _WRITTEN and "ro" in mount.flags:
        return f"{mount.container} is mounted read-only", None
    # A link within what is mounted leads to its target by name.
    inside, target = mount.host.resolve() / path.relative_to(mount.host), path.resolve()
    is_outside = target != inside and _mount_of(target, mounts) is None
    if is_outside and name != _SGLANG_PYTHON:  # which may be a link to the image's Python
        return f"a link to {target}, which is not mounted", target
    return "", None


def _mount_of(path: Path, mounts: Iterable[Mount]) -> Mount | None:
    """Return the mount that a path of the container lies in: the innermost."""
    above = [mount for mount in mounts if path.is_relative_to(mount.container)]
    return max(above, key=lambda mount: len(mount.container.parts), default=None)


def _outermost(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that lie in no other."""
    unique = sorted(set(folders))
    return [a for a in unique if not any(a != b and a.is_relative_to(b) for b in unique)]
