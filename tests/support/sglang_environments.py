"""SGLang's environments: one at each end of the supported range of versions, and the router's."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]

SGLANG_PYTHONS = {
    "sglang": _ROOT / ".venv-sglang/bin/python",
    "sglang-next": _ROOT / ".venv-sglang-next/bin/python",
    "router": _ROOT / ".venv-router/bin/python",
}
"""Interpreters by the name of the target that makes them: ``make setup-<name>``."""


def sglang_python(name: str = "sglang") -> Path:
    """Return the interpreter of an environment; skip the test where it is missing.

    With PREFIXRL_REQUIRE_SGLANG=1, as in CI, the test fails instead.
    """
    python = SGLANG_PYTHONS[name]
    if not python.exists():
        reason = f"SGLang's environment {python} is missing: make setup-{name}"
        if os.environ.get("PREFIXRL_REQUIRE_SGLANG") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return python
