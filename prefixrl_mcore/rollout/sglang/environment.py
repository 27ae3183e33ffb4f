"""SGLang's own environments: what makes one, and what lies in one."""

from pathlib import Path

ENVIRONMENT_FOLDER = Path(__file__).resolve().parent / "env"
"""The locks, and the script that installs one of them."""
