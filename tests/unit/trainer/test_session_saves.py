"""What a session saves, and does not lose, when a step ends with an error."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.checkpoint.manifest import ReadBackError, SaveError
from prefixrl_mcore.checkpoint.run_checkpoints import step_folder
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.policy.nonfinite import NonFiniteError
from prefixrl_mcore.rollout.engine import EngineError, RolloutError
from prefixrl_mcore.trainer import session as session_module
from prefixrl_mcore.trainer.agreement import LogprobGapError
from prefixrl_mcore.trainer.generation import StalenessError
from prefixrl_mcore.trainer.session import Session
from tests.support.policies import make_batch


def raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


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
    session.saver = SimpleNamespace(finish=raising(refusal))
    session.policy = SimpleNamespace(update=raising(NonFiniteError("loss is nan")))
    session.topology = SimpleNamespace(is_first=True)
    session.phases = Phases()
    session.num_failed_saves = 0
    session.config = SimpleNamespace(rollout=SimpleNamespace(colocated=False))
    monkeypatch.setattr(Session, "_memory_explained", lambda *_: nullcontext())
    monkeypatch.setattr(Session, "state", lambda *_: {})
    dumped = NonFiniteError("dumped")
    monkeypatch.setattr(session_module, "dump_and_explain", lambda *_, **__: dumped)
    with pytest.raises(NonFiniteError, match="dumped"):
        session._update(3, make_batch(), loss=None, dumps=Path("dumps"))
    assert session.num_failed_saves == num_failed
    assert str(refusal) in caplog.text


@pytest.mark.parametrize("error", [LogprobGapError("gap"), StalenessError("old")])
def test_a_check_that_ends_the_run_completes_the_save_under_way(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = object.__new__(Session)
    waits: list[bool] = []
    session.saver = SimpleNamespace(finish=lambda *, wait: waits.append(wait))
    session.phases = Phases()
    session.profiler = SimpleNamespace(step=lambda step: nullcontext())
    monkeypatch.setattr(Session, "_memory_explained", lambda *_: nullcontext())

    with pytest.raises(type(error)), session.step(3):
        raise error

    assert waits == [True]


def test_a_colocated_engine_that_cannot_sleep_leaves_no_save_under_way() -> None:
    session: Any = object.__new__(Session)
    waits: list[bool] = []
    session.config = SimpleNamespace(rollout=SimpleNamespace(colocated=True))
    session.saver = SimpleNamespace(finish=lambda *, wait: waits.append(wait))
    session.phases = Phases()
    session.engine_sleeps = False
    session.evaluator = SimpleNamespace(
        engine=SimpleNamespace(sleep=raising(EngineError("no server is left")))
    )

    with pytest.raises(EngineError, match="no server is left"):
        session.release_engine_memory()

    assert waits == [True]
    assert not session.engine_sleeps


class FakeSaver:
    """Keeps what is saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[int, Any] = {}

    def start(self, step: int, _policy: Any, state: Any, *, metrics: Any) -> None:
        self.saved[step] = (state, metrics)

    def finish(self, *, wait: bool) -> None:
        """Nothing is in the background."""


def session_in_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    session: Any = object.__new__(Session)
    session.folder = SimpleNamespace(checkpoints=tmp_path)
    session.saver = FakeSaver(tmp_path)
    session.policy = None
    session.topology = SimpleNamespace(is_first=True)
    session.phases = Phases()
    session.evaluations = {3: {"accuracy": 0.5}}
    session.supply = SimpleNamespace(state=lambda: "unused rollouts")
    monkeypatch.setattr(Session, "state", lambda *_: {"step": 3})
    return session


@pytest.mark.parametrize("error", [EngineError("no server is left"), RolloutError("'3/0' is lost")])
def test_a_step_without_rollouts_is_saved_as_it_began(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_in_need(tmp_path, monkeypatch)

    with pytest.raises(type(error)), session.saved_if_engine_is_lost(3):
        raise error

    expected = {"step": 3, "rollouts": "unused rollouts"}
    assert session.saver.saved == {3: (expected, {"accuracy": 0.5})}


def test_a_step_that_is_saved_already_is_not_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_in_need(tmp_path, monkeypatch)
    monkeypatch.setattr(session_module, "latest_checkpoint", lambda folder: step_folder(folder, 3))

    with pytest.raises(EngineError), session.saved_if_engine_is_lost(3):
        raise EngineError("no server is left")

    assert session.saver.saved == {}


def test_other_errors_save_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_in_need(tmp_path, monkeypatch)

    with pytest.raises(ZeroDivisionError), session.saved_if_engine_is_lost(3):
        raise ZeroDivisionError

    assert session.saver.saved == {}
