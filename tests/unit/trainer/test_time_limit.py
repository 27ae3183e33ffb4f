"""The wall-clock limit: when a next step would come too late."""

import pytest

from prefixrl_mcore.config.run import TrainerConfig
from prefixrl_mcore.trainer.signals import TimeLimit


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
