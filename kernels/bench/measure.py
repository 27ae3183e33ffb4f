"""Time, memory and clocks of one call, and the arithmetic on samples.

A sample is the time between two CUDA events around one call, taken after a buffer larger than the
L2 cache has been overwritten.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from bench.environment import as_number, query_device

Result = TypeVar("Result")

_FLUSH_BYTES = 128 * 1024**2

OUT_OF_MEMORY_TEXTS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What libraries that do not raise PyTorch's own error say."""


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Return a quantile of at least one sample, linear between neighbours."""
    if not samples or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"percentile: got {len(samples)} samples and fraction {fraction}")
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def affordable(estimate_ms: float, budget_seconds: float, *, at_least: int, at_most: int) -> int:
    """Return how many calls of a given length a budget pays for, within bounds."""
    if estimate_ms <= 0.0:
        return at_most
    return max(at_least, min(at_most, int(1e3 * budget_seconds / estimate_ms)))


def has_turn(round_index: int, num_rounds: int, num_calls: int) -> bool:
    """Return whether something called ``num_calls`` times in ``num_rounds`` is called in this one.

    The turns are spread evenly, so that a slow contestant with few of them sees the same warm and
    cool stretches of the run as the others.
    """
    return (round_index + 1) * num_calls // num_rounds > round_index * num_calls // num_rounds


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a failure, or what caused it, is a lack of device memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError):
            return True
        if any(text in str(cause) for text in OUT_OF_MEMORY_TEXTS):
            return True
        cause = cause.__cause__
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One timed call."""

    milliseconds: float
    """Between the events."""

    num_device_allocations: int
    """Allocations that went to the driver during the call; each costs time of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Telemetry:
    """What the device says of itself; None where it cannot be read."""

    sm_clock_mhz: float | None
    """Clock of the multiprocessors."""

    power_watts: float | None
    """Power draw."""

    temperature_celsius: float | None
    """Temperature."""


class Device(Protocol):
    """What the loop needs of a device; tests have one without a GPU."""

    @property
    def torch_device(self) -> torch.device:
        """Where tensors live."""
        ...

    def wall_seconds(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """Run a call to its end and return its wall time and result."""
        ...

    def peak_bytes(self, call: Callable[[], Result]) -> tuple[int, Result]:
        """Run a call and return the most memory that it allocated beyond what was there."""
        ...

    def sample(self, call: Callable[[], object]) -> Sample:
        """Time one call."""
        ...

    def telemetry(self) -> Telemetry:
        """Read clocks, power and temperature."""
        ...

    def recover(self) -> None:
        """Give cached memory back.

        Raises:
            RuntimeError: if the device cannot be used any more.
        """
        ...


class CudaDevice:
    """The current CUDA device."""

    def __init__(self) -> None:
        """Allocate what is overwritten between samples."""
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._flushed = torch.ones(_FLUSH_BYTES // 4, device=self._device)

    @property
    def torch_device(self) -> torch.device:
        """Where tensors live."""
        return self._device

    def wall_seconds(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """Run a call to its end and return its wall time and result."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        torch.cuda.synchronize()
        return time.perf_counter() - start, result

    def peak_bytes(self, call: Callable[[], Result]) -> tuple[int, Result]:
        """Run a call and return the most memory that it allocated beyond what was there."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result

    def sample(self, call: Callable[[], object]) -> Sample:
        """Time one call with events, the L2 cache flushed."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self._flushed.mul_(-1.0)
        allocations = _num_device_allocations()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result  # its memory is free before the next sample, and not while this one is timed
        return Sample(
            milliseconds=round(start.elapsed_time(end), 6),
            num_device_allocations=_num_device_allocations() - allocations,
        )

    def telemetry(self) -> Telemetry:
        """Read clocks, power and temperature from ``nvidia-smi``."""
        clock, power, temperature = query_device(
            "clocks.sm", "power.draw", "temperature.gpu", device=self._device
        )
        return Telemetry(
            sm_clock_mhz=as_number(clock),
            power_watts=as_number(power),
            temperature_celsius=as_number(temperature),
        )

    def recover(self) -> None:
        """Give cached memory back; a device in a failed state raises here."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _num_device_allocations() -> int:
    """Return how often the allocator has asked the driver for memory so far."""
    return int(torch.cuda.memory_stats().get("num_device_alloc", 0))
