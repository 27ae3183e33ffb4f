"""The alarm when engine and policy do not agree on the logprobs of what was sampled."""

import logging
from collections.abc import Mapping

from prefixrl_mcore.config.rollout import RolloutConfig
from prefixrl_mcore.loss.row_metrics import GAP_MEAN, GAP_P99

logger = logging.getLogger(__name__)

ALARM = "loss/logprob_gap_alarm"

_ADVICE = (
    "If it was so from the first step, the two compute differently: compare policy.dtype with the "
    "engine's dtype (rollout.sglang.dtype, rollout.transformers.dtype), set model.logits_dtype = "
    '"float32", and see whether rollout.temperature or the chat template was changed on one side. '
    "If it began suddenly, the engine may have other weights than the trainer. With stale rollouts "
    "(rollout.schedule) the gap also holds what the updates since then have changed: lower "
    "policy.optimizer.lr or max_staleness"
)


class LogprobGapError(RuntimeError):
    """Engine and policy disagree by more than the run allows."""


class GapAlarm:
    """Compares each step's gap with ``rollout.max_logprob_gap_mean`` and ``..._p99``."""

    def __init__(self, config: RolloutConfig, *, warns: bool = True) -> None:
        """Take the thresholds and what to do beyond them.

        Args:
            config: with the thresholds.
            warns: log warnings; one rank's are enough.
        """
        self._thresholds = {
            GAP_MEAN: ("rollout.max_logprob_gap_mean", config.max_logprob_gap_mean),
            GAP_P99: ("rollout.max_logprob_gap_p99", config.max_logprob_gap_p99),
        }
        self._stops = config.on_logprob_gap == "stop"
        self._warns = warns
        self._has_warned = False

    def metrics(self, update: Mapping[str, float]) -> dict[str, float]:
        """Return the alarm as a metric: 1 or 0, nothing where no gap was measured.

        Args:
            update: metrics of the update, reduced over ranks.
        """
        return {ALARM: float(bool(self._excesses(update)))} if GAP_MEAN in update else {}

    def ring(self, step: int, update: Mapping[str, float]) -> None:
        """Warn, or stop, if a gap is beyond its threshold; call it when the step is logged.

        A warning comes once until a step is within the thresholds again. The step that showed the
        gap has been taken: only the pass that trains on the rollouts knows it.

        Raises:
            LogprobGapError: with ``rollout.on_logprob_gap = "stop"``; on every rank alike.
        """
        excesses = self._excesses(update)
        if not excesses:
            self._has_warned = False
            return
        message = f"step {step}: engine and policy disagree: {'; '.join(excesses)}. {_ADVICE}"
        if self._stops:
            raise LogprobGapError(f'{message}. Stopped because rollout.on_logprob_gap = "stop"')
        if self._warns and not self._has_warned:
            logger.warning("%s. Further steps like this are counted in %s only", message, ALARM)
        self._has_warned = True

    def _excesses(self, update: Mapping[str, float]) -> list[str]:
        """Return what is beyond its threshold, in words."""
        return [
            f"{name} is {update[name]:.4g}, allowed are {threshold:g} ({key})"
            for name, (key, threshold) in self._thresholds.items()
            if threshold is not None and name in update and not update[name] <= threshold
        ]
