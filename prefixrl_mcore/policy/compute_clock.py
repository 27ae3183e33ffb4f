"""How long a rank computes before it waits for the others' gradients.

The pass of all data-parallel ranks ends together, in the reduction of the gradients; what tells a
slow rank from the others is when it gets there.
"""

import time
from collections.abc import Callable

import torch


class ComputeClock:
    """Measures from ``start`` to where Megatron's schedule reduces the gradients."""

    def __init__(self, device: torch.device) -> None:
        """Measure on ``device``: with CUDA events, so that the host waits for nothing."""
        self._device = device
        self._begin: torch.cuda.Event | float | None = None
        self._end: torch.cuda.Event | float | None = None

    def start(self) -> None:
        """Begin to measure."""
        self._begin, self._end = self._now(), None

    def stop(self) -> None:
        """End, unless it has ended since ``start``."""
        if self._end is None:
            self._end = self._now()

    def seconds(self) -> float:
        """Return the measured time; on a GPU the device must have been synchronised since."""
        begin, end = self._begin, self._end
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            return begin.elapsed_time(end) / 1000.0
        assert isinstance(begin, float), "start comes first"
        assert isinstance(end, float), "stop comes first"
        return end - begin

    def stopping_before[**P, R](self, function: Callable[P, R]) -> Callable[P, R]:
        """Return ``function`` such that calling it stops this clock first."""

        def stop_and_call(*args: P.args, **kwargs: P.kwargs) -> R:
            self.stop()
            return function(*args, **kwargs)

        return stop_and_call

    def _now(self) -> "torch.cuda.Event | float":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def wait_for_device(device: torch.device) -> None:
    """Return when the device has done what was asked of it; at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
