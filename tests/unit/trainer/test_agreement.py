"""The alarm when engine and policy disagree."""

import logging

import pytest

from prefixrl_mcore.config.rollout import RolloutConfig
from prefixrl_mcore.trainer.agreement import ALARM, GapAlarm, LogprobGapError


def metrics_of(mean: float, p99: float) -> dict[str, float]:
    return {"loss/logprob_gap_mean_nats": mean, "loss/logprob_gap_p99_nats": p99}


@pytest.mark.parametrize(
    ("mean", "p99", "key"),
    [
        pytest.param(0.11, 0.2, "rollout.max_logprob_gap_mean", id="mean"),
        pytest.param(0.02, 1.01, "rollout.max_logprob_gap_p99", id="p99"),
        pytest.param(float("nan"), 0.2, "rollout.max_logprob_gap_mean", id="nan"),
    ],
)
def test_a_gap_beyond_its_threshold_is_counted_and_names_the_settings(
    mean: float, p99: float, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    alarm = GapAlarm(RolloutConfig())
    assert alarm.metrics(metrics_of(mean, p99)) == {ALARM: 1.0}
    alarm.ring(7, metrics_of(mean, p99))
    assert "step 7: engine and policy disagree: loss/logprob_gap_" in caplog.text
    for name in (key, "model.logits_dtype", "rollout.sglang.dtype", "other weights"):
        assert name in caplog.text


def test_a_gap_within_its_thresholds_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    alarm = GapAlarm(RolloutConfig())
    assert alarm.metrics(metrics_of(0.1, 1.0)) == {ALARM: 0.0}
    assert alarm.metrics({"loss/entropy_nats": 1.0}) == {}
    alarm.ring(0, metrics_of(0.1, 1.0))
    assert caplog.text == ""


def test_it_warns_again_only_after_a_step_without_alarm(caplog: pytest.LogCaptureFixture) -> None:
    alarm = GapAlarm(RolloutConfig())
    with caplog.at_level(logging.WARNING):
        for step, mean in enumerate((0.5, 0.5, 0.01, 0.5)):
            alarm.ring(step, metrics_of(mean, 0.5))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["step 0", "step 3"]


def test_one_rank_warns_and_all_stop() -> None:
    alarm = GapAlarm(RolloutConfig(on_logprob_gap="stop"), warns=False)
    with pytest.raises(LogprobGapError, match=r"step 3: .* is 0\.5, allowed are 0\.1"):
        alarm.ring(3, metrics_of(0.5, 0.5))


def test_none_switches_an_alarm_off() -> None:
    config = RolloutConfig(
        max_logprob_gap_mean=None, max_logprob_gap_p99=None, on_logprob_gap="stop"
    )
    GapAlarm(config).ring(3, metrics_of(9.0, 9.0))
