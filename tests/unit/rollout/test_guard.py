"""Calls of different threads to one engine."""

import threading
from collections.abc import Callable

import pytest

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.guard import EngineGuard


def new_guard() -> EngineGuard:
    return EngineGuard(lambda: "test engine")


def begin(call: Callable[[], object]) -> tuple[threading.Thread, list[str]]:
    """Call in another thread; the list has the text of its error at the end."""
    errors: list[str] = []

    def run() -> None:
        try:
            call()
        except EngineError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, errors


def sample(guard: EngineGuard) -> None:
    with guard.sampling():
        pass


def test_samples_wait_for_each_other_and_changes_do_not() -> None:
    guard = new_guard()
    with guard.sampling():
        waiting, errors = begin(lambda: sample(guard))
        with (
            pytest.raises(EngineError, match=r"test engine: cannot wake while .* are sampled"),
            guard.changing("wake"),
        ):
            pass
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(10)

    assert not waiting.is_alive()
    assert errors == []


def test_who_waits_to_sample_is_refused_if_the_weights_became_incomplete() -> None:
    guard = new_guard()
    with guard.changing("load weights"):
        waiting, errors = begin(lambda: sample(guard))
        waiting.join(0.2)
        assert waiting.is_alive()
        with pytest.raises(ValueError, match="half of it"), guard.replacing_weights():
            raise ValueError("half of it")
    waiting.join(10)

    assert len(errors) == 1
    assert "cannot sample: its weights are incomplete" in errors[0]
    with guard.changing("load weights"), guard.replacing_weights():
        pass
    sample(guard)


def test_paused_engine_stays_paused_over_new_weights() -> None:
    guard = new_guard()
    with guard.changing("pause"):
        assert guard.pause()
        assert not guard.pause()
    with guard.changing("load weights"), guard.replacing_weights():
        pass
    with pytest.raises(EngineError, match="it is paused; call resume first"):
        sample(guard)
    with guard.changing("resume"):
        assert guard.resume()
        assert not guard.resume()
    sample(guard)


def test_engine_that_sleeps_is_not_resumed() -> None:
    guard = new_guard()
    guard.sleep()

    assert not guard.resume()
    with pytest.raises(EngineError, match="it slept; call wake and load_weights first"):
        sample(guard)


def test_engine_that_is_closed_while_it_changes_stays_closed() -> None:
    guard = new_guard()
    with guard.changing("load weights"), guard.replacing_weights():
        guard.close()

    assert guard.is_closed
    with pytest.raises(EngineError, match="cannot sample: it is closed"):
        sample(guard)
    with pytest.raises(EngineError, match="cannot pause: it is closed"), guard.changing("pause"):
        pass
