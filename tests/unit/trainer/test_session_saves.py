"""How a session deals with a save under way when an update is not finite."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.checkpoint.manifest import ReadBackError, SaveError
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.policy.nonfinite import NonFiniteError
from prefixrl_mcore.trainer import session as session_module
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
    monkeypatch.setattr(Session, "_memory_explained", lambda *_: nullcontext())
    monkeypatch.setattr(Session, "state", lambda *_: {})
    dumped = NonFiniteError("dumped")
    monkeypatch.setattr(session_module, "dump_and_explain", lambda *_, **__: dumped)
    with pytest.raises(NonFiniteError, match="dumped"):
        session._update(3, make_batch(), loss=None, dumps=Path("dumps"))
    assert session.num_failed_saves == num_failed
    assert str(refusal) in caplog.text
