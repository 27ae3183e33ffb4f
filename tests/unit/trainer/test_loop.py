"""What the loop does before its first step."""

from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.trainer.loop import train


@pytest.mark.parametrize("keep_best", [None, object()], ids=["no rule", "keep_best"])
def test_an_owed_evaluation_reaches_the_checkpoint_that_the_rule_looks_at(
    keep_best: object,
) -> None:
    calls: list[tuple[Any, ...]] = []
    session: Any = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(keep_best=keep_best)),
        first_step=3,
        owes_evaluation=True,
        evaluate=lambda step: calls.append(("evaluate", step)),
        checkpoint=lambda step, **how: calls.append(("checkpoint", step, how)),
        is_over_budget=lambda: True,
        has_checkpoint=lambda: True,
    )
    train(session, SimpleNamespace())  # pyright: ignore[reportArgumentType]
    again = [("checkpoint", 3, {"is_last": False, "is_due": True})]
    assert calls == [("evaluate", 3), *(again if keep_best else [])]
