"""How often a server is started again."""

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.restarts import RestartAllowance


def test_a_server_is_started_again_so_often_within_a_window() -> None:
    allowance = RestartAllowance(SGLangConfig(max_restarts=2, restart_window_seconds=60.0))
    taken: list[bool] = []
    for now in (0.0, 10.0, 50.0, 61.0, 62.0, 71.0):
        taken.append(allowance.take(now))
        allowance.note_success()

    assert taken == [True, True, False, True, False, True]
    assert allowance.num_restarts == 4
    assert not RestartAllowance(SGLangConfig(max_restarts=0)).take(0.0)


def test_starts_in_vain_are_counted_however_far_apart_they_are() -> None:
    allowance = RestartAllowance(SGLangConfig(max_restarts=2, restart_window_seconds=60.0))

    assert allowance.take(0.0)
    allowance.note_success()
    assert [allowance.take(now) for now in (100.0, 200.0, 300.0)] == [True, True, False]
    assert str(allowance) == ("0 restart(s) in 60 s, 2 in vain, rollout.sglang.max_restarts = 2")


def test_server_that_was_away_for_long_is_tried_again_a_window_after_the_first_refusal() -> None:
    allowance = RestartAllowance(SGLangConfig(max_restarts=3, restart_window_seconds=3600.0))

    def take(now: float) -> bool:
        return allowance.take(now, others_serve=True)

    assert [take(now) for now in (0.0, 4000.0, 8000.0)] == [True] * 3
    for now in (8600.0, 12_000.0, 12_200.0):  # at 12 000 none is within the window any more
        assert (allowance.is_left(now), take(now)) == (False, False)
    assert [take(12_201.0 + 4000.0 * n) for n in range(4)] == [True, True, True, False]
    assert not take(24_201.0 + 3600.0)
    assert not allowance.take(30_000.0)  # the run waits for it: that comes to an end
    assert take(30_000.0)


def test_after_restarts_in_vain_the_next_one_is_not_due_at_once() -> None:
    allowance = RestartAllowance(SGLangConfig(max_restarts=5))
    due = [0.0]
    for pause in (1.0, 10.0, 60.0, 60.0):
        assert allowance.take(due[-1])
        assert not allowance.take(due[-1] + 0.99 * pause)
        assert allowance.is_left(due[-1])
        due.append(due[-1] + pause)

    assert due == [0.0, 1.0, 11.0, 71.0, 131.0]
    assert allowance.num_restarts == 4


def test_restart_of_a_server_that_has_served_since_the_last_is_due_at_once() -> None:
    allowance = RestartAllowance(SGLangConfig(max_restarts=2))

    assert allowance.take(0.0)
    allowance.note_success()
    assert allowance.take(0.1)
