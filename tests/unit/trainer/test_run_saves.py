"""What a run saves, and does not lose, when a step ends with an error."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.accounting.flops import FlopsMeter
from prefixrl_mcore.checkpoint.manifest import ReadBackError, SaveError
from prefixrl_mcore.checkpoint.run_checkpoints import step_folder
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.policy.nonfinite import NonFiniteError
from prefixrl_mcore.rollout.engine import EngineError, RolloutError
from prefixrl_mcore.trainer import run_saves
from prefixrl_mcore.trainer import session as session_module
from prefixrl_mcore.trainer.agreement import LogprobGapError
from prefixrl_mcore.trainer.generation import StalenessError
from prefixrl_mcore.trainer.run_saves import RunSaves
from prefixrl_mcore.trainer.session import Session
from tests.support.policies import make_batch
from tests.support.scripted_engine import scripted_config


def raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


class FakeSaver:
    """Keeps what is saved."""

    longest_seconds = 7.0
    num_untidy = 0
    is_under_way = False

    def __init__(self) -> None:
        self.saved: dict[int, Any] = {}
        self.waits: list[bool] = []

    def start(self, step: int, _policy: Any, state: Any, *, metrics: Any) -> None:
        self.saved[step] = (state, metrics)

    def finish(self, *, wait: bool) -> None:
        self.waits.append(wait)


def saves_into(folder: Path, saver: Any) -> RunSaves:
    policy: Any = None
    supply: Any = SimpleNamespace(state=lambda: "unused rollouts", source_state=lambda: "position")
    return RunSaves(
        config=scripted_config(2),
        folder=folder,
        saver=saver,
        policy=policy,
        supply=supply,
        meter=FlopsMeter(num_parameters=10, collect_flops=0.0),
        phases=Phases(),
        warns=True,
        input_digests={"tokenizer": "abc"},
        evaluations={3: {"accuracy": 0.5}},
    )


@pytest.mark.parametrize(
    ("refusal", "num_failed"),
    [
        pytest.param(SaveError("no space"), 1, id="storage"),
        pytest.param(ReadBackError("5 bytes differ"), 0, id="read-back"),
        pytest.param(RuntimeError("rank 1: ValueError"), 0, id="writer"),
    ],
)
def test_a_save_that_fails_does_not_hide_an_update_that_is_not_finite(
    refusal: Exception,
    num_failed: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    session: Any = object.__new__(Session)
    session.saves = saves_into(Path("checkpoints"), FakeSaver())
    session.saves.saver.finish = raising(refusal)
    session.policy = SimpleNamespace(update=raising(NonFiniteError("loss is nan")))
    session.phases = Phases()
    session.config = SimpleNamespace(rollout=SimpleNamespace(colocated=False))
    session.memory_explained = lambda **_: nullcontext()
    dumped = NonFiniteError("dumped")
    monkeypatch.setattr(session_module, "dump_and_explain", lambda *_, **__: dumped)
    with pytest.raises(NonFiniteError, match="dumped"):
        session._update(3, make_batch(), loss=None, dumps=Path("dumps"))
    assert session.saves.num_refused == num_failed
    assert str(refusal) in caplog.text


@pytest.mark.parametrize("error", [LogprobGapError("gap"), StalenessError("old")])
def test_a_check_that_ends_the_run_completes_the_save_under_way(
    error: Exception,
) -> None:
    session: Any = object.__new__(Session)
    session.saves = saves_into(Path("checkpoints"), saver := FakeSaver())
    session.phases = Phases()
    session.profiler = SimpleNamespace(step=lambda step: nullcontext())
    session.memory_explained = nullcontext

    with pytest.raises(type(error)), session.step(3):
        raise error

    assert saver.waits == [True]


def test_a_colocated_engine_that_cannot_sleep_leaves_no_save_under_way() -> None:
    session: Any = object.__new__(Session)
    session.config = SimpleNamespace(rollout=SimpleNamespace(colocated=True))
    session.saves = saves_into(Path("checkpoints"), saver := FakeSaver())
    session.phases = Phases()
    session.engine_sleeps = False
    session.evaluator = SimpleNamespace(
        engine=SimpleNamespace(sleep=raising(EngineError("no server is left")))
    )

    with pytest.raises(EngineError, match="no server is left"):
        session.release_engine_memory()

    assert saver.waits == [True]
    assert not session.engine_sleeps


@pytest.mark.parametrize("error", [EngineError("no server is left"), RolloutError("'3/0' is lost")])
def test_a_step_without_rollouts_is_saved_as_it_began(error: Exception, tmp_path: Path) -> None:
    saves = saves_into(tmp_path, saver := FakeSaver())

    with pytest.raises(type(error)), saves.if_engine_is_lost(3):
        raise error

    ((step, (state, metrics)),) = saver.saved.items()
    assert step == state["step"] == 3
    assert state["rollouts"] == "unused rollouts"
    assert state["source"] == "position"
    assert state["is_evaluated"] is True
    assert state["save_seconds"] == 7.0
    assert metrics == {"accuracy": 0.5}
    assert saver.waits == [True, True]  # one that was under way, and this one


def test_a_step_that_is_saved_already_is_not_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_saves, "latest_checkpoint", lambda folder: step_folder(folder, 3))
    saves = saves_into(tmp_path, saver := FakeSaver())

    with pytest.raises(EngineError), saves.if_engine_is_lost(3):
        raise EngineError("no server is left")

    assert saver.saved == {}


def test_other_errors_save_nothing(tmp_path: Path) -> None:
    saves = saves_into(tmp_path, saver := FakeSaver())

    with pytest.raises(ZeroDivisionError), saves.if_engine_is_lost(3):
        raise ZeroDivisionError

    assert saver.saved == {}
