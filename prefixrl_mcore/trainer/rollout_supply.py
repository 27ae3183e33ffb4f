"""Gives every rank each step's rollouts: sampled in the step, or in a thread during the one before.

Rank 0 samples; the others wait for it only where its rollouts are needed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from prefixrl_mcore.accounting.flops import FlopsMeter
from prefixrl_mcore.data.source import MixtureSource
from prefixrl_mcore.observability.phases import Phases
from prefixrl_mcore.policy.serving import CollectiveServices
from prefixrl_mcore.policy.topology import run_on_first
from prefixrl_mcore.rollout.interruption import SamplingInterrupted
from prefixrl_mcore.trainer.generated_state import (
    generated_from,
    generated_state,
    started_from,
    started_state,
)
from prefixrl_mcore.trainer.generation import Generated, Generator

logger = logging.getLogger(__name__)

OVERLAP_METRICS = ("rollout/generation_seconds", "rollout/hidden_seconds")

_CLOSE_SECONDS = 5.0
"""How long an error waits for a generation in the background before it leaves it behind."""


class RolloutSupply:
    """One rank's view of the rollouts that come; charges them when they are there.

    At most one generation is under way. What it yielded is kept until its step takes it, and is
    part of a checkpoint: ``drain`` comes before ``state``.
    """

    def __init__(
        self,
        generator: Generator | None,
        source: MixtureSource,
        *,
        services: CollectiveServices,
        meter: FlopsMeter,
        phases: Phases,
    ) -> None:
        """Begin with nothing under way.

        Args:
            generator: of rank 0; None on the other ranks.
            source: has the problems of a saved state.
            services: what the engine may ask all ranks for while they wait in ``sample``.
            meter: charged for what was sampled; on every rank alike.
            phases: of this rank.
        """
        self.on_wait: Callable[[str], None] = lambda what: None
        """Told what is waited for."""
        self._generator = generator
        self._source = source
        self._services = services
        self._meter = meter
        self._phases = phases
        self._pending_step: int | None = None
        self._source_state: dict[str, Any] = {}
        self._background: _Background | None = None
        self._ready: Generated | None = None

    @property
    def is_begun(self) -> bool:
        """Return whether rollouts of a coming step are there or under way; equal on all ranks."""
        return self._pending_step is not None or self._ready is not None

    @property
    def num_waiting_tokens(self) -> int:
        """Return the tokens charged for rollouts that no step has taken; equal on all ranks."""
        return 0 if self._ready is None else self._ready.num_sampled_tokens

    @property
    def is_in_background(self) -> bool:
        """Return whether this rank samples in another thread, or has not looked at its outcome."""
        return self._background is not None

    def sample(self, step: int) -> Generated:
        """Sample and verify the rollouts of a step now; all ranks call this and get them.

        Raises:
            Exception: of the engine or the verifier, on every rank.
        """
        # The other ranks wait in this phase.
        with self._phases.phase("rollout"), self._interruption_charged():
            generated = self._services.run_on_first(
                lambda: self._first.generate(step, phases=self._phases, on_wait=self.on_wait)
            )
        self._charge(generated)
        return generated

    def begin(self, step: int) -> None:
        """Begin with the rollouts of a step in the background; all ranks call this.

        The engine must keep its weights until ``drain`` or ``take``.
        """
        assert not self.is_begun, "one generation at a time: take what was begun first"
        self._source_state = self._source.state()
        self._pending_step = step
        if self._generator is not None:
            generator = self._generator
            # Phases of its own: those of the rank belong to the thread of the update.
            self._background = _Background(lambda: generator.generate(step, phases=Phases()))
            self._background.start()  # only now: the thread looks whether it is in the background

    def drain(self) -> None:
        """Wait for what is under way, if anything is; all ranks call this.

        After an error nothing is begun, and source and carried groups are as before ``begin``. The
        engine's weights need not be those of the policy any more, so that a resumed run samples the
        same problems with the same seeds from newer weights.

        Raises:
            Exception: of the engine or the verifier, on every rank.
        """
        if self._pending_step is None:
            return
        self.on_wait("rollouts begun during the update")
        self._pending_step = None  # also if it fails: the generator puts the problems back
        try:
            with self._phases.phase("rollout"), self._interruption_charged():
                # Nothing can be asked for: the weights that it samples from are no more.
                self._ready = run_on_first(self._wait)
        finally:
            self._background = None
        self._charge(self._ready)

    def take(self, step: int) -> Generated:
        """Return the rollouts that were begun for a step; all ranks call this and get them.

        Raises:
            Exception: of the engine or the verifier, on every rank.
        """
        self.drain()
        generated, self._ready = self._ready, None
        assert generated is not None, f"step {step}: nothing was begun"
        assert generated.step == step, f"step {step}: these are rollouts of step {generated.step}"
        return generated

    def source_state(self) -> dict[str, Any]:
        """Return the source's position, before what a generation under way takes from it.

        May be called at any time: the thread's own changes are not looked at.
        """
        return self._source.state() if self._pending_step is None else self._source_state

    def state(self) -> dict[str, Any]:
        """Return as JSON what was sampled, or begun, and no step has trained on; rank 0's counts.

        ``drain`` comes before.
        """
        assert self._pending_step is None, "drain comes before state"
        carried = [] if self._generator is None else self._generator.carried
        ready = self._ready
        return {
            "carried": started_state(carried),
            "ready": None if ready is None else generated_state(ready),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``; all ranks call this, with the source in its saved state."""
        if self._generator is not None:
            self._generator.carried = started_from(state["carried"], self._source.find)
        ready = state["ready"]
        self._ready = None if ready is None else generated_from(ready, self._source.find)

    def close(self) -> None:
        """Leave a generation in the background behind; it dies with the process at the latest."""
        if self._background is not None and not self._background.has_ended(_CLOSE_SECONDS):
            logger.warning(
                "the rollouts of step %s were still being sampled; they are lost",
                self._pending_step,
            )

    def _wait(self) -> Generated:
        """Return what the thread made, with how long it took and how much of that was hidden."""
        assert self._background is not None, "rank 0 has begun"
        start = time.perf_counter()
        generated = self._background.result()
        waited = time.perf_counter() - start
        figures = zip(
            OVERLAP_METRICS,
            (generated.seconds, max(generated.seconds - waited, 0.0)),
            strict=True,
        )
        return replace(generated, figures=generated.figures | dict(figures))

    def _charge(self, generated: Generated) -> None:
        """Charge all that was sampled for a step, used or not."""
        self._meter.charge_sampling(
            generated.num_sampled_tokens, num_cached_tokens=generated.num_cached_tokens
        )

    @contextmanager
    def _interruption_charged(self) -> Iterator[None]:
        """Charge on every rank what a stop interrupted inside."""
        try:
            yield
        except SamplingInterrupted as interruption:
            self._meter.charge_interrupted(
                interruption.num_tokens, num_cached_tokens=interruption.num_cached_tokens
            )
            raise

    @property
    def _first(self) -> Generator:
        assert self._generator is not None, "only rank 0 samples"
        return self._generator


class _Background:
    """A function that runs in a thread, and its outcome."""

    def __init__(self, function: Callable[[], Generated]) -> None:
        """Prepare the thread."""
        self._function = function
        self._outcome: Generated | BaseException | None = None
        # A daemon: it must not keep a failed trainer alive.
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def has_ended(self, seconds: float) -> bool:
        """Wait for the end for so long; return whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Generated:
        """Wait for the end and return what the function returned, or raise what it raised."""
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None, "the thread has ended"
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = self._function()
        except BaseException as error:  # raised again by result
            self._outcome = error
