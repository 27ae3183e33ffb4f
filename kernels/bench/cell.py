"""One case: everybody is admitted once, then all take turns.

Admission is the first call (compilation and tuning, timed by the wall), the comparison with the
truth, the peak of memory, and one timed call from which the number of repetitions follows. After
it come warm-up rounds and timed rounds in the order A B C A B C, so that clocks and temperature
drift over all alike.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from bench import records
from bench.cases import Case, Inputs, build_inputs, select_rows
from bench.environment import installed_version
from bench.implementation import (
    Implementation,
    NotInstalledError,
    Outputs,
    Pass,
    Runner,
    errors_of,
)
from bench.measure import Device, Sample, Telemetry, affordable, has_turn, is_out_of_memory
from bench.records import CellRecord, Measurement
from bench.reference import Errors, Truth, compute_truth

_WARMUP_SHARE = 0.25
"""Part of an entrant's budget that its warm-up may cost besides."""

_DETAIL_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Numbers of the protocol."""

    repetitions: int = 30
    """Timed calls, where the budget pays for them."""

    min_repetitions: int = 3
    """Timed calls that even the slowest entrant gets."""

    warmups: int = 5
    """Untimed calls after the first, where the budget pays for them; at least one."""

    budget_seconds: float = 3.0
    """Time that all samples of one entrant may take together."""

    seed: int = 0
    """Of the data."""


class Listener(Protocol):
    """Who is told how far a case is."""

    def step(self, text: str) -> None:
        """Say what begins now."""
        ...


class Entrant:
    """One implementation on one set of rows in one pass, from its first call to its record."""

    def __init__(self, implementation: Implementation, inputs: Inputs, pass_: Pass) -> None:
        """Describe it; nothing runs yet."""
        self.implementation = implementation
        self.inputs = inputs
        self.pass_: Pass = pass_
        self.status: records.Status = "ok"
        self.num_repetitions = 0
        self.num_warmups = 0
        self._runner: Runner | None = None
        self._detail = ""
        self._samples: list[float] = []
        self._num_device_allocations = 0
        self._first_call_seconds: float | None = None
        self._peak_bytes: int | None = None
        self._gradient_bytes: int | None = None
        self._errors = Errors()
        self._exceeded: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """One line that identifies it within a case."""
        return f"{self.implementation.name}, {self.inputs.rows} rows, {self.pass_}"

    def admit(self, device: Device, truth: Truth, settings: Settings) -> None:
        """Call it for the first times, and decide how often it will be called."""
        self._runner = self.implementation.prepare(self.inputs)
        with _acquired(self._runner) as runner:
            self._first_call_seconds, outputs = device.wall_seconds(self._call)
            self._compare(runner, outputs, truth)
            del outputs
        with _acquired(self._runner):
            self._peak_bytes, outputs = device.peak_bytes(self._call)
            if isinstance(outputs, Outputs):
                self._gradient_bytes = outputs.allocated_bytes
            del outputs
        estimate_ms = self._sample(device).milliseconds
        budget = settings.budget_seconds
        self.num_repetitions = affordable(
            estimate_ms, budget, at_least=settings.min_repetitions, at_most=settings.repetitions
        )
        self.num_warmups = affordable(
            estimate_ms, _WARMUP_SHARE * budget, at_least=1, at_most=settings.warmups
        )

    def warm_up(self, device: Device) -> None:
        """Call it once, untimed."""
        self._sample(device)

    def take_turn(self, device: Device) -> None:
        """Call it once, timed."""
        sample = self._sample(device)
        self._samples.append(sample.milliseconds)
        self._num_device_allocations += sample.num_device_allocations

    def fail(self, status: records.Status, error: BaseException) -> None:
        """Record a failure and forget everything that may hold memory."""
        self.status = status
        lines = str(error).strip().splitlines() or [""]
        self._detail = f"{type(error).__name__}: {lines[0]}"[:_DETAIL_CHARACTERS]
        self._runner = None

    def record(self) -> Measurement:
        """Return what was measured."""
        is_ok = self.status == "ok"
        package = self.implementation.package
        return Measurement(
            implementation=self.implementation.name,
            family=self.implementation.family,
            rows=self.inputs.rows,
            pass_=self.pass_,
            version=None if package is None else installed_version(package),
            status=self.status,
            detail=self._detail,
            samples_ms=tuple(self._samples) if is_ok else (),
            num_warmups=self.num_warmups,
            num_device_allocations=self._num_device_allocations,
            first_call_seconds=self._first_call_seconds,
            peak_bytes=self._peak_bytes if is_ok else None,
            gradient_bytes=self._gradient_bytes if is_ok else None,
            errors=self._errors,
            exceeded_bounds=self._exceeded,
        )

    def _call(self) -> object:
        """Run the pass that is measured."""
        assert self._runner is not None, f"{self.name}: not admitted"
        return getattr(self._runner, self.pass_)()

    def _sample(self, device: Device) -> Sample:
        """Time one call."""
        assert self._runner is not None, f"{self.name}: not admitted"
        with _acquired(self._runner):
            return device.sample(self._call)

    def _compare(self, runner: Runner, outputs: object, truth: Truth) -> None:
        """Compare with the truth, once per implementation and set of rows."""
        if self.implementation.family == "ceiling":
            return
        if isinstance(outputs, Outputs):
            self._errors = errors_of(runner, outputs, truth)
        elif self.implementation.passes == ("forward",):
            self._errors = errors_of(runner, None, truth)
        bounds = self.implementation.bounds(truth.max_abs_logit)
        self._exceeded = tuple(self._errors.exceeded(bounds))


@contextmanager
def _acquired(runner: Runner) -> Iterator[Runner]:
    """Make what exists before a step, and drop it with what the step made."""
    runner.acquire()
    try:
        yield runner
    finally:
        runner.release()


def measure_case(
    case: Case,
    implementations: Sequence[Implementation],
    device: Device,
    settings: Settings,
    listener: Listener,
) -> CellRecord:
    """Measure every implementation on one case.

    A peer that is missing, lacks memory or raises is recorded as such, and the others go on.

    Raises:
        RuntimeError: if one of them leaves the device in a state in which nothing runs any more.
    """
    torch.compiler.reset()  # sizes are compiled one by one: the limit on recompilations is per case
    listener.step("data and float64 reference")
    inputs = build_inputs(case, device.torch_device, settings.seed)
    truths = _truths(inputs, implementations, device)
    entrants = [
        Entrant(implementation, rows_inputs, pass_)
        for rows_inputs in (select_rows(inputs, rows) for rows in case.row_sets)
        for implementation in implementations
        for pass_ in implementation.passes
    ]
    for entrant in entrants:
        listener.step(f"first calls of {entrant.name}")
        truth = truths[entrant.implementation.entropy_coefficient]
        _attempt(entrant, partial(entrant.admit, device, truth, settings), device)
    telemetry = _take_turns(entrants, device, settings, listener)
    return CellRecord(
        case=case,
        measurements=tuple(entrant.record() for entrant in entrants),
        telemetry=tuple(telemetry),
    )


def _truths(
    inputs: Inputs, implementations: Iterable[Implementation], device: Device
) -> dict[float, Truth]:
    """Return the truth for every loss that is computed, and free what it took."""
    coefficients = sorted({item.entropy_coefficient for item in implementations})
    truths = {
        coefficient: compute_truth(inputs, entropy_coefficient=coefficient)
        for coefficient in coefficients
    }
    device.recover()
    return truths


def _take_turns(
    entrants: Sequence[Entrant], device: Device, settings: Settings, listener: Listener
) -> list[Telemetry]:
    """Run the warm-up and the timed rounds; return one reading of the device per timed round."""
    telemetry: list[Telemetry] = []
    gc.collect()
    gc.disable()
    try:
        for index in range(settings.warmups):
            listener.step(f"warm-up round {index + 1} of {settings.warmups}")
            for entrant in entrants:
                if has_turn(index, settings.warmups, entrant.num_warmups):
                    _attempt(entrant, partial(entrant.warm_up, device), device)
        for index in range(settings.repetitions):
            listener.step(f"timed round {index + 1} of {settings.repetitions}")
            for entrant in entrants:
                if has_turn(index, settings.repetitions, entrant.num_repetitions):
                    _attempt(entrant, partial(entrant.take_turn, device), device)
            telemetry.append(device.telemetry())
    finally:
        gc.enable()
    return telemetry


def _attempt(entrant: Entrant, step: Callable[[], None], device: Device) -> None:
    """Run a step of an entrant that is still in; a failure is its own."""
    if entrant.status != "ok":
        return
    try:
        step()
    except NotInstalledError as error:
        entrant.fail("not installed", error)
    except Exception as error:  # other people's code raises anything; what it raised is recorded
        entrant.fail("OOM" if is_out_of_memory(error) else "failed", error)
    if entrant.status == "ok":
        return
    gc.collect()
    try:
        device.recover()
    except RuntimeError as error:
        raise RuntimeError(
            f"{entrant.name} left the device unusable ({error}); leave it out: --peers, --ours"
        ) from error
