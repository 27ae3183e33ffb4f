"""Throughput, MFU, balance and memory against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import torch

from prefixrl_mcore.records import UpdateResult
from prefixrl_mcore.trainer.memory import memory_metrics, read_peaks
from prefixrl_mcore.trainer.step_metrics import (
    Hardware,
    balance_metrics,
    read_hardware,
    throughput_metrics,
)
from tests.support.topologies import ONE_RANK

UPDATE = UpdateResult(
    loss=0.0,
    gradient_norm=1.0,
    learning_rate=1e-6,
    num_trained_tokens=100,
    num_computed_tokens=1000,
    model_flops=6e6,
    forward_backward_seconds=1.5,
    optimizer_seconds=0.5,
)


def test_throughput_of_update_and_step() -> None:
    metrics = throughput_metrics(UPDATE, Hardware(num_ranks=4, peak_flops=1e6), step_seconds=10.0)
    assert metrics == {
        "throughput/update_tokens_per_second": 500.0,
        "throughput/update_tokens_per_second_per_rank": 125.0,
        "throughput/update_flops_per_second": 3e6,
        "throughput/update_flops_per_second_per_rank": 0.75e6,
        "throughput/update_mfu_fraction": 0.75,
        "throughput/step_tokens_per_second": 100.0,
        "throughput/step_tokens_per_second_per_rank": 25.0,
        "throughput/step_flops_per_second": 0.6e6,
        "throughput/step_flops_per_second_per_rank": 0.15e6,
        "throughput/step_mfu_fraction": 0.15,
    }


def test_an_unknown_peak_makes_no_mfu() -> None:
    metrics = throughput_metrics(UPDATE, Hardware(num_ranks=4, peak_flops=None), step_seconds=10.0)
    assert len(metrics) == 8
    assert not any("mfu" in name for name in metrics)


def test_an_update_that_ran_nothing_has_no_throughput() -> None:
    nothing = UpdateResult(
        loss=0.0, gradient_norm=0.0, learning_rate=0.0, num_trained_tokens=0, was_skipped=True
    )
    assert throughput_metrics(nothing, Hardware(num_ranks=1, peak_flops=1.0), step_seconds=1) == {}
    assert balance_metrics(np.zeros(2)) == {}


def test_a_cpu_has_a_peak_only_when_it_is_given() -> None:
    topology = replace(ONE_RANK, world_size=2, dp_size=2)
    unknown = read_hardware(topology, dtype="float32", configured_peak=None)
    given = read_hardware(topology, dtype="float32", configured_peak=5e10)
    assert unknown == Hardware(num_ranks=2, peak_flops=None)
    assert given == Hardware(num_ranks=2, peak_flops=5e10)


def test_balance_is_the_slowest_rank_over_the_mean() -> None:
    metrics = balance_metrics(np.array([1.0, 1.0, 2.0, 1.0]))
    assert metrics == {
        "balance/compute_seconds_max_over_mean": 2.0 / 1.25,
        "balance/slowest_rank": 2.0,
    }


def test_memory_names_the_rank_that_needed_most() -> None:
    peaks_WK = np.array([[7.0, 10.0, 0.0], [9.0, 4.0, 0.0]])
    assert memory_metrics(peaks_WK, ("rss", "allocated", "reserved")) == {
        "memory/peak_rss_bytes": 9.0,
        "memory/peak_rss_rank": 1.0,
        "memory/peak_allocated_bytes": 10.0,
        "memory/peak_allocated_rank": 0.0,
    }


def test_host_memory_counts_what_was_touched() -> None:
    before = read_peaks(torch.device("cpu"))
    block = np.ones(before.rss // 8 + 8_000_000)  # larger than all that was resident so far
    after = read_peaks(torch.device("cpu"))
    assert block.nbytes <= after.rss <= before.rss + block.nbytes + 2**24
    assert (after.allocated, after.device) == (0, after.rss)
