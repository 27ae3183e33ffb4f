"""The wall-clock limit: when a next step would come too late. Signals: what the run exits with."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from prefixrl_mcore.config import exit_codes
from prefixrl_mcore.config.run import TrainerConfig
from prefixrl_mcore.trainer import signals
from prefixrl_mcore.trainer.signals import StopSignal, TimeLimit
from tests.support.signal_handlers import restored_stop_signals


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def asked_after(limit: TimeLimit, clock: Clock, *intervals: float) -> list[bool]:
    answers: list[bool] = []
    for seconds in intervals:
        clock.now += seconds
        answers.append(limit.is_near())
    return answers


def test_the_last_step_leaves_the_margin() -> None:
    clock = Clock()
    config = TrainerConfig(max_seconds=100.0, stop_margin_seconds=10.0)
    limit = TimeLimit(config, started=1000.0, clock=clock)
    # Steps of 20 s end at 20, 40, 60, 80; one more would end at 100 and leave no margin of 10 s.
    assert asked_after(limit, clock, 20, 20, 20, 20) == [False, False, False, True]


def test_the_longest_step_so_far_decides() -> None:
    clock = Clock()
    config = TrainerConfig(max_seconds=100.0, stop_margin_seconds=10.0)
    limit = TimeLimit(config, started=1000.0, clock=clock)
    # A step of 35 s (ended at 45) makes 55 + 35 + 10 = 100 the moment to stop.
    assert asked_after(limit, clock, 10, 35, 9, 1) == [False, False, False, True]


@pytest.mark.parametrize(("max_seconds", "end"), [(50.0, 9999.0), (9999.0, 1050.0), (None, 1050.0)])
def test_the_nearer_limit_counts(max_seconds: float | None, end: float) -> None:
    clock = Clock()
    config = TrainerConfig(max_seconds=max_seconds, end_unix_seconds=end, stop_margin_seconds=0.0)
    limit = TimeLimit(config, started=1000.0, clock=clock)
    assert asked_after(limit, clock, 20, 10, 10, 5) == [False, False, True, True]


def test_without_a_limit_nothing_stops() -> None:
    clock = Clock()
    assert asked_after(TimeLimit(TrainerConfig(), started=0.0, clock=clock), clock, 1e9) == [False]


def test_a_phase_does_not_inherit_the_longest_step_of_the_one_before() -> None:
    clock = Clock()
    config = TrainerConfig(max_seconds=100.0, stop_margin_seconds=10.0)
    limit = TimeLimit(config, started=1000.0, clock=clock)
    assert asked_after(limit, clock, 1, 40) == [False, False]  # an epoch of 40 s, ended at 41
    clock.now += 9  # an evaluation
    limit.begin()
    # Steps of 5 s: at 85, one more would end at 90 and leave the margin exactly.
    assert asked_after(limit, clock, *[5] * 7) == [False] * 6 + [True]


def test_the_saves_that_a_stop_waits_for_count() -> None:
    clock = Clock()
    config = TrainerConfig(max_seconds=100.0, stop_margin_seconds=10.0)
    limit = TimeLimit(config, started=1000.0, clock=clock)
    assert asked_after(limit, clock, 20, 20) == [False, False]
    clock.now += 20  # at 60, with steps of 20 s: 90 of 100 without a save, 100 with one of 10 s
    assert not limit.is_near(9.9)
    assert limit.is_near(10.0)


def test_a_step_that_takes_longer_than_its_time_is_noticed_within_it() -> None:
    clock = Clock()
    config = TrainerConfig(max_seconds=100.0, stop_margin_seconds=10.0)
    limit = TimeLimit(config, started=1000.0, clock=clock)
    clock.now += 95
    assert not limit.is_missed(0.0)  # the first step of a start is taken however long it takes
    clock.now -= 75
    assert not limit.is_near(5.0)  # at 20, with steps of 0 s
    clock.now += 64
    assert not limit.is_missed(5.0)
    clock.now += 1  # at 85: a save of 5 s and the margin end at 100
    assert limit.is_missed(5.0)
    assert not limit.is_missed(4.9)
    assert limit.is_near(5.0)
    clock.now += 50
    assert not limit.is_missed(5.0)  # the stop is planned, and has left time for what is begun
    limit.begin()
    assert not limit.is_missed(5.0)


def test_a_run_in_this_process_leaves_pytest_its_own_handlers() -> None:
    before = [signal.getsignal(number) for number in signals._SIGNALS]
    with restored_stop_signals():
        StopSignal(TimeLimit(TrainerConfig(), started=0.0))
        assert [signal.getsignal(number) for number in signals._SIGNALS] != before
    assert [signal.getsignal(number) for number in signals._SIGNALS] == before


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    with restored_stop_signals():
        yield StopSignal(TimeLimit(TrainerConfig(), started=0.0))


def test_the_exit_code_is_what_the_ranks_agreed_on(stop: StopSignal) -> None:
    assert not stop.is_set()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.exit_code == 0  # in the last step: nothing was left to stop
    assert stop.is_set()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.is_stopping()
    assert stop.exit_code == 128 + signal.SIGUSR1


def test_the_signal_of_another_rank_counts(
    stop: StopSignal, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_ranks = np.asarray([[0.0], [float(signal.SIGTERM)]])
    monkeypatch.setattr(signals, "gather_floats", lambda _: of_ranks)
    assert stop.is_set()
    assert stop.exit_code == 128 + signal.SIGTERM


def test_a_signal_interrupts_what_is_sampled_and_the_ranks_agree_next(stop: StopSignal) -> None:
    assert not stop.interrupts_sampling(0.0)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.interrupts_sampling(0.0)
    assert stop.exit_code == 0
    assert stop.is_set()
    assert stop.exit_code == 128 + signal.SIGUSR1


def test_a_limit_that_interrupted_stops_the_run_whatever_the_clock_says_next() -> None:
    clock = Clock()
    config = TrainerConfig(max_seconds=100.0, stop_margin_seconds=10.0)
    with restored_stop_signals():
        stop = StopSignal(TimeLimit(config, started=1000.0, clock=clock))
    stop.begin_steps()
    clock.now += 20
    assert not stop.is_set()
    clock.now += 70
    assert stop.interrupts_sampling(0.0)
    clock.now -= 60  # it was set back
    assert stop.interrupts_sampling(0.0)
    assert stop.is_set()
    assert stop.exit_code == exit_codes.TIME_LIMIT
