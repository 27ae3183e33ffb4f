"""``python -m bench.report``: from the JSON of all runs to the tables and the plot of the README.

Rewrites what stands between the markers in ``kernels/README.md``, and beside the JSON one table
file and one plot per device. Without a record the README says that nothing is measured yet, and
nothing else.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.cases import Case
from bench.environment import slug
from bench.implementation import Pass
from bench.measure import percentile
from bench.plot import draw
from bench.records import FAILED, OK, CellRecord, Measurement, read_records
from bench.results import DeviceResults, Line, by_device, find_line
from bench.targets import (
    SPARSE_FRACTION,
    TARGETS,
    Outcome,
    Target,
    outcome,
    packed_speedup,
    training_modes,
)

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
NOT_MEASURED = "not yet measured"

_FOLDER = Path(__file__).parent
README = _FOLDER.parent / "README.md"
RESULTS = _FOLDER / "results"

_HEADLINE_SHAPE = "4096/151936"
_HEADLINE_FRACTIONS = (SPARSE_FRACTION, 1.0)

_COLUMNS = (
    "implementation",
    "rows",
    "forward ms (p10-p90)",
    "of GEMM",
    "forward+backward ms (p10-p90)",
    "of GEMMs",
    "useful TFLOP/s",
    "extra GB",
    "logprob error",
    "dH error",
    "dW error",
    "compile+tune s",
    "n",
)

_NOTES = (
    "Rows: *active* are the rows that carry loss, packed; *all* is the whole batch, of which the "
    "implementation is told what to leave out. The difference is the gain of compaction.",
    "Times are medians of CUDA events around one call, everybody in turns, L2 flushed before each; "
    "forward is without gradients. *Of GEMMs* is the time of the bare cuBLAS products on the "
    "active rows, measured in the same turns, over this one's.",
    "Extra memory is the peak of a step (of a forward pass, where there is no step) without inputs "
    "and without the gradients it returns. With *main-grad* the weight's gradient is added to a "
    "float32 buffer that exists before, as in Megatron; the buffer is that gradient.",
    "Errors are against float64 on the same inputs: the largest of a logprob in nats, and the "
    "relative Frobenius norm of the gradients. (!) marks what rounding does not explain.",
    "Compile+tune is the first call's wall time less one median. *n* is the number of samples; "
    "slow entrants get fewer. (a) marks samples in which memory had to be asked of the driver.",
    "A vocabulary of 16032 is one of eight shards of 128256, computed as if it were the whole; the "
    "communication of tensor parallelism is not measured.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write tables, plots and the README's section; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--readme", type=Path, default=README, help="file with the markers")
    options = parser.parse_args(arguments)
    console = Console()
    devices = by_device(read_records(options.results))
    for results in devices:
        stem = options.results / f"head_{slug(results.device)}"
        draw(results, headline_cases(results), stem.with_suffix(".png"))
        stem.with_suffix(".md").write_text(tables(results))
        console.print(f"{stem}.md, {stem}.png", highlight=False, soft_wrap=True)
        console.print(targets_text(results), highlight=False, markup=False, soft_wrap=True)
    text = section(devices, options.results, options.readme.parent)
    options.readme.write_text(replace_between_markers(options.readme.read_text(), text))
    console.print(f"{options.readme}: {len(devices)} devices", highlight=False, soft_wrap=True)
    return 0


def replace_between_markers(document: str, text: str) -> str:
    """Return a document with the text between its markers replaced.

    Raises:
        ValueError: if the markers are not there once each, in order.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(
            f"the document must contain {BEGIN} and {END} once each, in this order; add them where "
            "the measurements belong"
        )
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{after}"


def section(devices: Sequence[DeviceResults], results_folder: Path, readme_folder: Path) -> str:
    """Return the README's section on all devices."""
    if not devices:
        return NOT_MEASURED
    parts: list[str] = []
    for results in devices:
        stem = f"head_{slug(results.device)}"
        link = (results_folder / stem).relative_to(readme_folder, walk_up=True).as_posix()
        parts += [
            f"### {results.device}",
            provenance(results),
            "#### Targets (stated for an H100)",
            targets_text(results),
            f"![Time and extra memory by implementation]({link}.png)",
            *(summary_table(results, case) for case in headline_cases(results)),
            f"All {len(results.cases)} cases: [{link}.md]({link}.md).",
        ]
    parts.append("\n".join(f"* {note}" for note in _NOTES))
    return "\n\n".join(parts)


def tables(results: DeviceResults) -> str:
    """Return the file with every case of a device."""
    parts = [
        f"# Head: {results.device}",
        "Made by `python -m bench.report` from the JSON beside it.",
        provenance(results),
        "## Targets (stated for an H100)",
        targets_text(results),
        *(case_table(results, case) for case in results.cases),
        "\n".join(f"* {note}" for note in _NOTES),
    ]
    return "\n\n".join(parts) + "\n"


def headline_cases(results: DeviceResults) -> list[Case]:
    """Return the cases that the README shows: one shape, the most tokens, sparse and dense."""
    cases = [case for case in results.cases if case.mask == "contiguous"]
    cases = [case for case in cases if case.shape == _HEADLINE_SHAPE] or cases
    found = []
    for fraction in _HEADLINE_FRACTIONS:
        matching = [case for case in cases if case.active_fraction == fraction]
        if matching:
            found.append(max(matching, key=lambda case: case.num_tokens))
    return found


def provenance(results: DeviceResults) -> str:
    """Return where, when and with what the runs were made, one line each."""
    lines = []
    for record in results.records:
        environment = record.environment
        versions = ", ".join(
            f"{name} {version or 'not installed'}" for name, version in environment.packages.items()
        )
        commit = (environment.git_commit or "unknown commit")[:12]
        changes = " with local changes" if environment.has_local_changes else ""
        left_out = f"; not reached: {'; '.join(record.not_reached)}" if record.not_reached else ""
        lines.append(
            f"* {record.started}: {len(record.cells)} cases, commit {commit}{changes}, driver "
            f"{environment.driver or 'unknown'}, CUDA {environment.cuda}, {versions}"
            f"{_clocks(record.cells)}{left_out}"
        )
    return "\n".join(lines)


def targets_text(results: DeviceResults) -> str:
    """Return the verdict on every target, then every mode of ours against each."""
    modes = training_modes(results)
    outcomes = {
        target.title: [outcome(target, mode, results) for mode in modes] for target in TARGETS
    }
    lines = [_verdict(target, outcomes[target.title]) for target in TARGETS]
    lines += ["", _row(("mode", *(target.title for target in TARGETS)))]
    lines.append(_row(("---",) + ("---:",) * len(TARGETS)))
    for index, mode in enumerate(modes):
        values = []
        for target in TARGETS:
            text = _outcome(target, outcomes[target.title][index])
            if target is TARGETS[2] and (packed := packed_speedup(mode, results)) is not None:
                text += f" (packed rows: {packed:.2f}x)"
            values.append(text)
        lines.append(_row((f"`{mode}`", *values)))
    return "\n".join(lines)


def case_table(results: DeviceResults, case: Case) -> str:
    """Return one case as a table, ours and peers in the order in which they were measured."""
    lines = [f"**{case.name}** ({case.num_active} active rows)", "", _row(_COLUMNS)]
    lines.append(_row(("---", "---") + ("---:",) * (len(_COLUMNS) - 2)))
    lines += [_row(line_cells(line)) for line in results.latest(case)]
    return "\n".join((*lines, *_failures(results, case)))


def summary_table(results: DeviceResults, case: Case) -> str:
    """Return one case as the README shows it: one line per implementation, fewer columns."""
    lines = results.latest(case)
    head = ["implementation"]
    for rows in case.row_sets:
        given = f", {rows} rows" if len(case.row_sets) > 1 else ""
        head += [f"forward ms{given}", f"forward+backward ms{given}", "of GEMMs", "extra GB"]
    head += ["logprob error", "dH error", "dW error"]
    text = [f"**{case.name}** ({case.num_active} active rows)", "", _row(head)]
    text.append(_row(("---", *("---:",) * (len(head) - 1))))
    for name in dict.fromkeys(line.implementation for line in lines):
        cells = [f"`{name}`"]
        for rows in case.row_sets:
            line = find_line(lines, name, rows)
            cells += [""] * 4 if line is None else _summary_cells(line)
        line = find_line(lines, name, "active")
        cells += [""] * 3 if line is None else _errors(_main_pass(line))
        text.append(_row(cells))
    return "\n".join((*text, *_failures(results, case)))


def _summary_cells(line: Line) -> list[str]:
    """Return four cells for one set of rows; the last two of the step, else of the forward pass."""
    item = _main_pass(line)
    is_ok = item is not None and item.status == OK
    return [
        _time(line, "forward"),
        _time(line, "forward_backward"),
        "" if item is None else _percent(line.ceiling_fraction(item.pass_)),
        _gigabytes(item.peak_extra_bytes) if item is not None and is_ok else "",
    ]


def _main_pass(line: Line) -> Measurement | None:
    """Return the training step, or the forward pass of what has no step."""
    return line.passes.get("forward_backward") or line.passes.get("forward")


def _failures(results: DeviceResults, case: Case) -> list[str]:
    """Return what those said that failed for another reason than memory, one line each."""
    said = {
        f"`{item.implementation}` failed: {item.detail}": None
        for line in results.latest(case)
        for item in line.passes.values()
        if item.status == FAILED
    }
    return ["", *(f"* {text}" for text in said)] if said else []


def line_cells(line: Line) -> list[str]:
    """Return the cells of one line of a case's table."""
    item = _main_pass(line)
    best = item if item is not None and item.status == OK else None
    return [
        f"`{line.implementation}`",
        line.rows,
        _time(line, "forward"),
        _percent(line.ceiling_fraction("forward")),
        _time(line, "forward_backward"),
        _percent(line.ceiling_fraction("forward_backward")),
        _tflops(line),
        "" if best is None else _gigabytes(best.peak_extra_bytes),
        *_errors(item),
        "" if best is None else _compile_seconds(best),
        "" if best is None else _count(best),
    ]


def _clocks(cells: Sequence[CellRecord]) -> str:
    """Return what the device said of itself under load; nothing where it could not be read."""
    readings = [reading for cell in cells for reading in cell.telemetry]
    clocks = [item.sm_clock_mhz for item in readings if item.sm_clock_mhz is not None]
    powers = [item.power_watts for item in readings if item.power_watts is not None]
    text = ""
    if clocks:
        text += f", SM clock {min(clocks):.0f}-{max(clocks):.0f} MHz"
    if powers:
        text += f", power {min(powers):.0f}-{max(powers):.0f} W"
    return text


def _time(line: Line, pass_: Pass) -> str:
    """Return median and spread, or why there is none."""
    item = line.passes.get(pass_)
    if item is None:
        return ""
    if item.status != OK:
        return item.status
    low, middle, high = (line.quantile_ms(pass_, fraction) for fraction in (0.1, 0.5, 0.9))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _tflops(line: Line) -> str:
    """Return the useful rate of the training step, or of the forward pass where there is none."""
    for pass_ in ("forward_backward", "forward"):
        rate = line.useful_tflops(pass_)
        if rate is not None:
            return f"{rate:.0f}"
    return ""


def _errors(item: Measurement | None) -> list[str]:
    """Return three errors; marked where they are too large."""
    cells = []
    for name in ("logprob_max_abs", "hidden_relative", "weight_relative"):
        error = None if item is None else getattr(item.errors, name)
        mark = " (!)" if item is not None and name in item.exceeded_bounds else ""
        cells.append("" if error is None else f"{error:.1e}{mark}")
    return cells


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"


def _gigabytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.2f}"


def _compile_seconds(item: Measurement) -> str:
    """Return the first call's time less one that is warm."""
    if item.first_call_seconds is None:
        return ""
    warm_seconds = percentile(item.samples_ms, 0.5) / 1e3
    return f"{max(0.0, item.first_call_seconds - warm_seconds):.1f}"


def _count(item: Measurement) -> str:
    return f"{len(item.samples_ms)}{' (a)' if item.num_device_allocations else ''}"


def _verdict(target: Target, outcomes: Sequence[Outcome]) -> str:
    """Return one line: the target, and which of our modes meet it."""
    measured = [item for item in outcomes if item.worst is not None]
    if not measured:
        return f"* {target.statement}: **not yet measured**"
    meeting = [item for item in measured if item.is_met]
    if meeting:
        names = ", ".join(f"`{item.implementation}`" for item in meeting)
        return f"* {target.statement}: **met** by {names}"
    sign = 1.0 if target.is_minimum else -1.0
    worst, best = max((sign * (item.worst or 0.0), item.implementation) for item in measured)
    return f"* {target.statement}: **not met**; best is `{best}` with {_show(target, sign * worst)}"


def _outcome(target: Target, item: Outcome) -> str:
    """Return one mode's worst value and verdict."""
    if item.worst is None:
        return NOT_MEASURED
    cases = f"{item.num_cases} case{'' if item.num_cases == 1 else 's'}"
    verdict = "met" if item.is_met else "not met"
    return f"{_show(target, item.worst)}, {verdict}, worst of {cases}"


def _show(target: Target, value: float) -> str:
    """Return a value for a reader; those of a case that could not run are 0 and infinity."""
    has_failed = value == (0.0 if target.is_minimum else float("inf"))
    return "could not run" if has_failed else target.show(value)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"bench.report: {error}")
