"""SGLang's own environments: what makes one, and what lies in one."""

import subprocess
from pathlib import Path

ENVIRONMENT_FOLDER = Path(__file__).resolve().parent / "env"
"""The locks, and the script that installs one of them."""

_ASK_SECONDS = 60.0


def installed_version(python: Path) -> str | None:
    """Return the version of SGLang that an interpreter finds; None if it, or SGLang, is missing.

    SGLang is not imported, which would take a minute on a slow disk.
    """
    question = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
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
