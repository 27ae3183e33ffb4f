"""Rollouts in the background: who waits, what is hidden, where errors come out."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.accounting.flops import FlopsMeter
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.policy.serving import CollectiveServices
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.interruption import SamplingInterrupted
from prefixrl_mcore.trainer import rollout_supply
from prefixrl_mcore.trainer.generation import Generated
from prefixrl_mcore.trainer.rollout_supply import RolloutSupply
from tests.support.scripted_engine import scripted_source

SECONDS = 5.0
"""What a generation says that it took."""


class Sampling:
    """A generator that waits to be let go, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.carried: list[Any] = []
        self.go_on = threading.Event()
        self.threads: list[str] = []
        self._error = error

    def generate(self, step: int, *, phases: Phases, on_wait: Any = None) -> Generated:
        self.threads.append(threading.current_thread().name)
        assert self.go_on.wait(30)
        if self._error is not None:
            raise self._error
        return Generated(
            step=step,
            groups=(),
            dropped=(),
            num_sampled_tokens=70,
            num_cached_tokens=20,
            num_new_tokens=30,
            sample_seconds=0.1,
            seconds=SECONDS,
            figures={"rollout/num_rounds": 1.0},
        )


class Clock:
    """Shows the time that tests let pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def show(self) -> float:
        return self.now


def supply_of(sampling: Sampling | None, *, clock: Clock | None = None) -> RolloutSupply:
    generator: Any = sampling
    return RolloutSupply(
        generator,
        scripted_source(2),
        services=CollectiveServices({}),
        meter=FlopsMeter(num_parameters=10),
        phases=Phases(clock=(clock or Clock()).show),
    )


def test_a_generation_that_is_over_when_it_is_taken_was_hidden_and_is_charged_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout_supply, "time", SimpleNamespace(perf_counter=Clock().show))
    sampling = Sampling()
    supply = supply_of(sampling)
    supply.begin(4)
    assert supply.is_begun
    assert supply._meter.charged_tokens == 0
    sampling.go_on.set()
    told: list[str] = []
    supply.on_wait = told.append
    supply.drain()
    supply.drain()
    assert told == ["rollouts begun during the update"]
    assert supply.is_begun

    generated = supply.take(4)

    assert not supply.is_begun
    assert sampling.threads == ["rollouts"]
    assert supply._meter.charged_tokens == 70
    assert supply._meter.computed_tokens == 50
    seconds, hidden = (generated.figures[name] for name in rollout_supply.OVERLAP_METRICS)
    assert seconds == hidden == SECONDS
    assert generated.figures["rollout/num_rounds"] == 1.0


def test_a_generation_finds_itself_in_the_background_from_its_first_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = Sampling()
    sampling.go_on.set()
    supply, found = supply_of(sampling), list[bool]()
    generate, start = sampling.generate, threading.Thread.start

    def note(*args: Any, **kwargs: Any) -> Generated:
        found.append(supply.is_in_background)
        return generate(*args, **kwargs)

    def start_and_wait(thread: threading.Thread) -> None:
        start(thread)
        thread.join(10)  # as a thread does that is faster than the one that started it

    monkeypatch.setattr(sampling, "generate", note)
    monkeypatch.setattr(threading.Thread, "start", start_and_wait)
    supply.begin(0)

    assert found == [True]


@pytest.mark.parametrize(("waited", "hidden"), [(3.0, 2.0), (6.0, 0.0)])
def test_what_a_step_waits_for_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, waited: float, hidden: float
) -> None:
    sampling, clock = Sampling(), Clock()
    supply = supply_of(sampling, clock=clock)
    result = rollout_supply._Background.result

    def wait(background: rollout_supply._Background) -> Generated:
        clock.now += waited
        sampling.go_on.set()
        return result(background)

    monkeypatch.setattr(rollout_supply, "time", SimpleNamespace(perf_counter=clock.show))
    monkeypatch.setattr(rollout_supply._Background, "result", wait)
    supply.begin(0)
    generated = supply.take(0)
    figures = [generated.figures[name] for name in rollout_supply.OVERLAP_METRICS]
    assert figures == [SECONDS, hidden]
    assert supply._phases.take()["time/rollout_seconds"] == waited


def test_an_error_of_the_thread_comes_out_where_its_rollouts_are_needed() -> None:
    sampling = Sampling(error=EngineError("the engine is gone"))
    supply = supply_of(sampling)
    sampling.go_on.set()
    supply.begin(3)
    with pytest.raises(EngineError, match="the engine is gone"):
        supply.take(3)
    assert not supply.is_begun
    assert not supply.is_in_background
    assert supply.state() == {"carried": [], "ready": None}  # so that a last checkpoint is possible


@pytest.mark.parametrize("is_overlapped", [True, False])
def test_what_a_stop_interrupted_is_charged_and_nothing_is_left_of_it(is_overlapped: bool) -> None:
    sampling = Sampling(error=SamplingInterrupted(70, 30, 20))
    supply = supply_of(sampling)
    sampling.go_on.set()
    if is_overlapped:
        supply.begin(3)
    with pytest.raises(SamplingInterrupted):
        supply.take(3) if is_overlapped else supply.sample(3)
    assert not supply.is_begun
    assert supply.state() == {"carried": [], "ready": None}
    meter = supply._meter
    assert (meter.interrupted_tokens, meter.num_interrupted_generations) == (70, 1)
    assert (meter.charged_tokens, meter.computed_tokens, meter.sampling_flops) == (70, 50, 0.0)


def test_a_state_needs_what_is_under_way_to_be_over() -> None:
    sampling = Sampling()
    supply = supply_of(sampling)
    supply.begin(3)
    with pytest.raises(AssertionError, match="drain comes before state"):
        supply.state()
    sampling.go_on.set()
    supply.drain()
    state = supply.state()

    again = supply_of(Sampling())
    again.load_state(state)
    assert again.is_begun
    assert again.take(3) == supply.take(3)
    assert again._meter.charged_tokens == 0  # the saved meter has been charged


def test_waiting_rollouts_are_counted_until_their_step_takes_them() -> None:
    sampling = Sampling()
    sampling.go_on.set()
    supply = supply_of(sampling)
    assert supply.num_waiting_tokens == 0
    supply.begin(3)
    assert supply.num_waiting_tokens == 0  # not charged yet either
    supply.drain()
    assert supply.num_waiting_tokens == 70
    supply.take(3)
    assert supply.num_waiting_tokens == 0


def test_the_position_of_the_source_is_that_before_a_generation_until_its_end() -> None:
    sampling = Sampling()
    supply = supply_of(sampling)
    before = supply.source_state()
    supply.begin(3)
    supply._source.take(1)  # as the thread does
    assert supply.source_state() == before
    sampling.go_on.set()
    supply.drain()
    assert supply.source_state() == supply._source.state() != before


def test_rollouts_of_another_step_are_refused() -> None:
    sampling = Sampling()
    sampling.go_on.set()
    supply = supply_of(sampling)
    supply.begin(3)
    with pytest.raises(AssertionError, match="step 4: these are rollouts of step 3"):
        supply.take(4)


def test_closing_leaves_a_generation_behind_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rollout_supply, "_CLOSE_SECONDS", 0.05)
    sampling = Sampling()
    supply = supply_of(sampling)
    supply.close()
    supply.begin(6)
    supply.close()
    assert "the rollouts of step 6 were still being sampled" in caplog.text
    sampling.go_on.set()
    supply.drain()
    caplog.clear()
    supply.close()
    assert caplog.text == ""


def test_a_rank_without_generator_has_no_carried_groups() -> None:
    supply = supply_of(None)
    supply.load_state({"carried": [{"group_id": "0/0"}], "ready": None})
    assert supply.state() == {"carried": [], "ready": None}
    assert not supply.is_begun
