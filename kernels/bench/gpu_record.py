"""The JSON file that ``bench.policy`` and ``bench.rollout`` leave of a run on a GPU."""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.environment import describe, slug

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_SCHEMA_VERSION = 1


def write_record(
    op: str, case: "DataclassInstance", measured: dict[str, Any], options: argparse.Namespace
) -> Path:
    """Write what was measured on this machine's GPU, and return the file's path.

    Args:
        op: what was measured; begins the name of the file.
        case: the sizes.
        measured: the record's own part, as JSON.
        options: ``commit``, ``seed`` and ``output`` of the command line.
    """
    environment = describe(torch.device("cuda"), options.commit)
    started = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")
    value = {
        "schema_version": _SCHEMA_VERSION,
        "op": op,
        "started": started,
        "case": asdict(case),
        "seed": options.seed,
        "environment": asdict(environment),
        **measured,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{op}_{slug(environment.device)}_{started}.json"
    path.write_text(json.dumps(value, indent=1) + "\n")
    return path
