"""Phases of a step: no second is counted twice or lost, and where a rank is can be asked."""

import itertools
from contextlib import nullcontext

import pytest

from prefixrl_mcore.observability.phases import TIMED, Phases


def _ticking(*times: float) -> Phases:
    """Return phases whose clock shows ``times``, one after the other; the first is the start."""
    ticks = iter(times)
    return Phases(clock=lambda: next(ticks))


def test_phases_add_up_to_the_step() -> None:
    #                start steps  |rollout      |verify       |take
    phases = _ticking(0.0, 10.0, 11.0, 14.0, 14.5, 16.5, 20.0)
    phases.begin_steps()
    with phases.phase("rollout"):
        pass
    with phases.phase("verify"):
        pass
    times = phases.take()
    assert times["time/rollout_seconds"] == 3.0
    assert times["time/verify_seconds"] == 2.0
    assert times["time/other_seconds"] == 1.0 + 0.5 + 3.5
    assert times["time/step_seconds"] == 10.0
    assert times.keys() == {f"time/{n}_seconds" for n in (*TIMED, "other", "step")}


def test_an_inner_phase_takes_its_time_from_the_outer_one() -> None:
    phases = _ticking(0.0, 0.0, 1.0, 4.0, 9.0, 11.0, 11.0)
    phases.begin_steps()
    with phases.phase("rollout"), phases.phase("verify"):
        pass
    times = phases.take()
    assert times["time/verify_seconds"] == 9.0 - 4.0
    assert times["time/rollout_seconds"] == (4.0 - 1.0) + (11.0 - 9.0)
    assert sum(times.values()) - times["time/step_seconds"] == times["time/step_seconds"]


def test_each_step_starts_anew_and_time_before_the_steps_is_not_counted() -> None:
    counter = itertools.count()
    phases = Phases(clock=lambda: float(next(counter)))
    with phases.phase("eval"):
        pass
    phases.begin_steps()
    with phases.phase("pack"):
        pass
    first, second = phases.take(), phases.take()
    assert (first["time/eval_seconds"], first["time/pack_seconds"]) == (0.0, 1.0)
    assert (second["time/pack_seconds"], second["time/step_seconds"]) == (0.0, 1.0)


def test_time_cannot_be_taken_inside_a_phase() -> None:
    phases = Phases()
    with phases.phase("save"), pytest.raises(RuntimeError, match="inside phase 'save'"):
        phases.take()


def test_the_state_names_step_phase_and_progress() -> None:
    phases = Phases()
    assert (phases.state.step, phases.state.phase) == ("", "start")
    phases.begin_steps()
    phases.begin_step(3)
    with phases.phase("forward_backward"):
        entered = phases.state
        phases.beat()
        phases.beat()
        state = phases.state
    assert (state.step, state.phase, state.num_beats) == ("step 3", "forward_backward", 2)
    assert state.since >= entered.since
    assert (phases.state.phase, phases.state.num_beats) == ("other", 0)
    phases.begin_step(4, kind="supervised step")
    assert phases.state.step == "supervised step 4"
    phases.end_steps()
    assert phases.state.step == ""


def test_changes_of_phase_are_counted_but_not_inner_ones() -> None:
    """Rank 0 alone verifies within rollout, and is as far as the ranks that wait for it."""
    first, other = Phases(), Phases()
    counts: list[list[int]] = [[], []]
    for phases, seen in zip((first, other), counts, strict=True):
        phases.begin_steps()
        with phases.phase("rollout"):
            seen.append(phases.state.num_changes)
            if phases is first:
                with phases.phase("verify"):
                    assert phases.state.phase == "verify"
                    seen[-1] = phases.state.num_changes
        phases.beat()
        seen.append(phases.state.num_changes)
        with phases.phase("sync"):  # as of an evaluation: further than what came before
            seen.append(phases.state.num_changes)
    assert counts == [[2, 3, 4], [2, 3, 4]]


def test_a_phase_that_fails_is_left() -> None:
    phases = Phases()
    with pytest.raises(ZeroDivisionError), phases.phase("sync"):
        raise ZeroDivisionError
    assert phases.state.phase == "start"


def test_phases_are_annotated() -> None:
    names: list[str] = []

    def annotate(name: str) -> nullcontext[None]:
        names.append(name)
        return nullcontext()

    phases = Phases(annotate=annotate)
    with phases.phase("rollout"), phases.phase("verify"):
        pass
    assert names == ["rollout", "verify"]
