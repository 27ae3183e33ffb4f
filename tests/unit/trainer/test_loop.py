"""What the loops do before their first step, and the order of the overlapped one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from prefixrl_mcore.accounting.flops import FlopsMeter
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.interruption import SamplingInterrupted
from prefixrl_mcore.trainer.loop import saved_if_interrupted, train
from prefixrl_mcore.trainer.overlapped_loop import train_overlapped
from prefixrl_mcore.trainer.session import Session


@pytest.mark.parametrize(
    ("keep_best", "is_last"),
    [
        pytest.param(None, False, id="no rule"),
        pytest.param(object(), False, id="keep_best"),
        pytest.param(None, True, id="last step"),
    ],
)
def test_an_owed_evaluation_reaches_the_checkpoint_that_the_rule_looks_at(
    keep_best: object, is_last: bool
) -> None:
    calls: list[tuple[Any, ...]] = []
    session: Any = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(keep_best=keep_best)),
        num_steps_done=3,
        owes_evaluation=True,
        evaluate=lambda step: calls.append(("evaluate", step)),
        is_over_budget=lambda: True,
        is_last=lambda step: is_last,
        saves=SimpleNamespace(
            checkpoint=lambda step, **how: calls.append(("checkpoint", step, how)),
            has_any=lambda: True,
        ),
    )
    train(session, SimpleNamespace())  # pyright: ignore[reportArgumentType]
    again = [("checkpoint", 3, {"is_last": is_last, "is_due": True})]
    assert calls == [("evaluate", 3), *(again if keep_best or is_last else [])]


class _Recorded:
    """A session that notes what the loop asks of it."""

    def __init__(self, *, num_steps_done: int, is_begun: bool) -> None:
        self.calls: list[str] = []
        self.config = SimpleNamespace(trainer=SimpleNamespace(num_steps=3))
        self.num_steps_done, self.owes_evaluation = num_steps_done, False
        self.policy = SimpleNamespace(policy_version=num_steps_done)
        self.phases = SimpleNamespace(begin_step=lambda step: None)
        self.profiler = SimpleNamespace(step=lambda step: nullcontext())
        self.memory_explained = nullcontext
        self.is_saved_in_need = False
        self.saves = SimpleNamespace(
            saver=SimpleNamespace(seconds_to_stop=0.0),
            if_engine_is_lost=self._if_engine_is_lost,
            checkpoint=self._checkpoint,
        )
        self.checkpoints: list[tuple[int, bool]] = []
        self.supply = SimpleNamespace(
            is_begun=is_begun,
            begin=self._begin,
            drain=lambda: self.calls.append("drain"),
            take=self._take,
            sample=self._sample,
        )

    def _checkpoint(self, step: int, *, is_last: bool) -> None:
        self.checkpoints.append((step, is_last))

    def _begin(self, step: int) -> None:
        self.supply.is_begun = True
        self.calls.append(f"begin {step}")

    def _sample(self, step: int) -> str:
        assert self.is_saved_in_need
        self.calls.append(f"sample {step}")
        return f"rollouts {step}"

    def _take(self, step: int) -> str:
        assert self.is_saved_in_need
        self.supply.is_begun = False
        self.calls.append(f"take {step}")
        return f"rollouts {step}"

    def step(self, step: int) -> AbstractContextManager[None]:
        real: Any = Session.step
        return real(self, step)

    @contextmanager
    def _if_engine_is_lost(self, step: int) -> Iterator[None]:
        self.is_saved_in_need = True
        yield
        self.is_saved_in_need = False

    def pack(self, rollouts: str) -> str:
        assert not self.is_saved_in_need
        return f"batch of {rollouts}"

    def update(self, step: int, batch: str) -> None:
        assert not self.is_saved_in_need
        self.calls.append(f"update {step} on {batch}")

    def log_step(self, *_: object) -> None:
        assert not self.is_saved_in_need, "rank 0 alone asks the engine here"

    def is_over_budget(self) -> bool:
        return False

    def is_last(self, step: int) -> bool:
        return step == self.config.trainer.num_steps

    def is_evaluation_due(self, step: int) -> bool:
        return False

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name != "sync_weights":
            return lambda *_, **__: None
        return lambda: self.calls.append("sync")


@pytest.mark.parametrize(
    ("num_steps_done", "is_begun"), [(0, False), (1, True)], ids=["new", "resumed"]
)
def test_with_overlap_a_generation_begins_after_the_sync_and_before_the_update(
    num_steps_done: int, is_begun: bool
) -> None:
    session: Any = _Recorded(num_steps_done=num_steps_done, is_begun=is_begun)
    stop: Any = SimpleNamespace(begin_steps=lambda: None, is_set=lambda seconds: False)
    train_overlapped(session, stop)
    first = [
        *("sync", "begin 0", "drain", "sync", "take 0", "begin 1"),
        "update 0 on batch of rollouts 0",
    ]
    assert session.calls == [
        *([] if is_begun else first),
        *("drain", "sync", "take 1", "begin 2", "update 1 on batch of rollouts 1"),
        *("drain", "sync", "take 2", "update 2 on batch of rollouts 2"),  # the last begins no other
    ]


def test_a_step_on_policy_syncs_samples_and_updates() -> None:
    session: Any = _Recorded(num_steps_done=2, is_begun=False)
    stop: Any = SimpleNamespace(begin_steps=lambda: None, is_set=lambda seconds: False)
    train(session, stop)
    assert session.calls == ["sync", "sample 2", "update 2 on batch of rollouts 2"]


@pytest.mark.parametrize(
    ("num_waiting", "max_flops", "is_over"),
    [(0, 1000.0, True), (0, 1001.0, False), (3, 1000.0, False), (3, 940.0, True)],
)
def test_rollouts_that_wait_for_their_step_do_not_end_a_run(
    num_waiting: int, max_flops: float, is_over: bool
) -> None:
    session: Any = object.__new__(Session)
    session.config = SimpleNamespace(trainer=SimpleNamespace(max_flops=max_flops))
    session.meter = FlopsMeter(num_parameters=10, collect_flops=400.0, sampling_flops=600.0)
    session.meter.charge_interrupted(50, num_cached_tokens=0)  # nor does it make a run shorter
    session.supply = SimpleNamespace(num_waiting_tokens=num_waiting)  # 2 x 10 FLOPs each
    assert session.is_over_budget() is is_over


def test_weights_are_not_exported_again_beside_an_update() -> None:
    session: Any = SimpleNamespace(
        supply=SimpleNamespace(is_in_background=True),
        _evaluator=SimpleNamespace(engine=SimpleNamespace(policy_version=3)),
    )
    with pytest.raises(EngineError, match=r"lost weights of version 3 .* resume the run"):
        Session._export(session)


@pytest.mark.parametrize("is_stopping", [True, False])
def test_an_interrupted_step_is_saved_as_it_began(is_stopping: bool) -> None:
    calls: list[tuple[Any, ...]] = []
    session: Any = SimpleNamespace(
        num_steps_done=7,
        saves=SimpleNamespace(
            saver=SimpleNamespace(seconds_to_stop=3.0),
            checkpoint=lambda step, *, is_last: calls.append(("checkpoint", step, is_last)),
        ),
        log_outside=lambda step: calls.append(("log", step)),
    )

    def is_set(save_seconds: float) -> bool:
        calls.append(("agree", save_seconds))
        return is_stopping

    stop: Any = SimpleNamespace(is_set=is_set)
    expected = nullcontext() if is_stopping else pytest.raises(AssertionError, match="only a stop")
    with expected, saved_if_interrupted(session, stop):
        raise SamplingInterrupted(30, 20, 5)
    saved = [("checkpoint", 7, True), ("log", 7)]
    assert calls == [("agree", 3.0), *(saved if is_stopping else [])]


@pytest.mark.parametrize("loop", [train, train_overlapped])
def test_an_interrupted_run_is_saved_under_the_steps_that_are_done(
    loop: Callable[[Any, Any], None],
) -> None:
    """Not under the policy version: supervised updates count there, a step without signal not."""
    session: Any = _Recorded(num_steps_done=0, is_begun=False)
    session.policy.policy_version = 300
    session.update = lambda step, batch: None  # no signal: the version stays

    interrupted: list[int] = []

    def interrupted_at(step: int) -> str:
        session.supply.is_begun = False
        if step == 2:
            interrupted.append(step)
            raise SamplingInterrupted(30, 20, 5)
        return f"rollouts {step}"

    session.supply.sample = session.supply.take = interrupted_at
    stop: Any = SimpleNamespace(begin_steps=lambda: None, is_set=lambda seconds: bool(interrupted))
    with saved_if_interrupted(session, stop):
        loop(session, stop)
    assert session.checkpoints == [(1, False), (2, False), (2, True)]


def test_a_step_that_fails_is_not_done() -> None:
    session: Any = _Recorded(num_steps_done=4, is_begun=False)
    with pytest.raises(EngineError), session.step(4):
        raise EngineError("no servers")
    assert session.num_steps_done == 4
    with session.step(4):
        assert session.num_steps_done == 4
    assert session.num_steps_done == 5
