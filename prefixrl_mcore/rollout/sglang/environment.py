"""SGLang's own environments: what makes one, and what lies in one."""

import os
import subprocess
from pathlib import Path

from prefixrl_mcore.rollout.engine import EngineError

ENVIRONMENT_FOLDER = Path(__file__).resolve().parent / "env"
"""The locks, and the script that installs one of them."""

_ASK_SECONDS = 60.0


def has_interpreter(python: Path) -> bool:
    """Return whether an environment's interpreter is there."""
    return os.access(python.absolute(), os.X_OK)


def find_interpreter(python: Path) -> Path:
    """Return an environment's interpreter as an absolute path.

    Not resolved: it is a link, and finds its packages by the link.

    Raises:
        EngineError: if it is missing, with the remedy.
    """
    if not has_interpreter(python):
        raise EngineError(
            f"its interpreter {python.absolute()} does not exist; run `make setup-sglang`, or set "
            "rollout.sglang.python to an environment that has SGLang"
        )
    return python.absolute()


def installed_version(python: Path, package: str) -> str | None:
    """Return the version of a package that an interpreter finds; None if it, or that, is missing.

    The interpreter is asked, as it alone knows where its packages are. The package is not imported,
    which would take a minute on a slow disk.
    """
    question = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    try:
        done = subprocess.run(
            [str(python.absolute()), "-I", "-c", question],
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def setup_command(uv: Path, base_python: Path, folder: Path) -> list[str]:
    """Return the command that makes or completes an environment; it is repeated without harm.

    Args:
        uv: the installer.
        base_python: a Python 3.12 to base the environment on.
        folder: where it is to be.
    """
    # Through bash: a wheel does not keep the script's permission to be run.
    script = ENVIRONMENT_FOLDER / "setup.sh"
    return ["bash", str(script), str(uv), str(base_python), str(folder)]
