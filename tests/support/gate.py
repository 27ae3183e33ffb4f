"""A gate in a run, which waits there before it judges a step's rollouts, until its test opens it.

A step of a tiny run takes a tenth of a second and less. What befalls a run between two steps must
therefore happen while it waits: a test that only hurries comes too late on a fast machine. An
evaluation by ``prefixrl eval`` waits likewise; its steps are the times that it judges.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from prefixrl_mcore.config.reward import RewardConfig
from prefixrl_mcore.observability.atomic import write_text_atomic
from prefixrl_mcore.records import Verdict
from prefixrl_mcore.rewards.base import VerifyRequest
from prefixrl_mcore.rewards.math_answer import MathVerifier

_VARIABLE = "PREFIXRL_TEST_GATE"
_POLL_SECONDS = 0.02

HAS_GATE = "reward.verifier=tests.support.gate:GatedVerifier"
"""Setting of a run that waits at the gate whose file its environment names."""


class Gate:
    """A gate that is closed for a step and all after it, as long as its file is there."""

    def __init__(self, file: Path) -> None:
        """Name the file; nothing is closed yet."""
        self._file = file

    def close(self, step: int) -> None:
        """Let runs take the steps before this one alone."""
        write_text_atomic(self._file, str(step))

    def open(self) -> None:
        """Let runs go on."""
        self._file.unlink()

    def inherited(self, patch: pytest.MonkeyPatch) -> None:
        """Let this be the gate of what is launched from now on."""
        patch.setenv(_VARIABLE, str(self._file))


class GatedVerifier(MathVerifier):
    """The default verifier, behind a gate; evaluations of a run that trains pass."""

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        self._num_evaluated = 0

    def verify(self, requests: Sequence[VerifyRequest]) -> list[Verdict]:
        """Wait until the gate is open for the step, then judge."""
        step = self._step(requests[0].request_id.partition("/")[0] if requests else "")
        while step is not None and _is_closed(step):
            time.sleep(_POLL_SECONDS)
        return super().verify(requests)

    def _step(self, label: str) -> int | None:
        """Return which step rollouts of a label are of; None if they pass."""
        if label.startswith("step-"):  # the checkpoint that is evaluated
            self._num_evaluated += 1
            return self._num_evaluated - 1
        return int(label) if label.isdecimal() else None


def _is_closed(step: int) -> bool:
    """Return whether a step has to wait."""
    try:
        return step >= int(Path(os.environ[_VARIABLE]).read_text())
    except (KeyError, FileNotFoundError):
        return False
