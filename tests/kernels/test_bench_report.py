"""The report of the benchmark: tables, verdicts and merging, from records made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from bench.cases import Case, Rows, quick_sweep
from bench.implementation import Errors, Family, Pass
from bench.measure import Telemetry
from bench.records import CellRecord, Measurement, RunRecord, Status, read_records, write_record
from bench.report import (
    BEGIN,
    END,
    case_table,
    main,
    replace_between_markers,
    section,
    targets_text,
)
from bench.results import DeviceResults, by_device, lines_of
from bench.targets import TARGETS, outcome

from tests.support.bench_fakes import ENVIRONMENT

README = Path(__file__).parents[2] / "kernels" / "README.md"
RESULTS = Path(__file__).parents[2] / "kernels" / "bench" / "results"

DENSE = Case(
    hidden_size=4096, vocab_size=151936, num_tokens=32768, active_fraction=1.0, mask="contiguous"
)
SPARSE = replace(DENSE, active_fraction=0.2)


def measured(
    implementation: str,
    family: Family,
    samples_ms: Sequence[float],
    *,
    rows: Rows = "active",
    pass_: Pass = "forward_backward",
    status: Status = "ok",
    extra_bytes: int = 0,
) -> Measurement:
    return Measurement(
        implementation=implementation,
        family=family,
        rows=rows,
        pass_=pass_,
        version=None,
        status=status,
        samples_ms=tuple(samples_ms),
        first_call_seconds=3.25 if samples_ms else None,
        peak_bytes=extra_bytes + 1000 if samples_ms else None,
        gradient_bytes=1000 if samples_ms else None,
        errors=Errors(logprob_max_abs=1e-4, hidden_relative=2e-3, weight_relative=0.04)
        if samples_ms and family != "ceiling"
        else Errors(),
        exceeded_bounds=("weight_relative",) if samples_ms and family == "ours" else (),
    )


DENSE_CELL = CellRecord(
    case=DENSE,
    measurements=(
        measured("gemms", "ceiling", [50.0], pass_="forward"),
        measured("gemms", "ceiling", [150.0, 160.0, 170.0]),
        measured("ours-a", "ours", [200.0, 190.0, 210.0], extra_bytes=1_400_000_000),
        measured("ours-b", "ours", [180.0], extra_bytes=11_000_000_000),
        measured("liger", "peer", [100.0], pass_="forward"),
        measured("liger", "peer", [400.0], extra_bytes=2_500_000_000),
        measured("cce", "peer", [190.0]),
        measured("torch-eager", "peer", [], status="OOM"),
        measured("quack", "peer", [], status="not installed"),
    ),
    telemetry=(
        Telemetry(sm_clock_mhz=1500.0, power_watts=690.4, temperature_celsius=60.0),
        Telemetry(sm_clock_mhz=1755.0, power_watts=None, temperature_celsius=None),
    ),
)

SPARSE_CELL = CellRecord(
    case=SPARSE,
    measurements=(
        measured("gemms", "ceiling", [32.0]),
        measured("ours-a", "ours", [40.0]),
        measured("ours-b", "ours", [35.0]),
        measured("liger", "peer", [80.0]),
        measured("cce", "peer", [60.0]),
        measured("ours-a", "ours", [44.0], rows="all", extra_bytes=1_450_000_000),
        measured("ours-b", "ours", [], rows="all", status="OOM"),
        measured("liger", "peer", [400.0], rows="all"),
        measured("cce", "peer", [220.0], rows="all"),
    ),
    telemetry=(),
)


def run(*cells: CellRecord, started: str = "2026-01-02T030405Z") -> RunRecord:
    return RunRecord(
        op="head",
        started=started,
        command=(),
        environment=ENVIRONMENT,
        settings={},
        cells=cells,
    )


def results(*records: RunRecord) -> DeviceResults:
    (found,) = by_device(records)
    return found


def test_fractions_and_rates_by_hand() -> None:
    lines = {line.implementation: line for line in lines_of(SPARSE_CELL) if line.rows == "active"}
    line = lines["ours-a"]
    assert line.ceiling_fraction("forward_backward") == 32.0 / 40.0
    assert line.ceiling_fraction("forward") is None
    # 6 x 6554 rows x 4096 x 151936 FLOPs in 40 ms
    assert line.useful_tflops("forward_backward") == pytest.approx(611.81, abs=0.01)
    whole = [line for line in lines_of(SPARSE_CELL) if line.rows == "all"]
    # the floor of a whole batch is that of its active rows
    assert whole[0].ceiling_fraction("forward_backward") == 32.0 / 44.0


def test_the_table_of_a_case_line_by_line() -> None:
    lines = case_table(results(run(DENSE_CELL)), DENSE).splitlines()
    assert lines[0] == "**4096/151936, T = 32768, active 1** (32768 active rows)"
    assert lines[4:] == [
        "| `gemms` | active | 50.00 (50.00-50.00) | 100.0% | 160.00 (152.00-168.00) | 100.0% "
        "| 765 |  |  |  |  | 3.1 | 3 |",
        "| `ours-a` | active |  |  | 200.00 (192.00-208.00) | 80.0% | 612 | 1.40 | 1.0e-04 "
        "| 2.0e-03 | 4.0e-02 (!) | 3.0 | 3 |",
        "| `ours-b` | active |  |  | 180.00 (180.00-180.00) | 88.9% | 680 | 11.00 | 1.0e-04 "
        "| 2.0e-03 | 4.0e-02 (!) | 3.1 | 1 |",
        "| `liger` | active | 100.00 (100.00-100.00) | 50.0% | 400.00 (400.00-400.00) | 40.0% "
        "| 306 | 2.50 | 1.0e-04 | 2.0e-03 | 4.0e-02 | 2.9 | 1 |",
        "| `cce` | active |  |  | 190.00 (190.00-190.00) | 84.2% | 644 | 0.00 | 1.0e-04 "
        "| 2.0e-03 | 4.0e-02 | 3.1 | 1 |",
        "| `torch-eager` | active |  |  | OOM |  |  |  |  |  |  |  |  |",
        "| `quack` | active |  |  | not installed |  |  |  |  |  |  |  |  |",
    ]


def test_the_verdict_on_every_target() -> None:
    assert targets_text(results(run(DENSE_CELL, SPARSE_CELL))).splitlines() == [
        "* forward+backward reaches at least 85% of the three bare GEMMs on the active rows: "
        "**met** by `ours-b`",
        "* at fraction 1.0 it is at least as fast as the fastest peer: **met** by `ours-b`",
        "* at fraction 0.2 it is at least 4 times as fast as any peer that is given the whole "
        "batch: **met** by `ours-a`",
        "* extra memory of at most 1.5 GB at T = 32768 and V = 151936: **met** by `ours-a`",
        "",
        "| mode | of the bare GEMMs | against the fastest peer, all rows active "
        "| against the fastest peer, whole batch at fraction 0.2 | extra memory |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| `ours-a` | 80.0%, not met, worst of 2 cases | 0.95x, not met, worst of 1 case "
        "| 5.00x, met, worst of 1 case (packed rows: 1.50x) | 1.45 GB, met, worst of 2 cases |",
        "| `ours-b` | 88.9%, met, worst of 2 cases | 1.06x, met, worst of 1 case "
        "| could not run, not met, worst of 1 case (packed rows: 1.71x) "
        "| could not run, not met, worst of 2 cases |",
    ]


def test_a_target_that_nobody_meets_names_the_best() -> None:
    slow = replace(
        DENSE_CELL, measurements=(*DENSE_CELL.measurements[:3], *DENSE_CELL.measurements[4:])
    )
    lines = targets_text(results(run(slow))).splitlines()
    assert lines[0].endswith("on the active rows: **not met**; best is `ours-a` with 80.0%")
    assert lines[2].endswith("whole batch: **not yet measured**")


def test_quick_cases_decide_every_target() -> None:
    families: dict[str, Family] = {"gemms": "ceiling", "ours-a": "ours", "cce": "peer"}
    cells = [
        CellRecord(
            case=case,
            measurements=tuple(
                measured(name, family, [1.0], rows=rows)
                for rows in case.row_sets
                for name, family in families.items()
            ),
            telemetry=(),
        )
        for case in quick_sweep()
    ]
    found = [outcome(target, "ours-a", results(run(*cells))) for target in TARGETS]
    assert [item.num_cases for item in found] == [4, 2, 2, 2]


def test_the_latest_run_wins_and_only_lines_of_one_run_are_compared() -> None:
    later = replace(
        DENSE_CELL,
        measurements=(
            measured("gemms", "ceiling", [100.0]),
            measured("cce", "peer", [100.0]),
            measured("new", "peer", [10.0]),
        ),
    )
    merged = results(run(later, started="2026-02-01T000000Z"), run(DENSE_CELL))
    times = {line.implementation: line for line in merged.latest(DENSE)}
    assert times["cce"].median_ms("forward_backward") == 100.0
    assert times["cce"].ceiling_fraction("forward_backward") == 1.0
    assert times["ours-b"].ceiling_fraction("forward_backward") == pytest.approx(160.0 / 180.0)
    # The later run has no time of ours: its faster peers are of another hour.
    assert outcome(TARGETS[1], "ours-b", merged).worst == pytest.approx(190.0 / 180.0)


def test_a_target_is_decided_by_the_latest_run_alone() -> None:
    faster = replace(
        DENSE_CELL,
        measurements=(
            measured("gemms", "ceiling", [160.0]),
            measured("ours-b", "ours", [170.0]),
        ),
    )
    merged = results(run(DENSE_CELL), run(faster, started="2026-02-01T000000Z"))
    found = outcome(TARGETS[0], "ours-b", merged)
    assert (found.worst, found.num_cases) == (160.0 / 170.0, 1)


def test_runs_on_different_devices_are_never_mixed() -> None:
    other = replace(run(DENSE_CELL), environment=replace(ENVIRONMENT, device="NVIDIA H200"))
    found = by_device([run(DENSE_CELL), other])
    assert [item.device for item in found] == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    assert [len(item.records) for item in found] == [1, 1]


def readme(folder: Path) -> Path:
    path = folder / "README.md"
    path.write_text(f"# before\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def test_without_a_record_the_readme_says_not_yet_measured_and_nothing_else(
    tmp_path: Path,
) -> None:
    path = readme(tmp_path)
    assert main(["--results", str(tmp_path / "none"), "--readme", str(path)]) == 0
    assert path.read_text() == f"# before\n{BEGIN}\nnot yet measured\n{END}\nafter\n"
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_the_report_writes_readme_tables_and_plot_and_is_idempotent(tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results"
    write_record(run(DENSE_CELL, SPARSE_CELL), folder)
    path = readme(tmp_path)
    arguments = ["--results", str(folder), "--readme", str(path)]
    assert main(arguments) == 0
    text = path.read_text()
    assert text.startswith(f"# before\n{BEGIN}\n### NVIDIA H100 80GB HBM3\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "(bench/results/head_nvidia-h100-80gb-hbm3.png)" in text
    assert "commit 0123456789ab, driver 580.1, CUDA 13.0, torch 2.11.0" in text
    assert "quack-kernels not installed, SM clock 1500-1755 MHz, power 690-690 W" in text
    assert (
        "| `ours-a` |  | 40.00 (40.00-40.00) | 80.0% | 0.00 |  | 44.00 (44.00-44.00) | 72.7% "
        "| 1.45 | 1.0e-04 | 2.0e-03 | 4.0e-02 (!) |"
    ) in text
    plot = folder / "head_nvidia-h100-80gb-hbm3.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    tables = plot.with_suffix(".md").read_text()
    assert case_table(results(*read_records(folder)), SPARSE) in tables
    main(arguments)
    assert path.read_text() == text


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        replace_between_markers("nothing here", "text")
    with pytest.raises(ValueError, match="once each"):
        replace_between_markers(f"{BEGIN}{END}{BEGIN}{END}", "text")


def test_the_readme_in_the_repository_is_what_its_records_make() -> None:
    text = section(by_device(read_records(RESULTS)), RESULTS, README.parent)
    assert replace_between_markers(README.read_text(), text) == README.read_text()
