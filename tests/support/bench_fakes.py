"""A benchmark without a GPU: a device whose clock a test sets, and heads that keep a log."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from bench.cases import Case, Inputs
from bench.environment import Environment
from bench.implementation import Implementation, Outputs, float32_logit_bounds
from bench.measure import Result, Sample, Telemetry
from bench.peers import Materialized
from torch import Tensor

ENVIRONMENT = Environment(
    device="NVIDIA H100 80GB HBM3",
    device_kind="cuda",
    memory_bytes=85_000_000_000,
    num_multiprocessors=132,
    l2_cache_bytes=52_428_800,
    compute_capability="9.0",
    driver="580.1",
    cuda="13.0",
    power_limit_watts=700.0,
    platform="Linux",
    python="3.12.1",
    packages={"torch": "2.11.0", "quack-kernels": None},
    git_commit="0123456789abcdef",
    has_local_changes=False,
    allocator=None,
    allows_tf32=False,
)


def small_case(fraction: float = 0.5, **changes: object) -> Case:
    case = Case(
        hidden_size=16, vocab_size=40, num_tokens=24, active_fraction=fraction, mask="contiguous"
    )
    return replace(case, **changes)  # pyright: ignore[reportArgumentType]  # any field


class FakeDevice:
    """Runs calls on the CPU; times are what a test says they are."""

    torch_device = torch.device("cpu")

    def __init__(self, milliseconds: Callable[[], float] = lambda: 1.0) -> None:
        self.milliseconds = milliseconds
        self.num_recoveries = 0

    def wall_seconds(self, call: Callable[[], Result]) -> tuple[float, Result]:
        return 2.0, call()

    def peak_bytes(self, call: Callable[[], Result]) -> tuple[int, Result]:
        return 10_000, call()

    def sample(self, call: Callable[[], object]) -> Sample:
        call()
        return Sample(milliseconds=self.milliseconds(), num_device_allocations=0)

    def telemetry(self) -> Telemetry:
        return Telemetry(sm_clock_mhz=1980.0, power_watts=None, temperature_celsius=50.0)

    def recover(self) -> None:
        self.num_recoveries += 1


class Silent:
    """A listener that nobody hears."""

    def step(self, text: str) -> None:
        pass


class LoggedHead(Materialized):
    """Plain PyTorch that writes its name into a log at every step, and fails on demand."""

    def __init__(
        self, inputs: Inputs, *, name: str, log: list[str], failure: Exception | None, at_call: int
    ) -> None:
        super().__init__(inputs, is_compiled=False)
        self._name, self._log, self._failure, self._left = name, log, failure, at_call

    def forward_backward(self) -> Outputs:
        self._log.append(self._name)
        self._left -= 1
        if self._failure is not None and self._left < 0:
            raise self._failure
        return super().forward_backward()


def logged(
    name: str, log: list[str], *, failure: Exception | None = None, at_call: int = 0
) -> Implementation:
    return Implementation(
        name=name,
        family="peer",
        prepare=partial(LoggedHead, name=name, log=log, failure=failure, at_call=at_call),
        passes=("forward_backward",),
    )


class HalvedHead(Materialized):
    """A head whose loss is right and whose gradients are twice too small."""

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        loss = super().loss(hidden_RH, weight_VH)
        return loss.detach() / 2 + loss / 2


def wrong_head() -> Implementation:
    return Implementation(
        name="halved",
        family="ours",
        prepare=partial(HalvedHead, is_compiled=False),
        bounds=lambda largest: replace(
            float32_logit_bounds(largest), logprob_max_abs=1.0, loss_abs=1.0
        ),
    )
