"""What W&B has written of a run that is offline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def offline_runs(run: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return W&B's id and the logged rows of each start of a run, in the order of the starts."""
    # The folders are named after the second, and numbered where two starts share one.
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    return [(file.stem.removeprefix("run-"), _rows(file.parent)) for file in files]


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one start."""
    said = subprocess.run(
        [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", folder],
        capture_output=True,
        text=True,
        check=True,
    )
    records = [json.loads(line) for line in said.stdout.splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]
