"""The benchmark of the head: arithmetic, data, turns, failures and records, all without a GPU."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import head
from bench.cell import Settings, measure_case
from bench.gemms import CEILING
from bench.implementation import NotInstalledError, Outputs
from bench.measure import CudaDevice, affordable, has_turn, percentile
from bench.ours import ours
from bench.peers import load, peers
from bench.records import RunRecord, read_record, write_record
from rich.console import Console

from tests.support.bench_fakes import (
    ENVIRONMENT,
    FakeDevice,
    Silent,
    logged,
    small_case,
    wrong_head,
)

KERNELS = Path(__file__).parents[2] / "kernels"
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115  (for the life of the process)


def test_percentiles_are_linear_between_neighbours() -> None:
    samples = [4.0, 1.0, 3.0, 2.0]
    assert percentile(samples, 0.5) == 2.5
    assert percentile(samples, 0.1) == pytest.approx(1.3)
    assert percentile(samples, 0.9) == pytest.approx(3.7)
    assert percentile([7.0], 0.9) == 7.0
    with pytest.raises(ValueError, match="0 samples"):
        percentile([], 0.5)


def test_slow_entrants_get_fewer_turns_spread_over_all_rounds() -> None:
    assert affordable(10.0, 1.0, at_least=3, at_most=30) == 30
    assert affordable(100.0, 1.0, at_least=3, at_most=30) == 10
    assert affordable(2000.0, 1.0, at_least=3, at_most=30) == 3
    assert [index for index in range(10) if has_turn(index, 10, 3)] == [3, 6, 9]
    assert all(has_turn(index, 10, 10) for index in range(10))


def test_everybody_takes_turns_in_the_order_a_b_c() -> None:
    log: list[str] = []
    implementations = [logged(name, log) for name in "ABC"]
    settings = Settings(repetitions=4, warmups=2, budget_seconds=1.0)
    measure_case(small_case(1.0), implementations, FakeDevice(), settings, Silent())
    assert log == ["A"] * 3 + ["B"] * 3 + ["C"] * 3 + ["A", "B", "C"] * 6


def test_a_slow_entrant_has_fewer_samples_and_the_record_says_so() -> None:
    log: list[str] = []
    device = FakeDevice(lambda: 400.0 if log[-1] == "slow" else 2.0)
    settings = Settings(repetitions=10, warmups=5, budget_seconds=2.0)
    entrants = [logged("slow", log), logged("fast", log)]
    cell = measure_case(small_case(1.0), entrants, device, settings, Silent())
    slow, fast = cell.measurements
    assert (slow.samples_ms, slow.num_warmups) == ((400.0,) * 5, 1)
    assert (fast.samples_ms, fast.num_warmups) == ((2.0,) * 10, 5)
    assert len(cell.telemetry) == 10
    assert slow.first_call_seconds == 2.0


def test_lack_of_memory_missing_packages_and_errors_stop_nobody_else() -> None:
    log: list[str] = []
    late = RuntimeError("CUDA error: out of memory")
    wrapped = RuntimeError("backend failed")
    wrapped.__cause__ = torch.OutOfMemoryError("tried to allocate")
    entrants = [
        logged("fits", log),
        logged("large", log, failure=torch.OutOfMemoryError("tried to allocate")),
        logged("late", log, failure=late, at_call=10),  # in the third of four timed rounds
        logged("wrapped", log, failure=wrapped),
        logged("missing", log, failure=NotInstalledError("quack is not installed")),
        logged("broken", log, failure=ZeroDivisionError("a | b\nmore")),
    ]
    device = FakeDevice()
    cell = measure_case(small_case(1.0), entrants, device, Settings(repetitions=4), Silent())
    found = {item.implementation: (item.status, item.detail) for item in cell.measurements}
    assert found == {
        "fits": ("ok", ""),
        "large": ("OOM", "OutOfMemoryError: tried to allocate"),
        "late": ("OOM", "RuntimeError: CUDA error: out of memory"),
        "wrapped": ("OOM", "RuntimeError: backend failed"),
        "missing": ("not installed", "NotInstalledError: quack is not installed"),
        "broken": ("failed", "ZeroDivisionError: a | b"),
    }
    assert [len(item.samples_ms) for item in cell.measurements] == [4, 0, 0, 0, 0, 0]
    assert device.num_recoveries == 6  # after the truth, and after every failure


def test_a_missing_package_is_told_from_one_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotInstalledError, match="no_such_peer is not installed"):
        load("no_such_peer.losses")
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        load("half_installed")


def test_both_sets_of_rows_are_measured_unless_all_rows_are_active() -> None:
    entrants = [CEILING, logged("A", [])]
    for fraction, expected in ((0.5, ["active", "active", "active", "all", "all", "all"]),):
        cell = measure_case(
            small_case(fraction), entrants, FakeDevice(), Settings(repetitions=3), Silent()
        )
        assert [item.rows for item in cell.measurements] == expected
    cell = measure_case(small_case(1.0), entrants, FakeDevice(), Settings(repetitions=3), Silent())
    assert {item.rows for item in cell.measurements} == {"active"}


def test_extra_memory_is_the_peak_without_the_gradients_that_were_allocated() -> None:
    hidden_RH, weight_VH = torch.zeros(3, 4).bfloat16(), torch.zeros(5, 4)
    outputs = Outputs(loss=None, grad_hidden_RH=hidden_RH, grad_weight_VH=weight_VH)
    assert outputs.allocated_bytes == 3 * 4 * 2 + 5 * 4 * 4
    assert replace(outputs, is_added_in_place=True).allocated_bytes == 3 * 4 * 2
    cell = measure_case(
        small_case(1.0), [logged("A", [])], FakeDevice(), Settings(repetitions=3), Silent()
    )
    gradients = (24 + 40) * 16 * 2
    assert cell.measurements[0].peak_extra_bytes == 10_000 - gradients


def test_patterns_choose_peers_and_ours_but_never_leave_out_the_ceiling() -> None:
    everybody = head.all_implementations()
    names = [item.name for item in head.choose(everybody, ["ours-auto-*"], ["cce*"])]
    assert names[:2] == ["gemms", "gemms-fp32-logits"]
    assert {"ours-auto-fp32", "ours-auto-bf16", "cce", "cce-exact"} <= set(names)
    assert not {"ours-recompute-fp32", "liger"} & set(names)
    assert head.choose(everybody, ["*"], []) == [x for x in everybody if x.family != "peer"]
    with pytest.raises(ValueError, match="'liger-xx' matches none of"):
        head.choose(everybody, ["*"], ["liger-xx"])


def test_names_are_unique_and_everybody_has_bounds() -> None:
    everybody = [*ours(), *peers()]
    assert len({item.name for item in everybody}) == len(everybody)
    assert all(item.bounds(20.0).hidden_relative is not None for item in everybody)


def options(output: Path, **changes: object) -> Namespace:
    values: dict[str, object] = {
        "quick": False,
        "shapes": ["16/40"],
        "tokens": [24],
        "fractions": [0.5, 1.0],
        "masks": ["contiguous"],
        "repetitions": 3,
        "budget_seconds": None,
        "time_limit": float("inf"),
        "seed": 0,
        "output": output,
    }
    return Namespace(**{**values, **changes})


def test_a_run_writes_one_record_that_reads_back_equal(tmp_path: Path) -> None:
    entrants = [CEILING, logged("A", [])]
    assert head.measure(options(tmp_path), entrants, FakeDevice(), ENVIRONMENT, QUIET) == 0
    (path,) = tmp_path.iterdir()
    record = read_record(path)
    assert path.name == f"head_nvidia-h100-80gb-hbm3_{record.started}.json"
    assert [cell.case.active_fraction for cell in record.cells] == [0.5, 1.0]
    assert record.settings["repetitions"] == 3
    assert record.cells[0].measurements[0].samples_ms == (1.0, 1.0, 1.0)
    before = path.read_text()
    assert write_record(record, tmp_path) == path
    assert path.read_text() == before


def test_records_that_are_not_records_are_refused(tmp_path: Path) -> None:
    head.measure(options(tmp_path), [logged("A", [])], FakeDevice(), ENVIRONMENT, QUIET)
    (path,) = tmp_path.iterdir()
    value = json.loads(path.read_text())
    measurement = value["cells"][0]["measurements"][0]
    for change, message in (
        ({"samples_ms": []}, "ok with 0 samples"),
        ({"samples_ms": [0.0]}, "positive milliseconds"),
        ({"status": "skipped"}, "status must be one of"),
        ({"speed": 1}, "speed"),
    ):
        value["cells"][0]["measurements"][0] = {**measurement, **change}
        path.write_text(json.dumps(value))
        with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
            read_record(path)


def test_no_record_can_hold_times_of_a_cpu() -> None:
    with pytest.raises(ValueError, match="on a CPU only correctness is checked"):
        RunRecord(
            op="head",
            started="2026-01-01T000000Z",
            command=(),
            environment=replace(ENVIRONMENT, device_kind="cpu"),
            settings={},
            cells=(),
        )


def test_cases_beyond_the_time_limit_are_recorded_as_not_reached(tmp_path: Path) -> None:
    head.measure(
        options(tmp_path, time_limit=0.0), [logged("A", [])], FakeDevice(), ENVIRONMENT, QUIET
    )
    (path,) = tmp_path.iterdir()
    record = read_record(path)
    assert len(record.cells) == 1
    assert record.not_reached == ("16/40, T = 24, active 1",)


@pytest.mark.parametrize("family", ["ours", "peer"])
def test_a_wrong_result_on_a_device_fails_the_run_only_if_it_is_ours(
    tmp_path: Path, family: str
) -> None:
    wrong = replace(wrong_head(), family=family)
    status = head.measure(options(tmp_path), [wrong], FakeDevice(), ENVIRONMENT, QUIET)
    assert status == (1 if family == "ours" else 0)
    (path,) = tmp_path.iterdir()
    step = read_record(path).cells[0].measurements[1]
    assert step.exceeded_bounds == ("hidden_relative", "weight_relative")


def test_a_wrong_implementation_fails_the_check_on_the_cpu() -> None:
    right = next(item for item in peers() if item.name == "torch-eager")
    assert head.check([right], 0, QUIET) == 0
    assert head.check([right, wrong_head()], 0, QUIET) == 1


@pytest.fixture
def no_gpu() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def run_head(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bench.head", *arguments],
        cwd=KERNELS,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_on_a_cpu_prints_errors_and_writes_nothing(
    tmp_path: Path, no_gpu: dict[str, str]
) -> None:
    no_gpu.pop("TRITON_INTERPRET", None)
    arguments = ["--output", str(tmp_path), "--peers", "torch-eager", "quack"]
    done = run_head([*arguments, "--ours", "ours-auto-fp32", "ours-linear*"], no_gpu)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "torch-eager" in line]
    assert len(lines) == 2
    assert "ours-auto-fp32" in done.stdout
    assert "ours-linear-logprob-fp32" in done.stdout
    assert "nothing timed, nothing written" in done.stdout
    assert " ms" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_everything_that_runs_on_a_cpu_is_right(tmp_path: Path, no_gpu: dict[str, str]) -> None:
    done = run_head(["--output", str(tmp_path)], no_gpu)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_a_cuda_device_times_and_weighs_what_runs() -> None:
    device = CudaDevice()
    num_bytes, _ = device.peak_bytes(lambda: torch.empty(2**20, device=device.torch_device))
    assert num_bytes == 4 * 2**20
    factor = torch.randn(4096, 4096, device=device.torch_device)
    short = device.sample(lambda: factor @ factor)
    long = device.sample(lambda: [factor @ factor for _ in range(20)])
    assert long.milliseconds > 4 * short.milliseconds > 0.0
