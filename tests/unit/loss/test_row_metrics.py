"""Metric sums and maxima of a stream's rows, worked out by hand."""

import pytest
import torch
from prefixrl_kernels import HeadStatistics

from prefixrl_mcore.loss.row_metrics import LossReport, metric_names, report_rows


def _statistics(k1: list[float]) -> HeadStatistics:
    k1_R = torch.tensor(k1)
    zeros_R = torch.zeros_like(k1_R)
    ratios_R = (-k1_R).exp()
    return HeadStatistics(
        logprobs_R=-torch.ones_like(k1_R),
        entropies_R=torch.full_like(k1_R, 0.5),
        ratios_R=ratios_R,
        k1_R=k1_R,
        k3_R=ratios_R - 1.0 + k1_R,
        reference_k1_R=zeros_R,
        reference_k3_R=zeros_R,
        is_clipped_R=k1_R < 0,
        is_extreme_R=k1_R > 1.5,
    )


def _report(k1: list[float]) -> LossReport:
    return report_rows(
        torch.tensor(3.0), _statistics(k1), has_rollout_logprobs=True, has_reference=False
    )


def test_sums_and_maxima_of_three_rows() -> None:
    report = _report([-1.0, 0.5, 2.0])
    sums = {name: value.item() for name, value in report.metric_sums.items()}
    assert sums["loss/entropy_nats"] == 1.5
    assert sums["loss/logprob_gap_mean_nats"] == 3.5
    assert sums["loss/k1_nats"] == 1.5
    assert sums["loss/k3_nats"] == pytest.approx(2.718282 + 0.606531 + 0.135335 - 3 + 1.5)
    assert sums["loss/importance_mean"] == pytest.approx(2.718282 + 0.606531 + 0.135335)
    assert (sums["loss/clipped_fraction"], sums["loss/extreme_fraction"]) == (1.0, 1.0)
    assert report.metric_maxima["loss/logprob_gap_max_nats"].item() == 2.0
    assert report.summed_loss.item() == 3.0


def test_no_rows_give_zeros() -> None:
    report = _report([])
    assert all(value.item() == 0.0 for value in report.metric_sums.values())
    assert report.metric_maxima["loss/logprob_gap_max_nats"].item() == 0.0


@pytest.mark.parametrize("has_reference", [False, True])
@pytest.mark.parametrize("has_rollout_logprobs", [False, True])
def test_names_are_those_of_the_reduction(has_rollout_logprobs: bool, has_reference: bool) -> None:
    has = {"has_rollout_logprobs": has_rollout_logprobs, "has_reference": has_reference}
    report = report_rows(torch.tensor(0.0), _statistics([0.0]), **has)
    assert (tuple(report.metric_sums), tuple(report.metric_maxima)) == metric_names(**has)


def test_sums_of_parts_equal_the_sum_of_the_whole() -> None:
    whole, first, second = _report([-1.0, 0.5, 2.0]), _report([-1.0]), _report([0.5, 2.0])
    for name, value in whole.metric_sums.items():
        parts = first.metric_sums[name].item() + second.metric_sums[name].item()
        assert parts == pytest.approx(value.item(), rel=1e-6)
