"""The JSON of a run: what it holds, how it is written, and what is refused when it is read.

Times are only ever those of a CUDA device: a record of any other kind cannot be made.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.cases import Case, Rows
from bench.environment import Environment, slug
from bench.implementation import Family, Pass
from bench.measure import Telemetry
from bench.reference import Errors

SCHEMA_VERSION = 1

OK = "ok"
OUT_OF_MEMORY = "OOM"
NOT_INSTALLED = "not installed"
FAILED = "failed"

Status = Literal["ok", "OOM", "not installed", "failed"]
_STATUSES = (OK, OUT_OF_MEMORY, NOT_INSTALLED, FAILED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One implementation, given one set of rows, in one pass."""

    implementation: str
    """Name of the implementation."""

    family: Family
    """Ceiling, ours or peer."""

    rows: Rows
    """Packed active rows, or the whole batch."""

    pass_: Pass
    """Without gradients, or a training step."""

    version: str | None
    """Version of its distribution; None for our own and for what is not installed."""

    status: Status
    """Only ``ok`` has samples."""

    detail: str = ""
    """What the failure said."""

    samples_ms: tuple[float, ...] = ()
    """Every timed call, in order."""

    num_warmups: int = 0
    """Untimed calls before the first sample, without the first call of all."""

    num_device_allocations: int = 0
    """Allocations from the driver during all samples; 0 in a clean measurement."""

    first_call_seconds: float | None = None
    """Wall time of the first call: compilation, tuning and one execution."""

    peak_bytes: int | None = None
    """Most memory allocated in a call beyond what was there before it."""

    gradient_bytes: int | None = None
    """Gradients among it that the call returned."""

    errors: Errors = field(default_factory=Errors)
    """Distance from the truth."""

    exceeded_bounds: tuple[str, ...] = ()
    """Names of the errors that are too large to be rounding."""

    def __post_init__(self) -> None:
        """Refuse a state that no run can be in."""
        name = f"{self.implementation}, {self.rows} rows, {self.pass_}"
        if self.status not in _STATUSES:
            raise ValueError(f"{name}: status must be one of {_STATUSES}, got {self.status!r}")
        if (self.status == OK) != bool(self.samples_ms):
            raise ValueError(f"{name}: {self.status} with {len(self.samples_ms)} samples")
        if any(not sample > 0.0 for sample in self.samples_ms):
            raise ValueError(f"{name}: samples must be positive milliseconds")

    @property
    def peak_extra_bytes(self) -> int | None:
        """Peak memory without inputs and gradients.

        The gradients are subtracted whole. Where the peak comes before they are allocated, the
        value is too small by at most their size, and never below zero.
        """
        if self.peak_bytes is None or self.family == "ceiling":
            return None
        return max(0, self.peak_bytes - (self.gradient_bytes or 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class CellRecord:
    """All implementations on one case, measured in turns."""

    case: Case
    """Sizes and mask."""

    measurements: tuple[Measurement, ...]
    """One per implementation, set of rows and pass."""

    telemetry: tuple[Telemetry, ...]
    """One reading after every round of samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """One run of the benchmark in one process."""

    op: str
    """What was measured: ``head``."""

    started: str
    """UTC, as 2026-01-31T235959Z."""

    command: tuple[str, ...]
    """Arguments of the command line."""

    environment: Environment
    """Where."""

    settings: dict[str, float]
    """Numbers of the protocol: repetitions, warm-ups, budget, seed."""

    cells: tuple[CellRecord, ...]
    """One per case that was finished."""

    not_reached: tuple[str, ...] = ()
    """Names of the cases that the time limit left out."""

    def __post_init__(self) -> None:
        """Refuse times from anything but a CUDA device."""
        if self.environment.device_kind != "cuda":
            raise ValueError(
                f"a record holds times of a CUDA device, got {self.environment.device_kind!r}; "
                "on a CPU only correctness is checked"
            )

    @property
    def file_name(self) -> str:
        """``<op>_<device>_<date>.json``."""
        return f"{self.op}_{slug(self.environment.device)}_{self.started}.json"


def write_record(record: RunRecord, folder: Path) -> Path:
    """Write a run's JSON, wholly or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    value = {"schema_version": SCHEMA_VERSION, **asdict(record)}
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
    return path


def read_record(path: Path) -> RunRecord:
    """Read a run's JSON.

    Raises:
        ValueError: if the file is not such a record, with the file and what is wrong with it.
    """
    try:
        value = json.loads(path.read_text())
        version = value.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema version {version}, expected {SCHEMA_VERSION}")
        return _run(value)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a benchmark record: {error}") from error


def read_records(folder: Path) -> list[RunRecord]:
    """Return all runs of the head in a folder, oldest first (``bench.policy`` writes there too)."""
    records = [read_record(path) for path in sorted(folder.glob("head_*.json"))]
    return sorted(records, key=lambda record: record.started)


def _run(value: dict[str, Any]) -> RunRecord:
    """Build a run from JSON; unknown and missing keys are refused by the constructors."""
    return RunRecord(
        **{
            **value,
            "environment": Environment(**value["environment"]),
            "command": tuple(value["command"]),
            "not_reached": tuple(value["not_reached"]),
            "cells": tuple(_cell(cell) for cell in value["cells"]),
        }
    )


def _cell(value: dict[str, Any]) -> CellRecord:
    """Build a cell from JSON."""
    return CellRecord(
        case=Case(**value["case"]),
        measurements=tuple(_measurement(item) for item in value["measurements"]),
        telemetry=tuple(Telemetry(**item) for item in value["telemetry"]),
    )


def _measurement(value: dict[str, Any]) -> Measurement:
    """Build a measurement from JSON."""
    return Measurement(
        **{
            **value,
            "samples_ms": tuple(value["samples_ms"]),
            "errors": Errors(**value["errors"]),
            "exceeded_bounds": tuple(value["exceeded_bounds"]),
        }
    )
