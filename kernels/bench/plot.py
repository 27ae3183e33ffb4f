"""The picture: time and extra memory of a training step, ours and peers, against the bare GEMMs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from bench.cases import Case, Rows
from bench.records import OK
from bench.results import DeviceResults, Line, find_line

_STEP = "forward_backward"
_COLORS: dict[tuple[str, Rows], str] = {
    ("ours", "active"): "#1f6f5c",
    ("ours", "all"): "#8cc9b7",
    ("peer", "active"): "#a14a3b",
    ("peer", "all"): "#e0a99c",
}
_LABELS = {
    ("ours", "active"): "ours, packed active rows",
    ("ours", "all"): "ours, whole batch",
    ("peer", "active"): "peer, packed active rows",
    ("peer", "all"): "peer, whole batch",
}
_INK = "#4a5361"
_GRID = "#e1e5eb"
_BAR = 0.38
_INCHES_PER_NAME = 0.3
_MIN_GIGABYTES = 0.01


def draw(results: DeviceResults, cases: Sequence[Case], path: Path) -> Path:
    """Write one row of two panels per case as PNG, and return the path."""
    names = [_training_names(results.latest(case)) for case in cases]
    heights = [_INCHES_PER_NAME * max(1, len(found)) + 1.0 for found in names]
    figure = Figure(
        figsize=(13.5, max(2.0, sum(heights))),
        layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08),
    )
    FigureCanvasAgg(figure)
    if cases:
        axes = figure.subplots(len(cases), 2, squeeze=False, height_ratios=heights)
        for row, (case, found) in enumerate(zip(cases, names, strict=True)):
            _time_panel(axes[row][0], results.latest(case), found, case)
            _memory_panel(axes[row][1], results.latest(case), found)
    handles = [Patch(color=_COLORS[key], label=_LABELS[key]) for key in _COLORS]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Head, forward+backward, {results.device}", color=_INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, facecolor="white")
    return path


def _training_names(lines: Sequence[Line]) -> list[str]:
    """Return who took a training step, in the order of the run."""
    found = [line for line in lines if line.family != "ceiling" and _STEP in line.passes]
    return list(dict.fromkeys(line.implementation for line in found))


def _time_panel(axes: Axes, lines: Sequence[Line], names: Sequence[str], case: Case) -> None:
    """Draw medians with the span from p10 to p90, and the bare products as a line."""
    _frame(axes, names, f"{case.name}: milliseconds")
    for position, line in _bars(lines, names, case):
        low, middle, high = (line.quantile_ms(_STEP, fraction) for fraction in (0.1, 0.5, 0.9))
        if low is None or middle is None or high is None:
            axes.text(0, position, f" {line.passes[_STEP].status}", va="center", color=_INK, size=7)
            continue
        axes.barh(
            position,
            middle,
            _BAR,
            color=_COLORS[line.family, line.rows],
            xerr=[[middle - low], [high - middle]],
            error_kw={"ecolor": _INK, "elinewidth": 0.8},
        )
    ceilings = [line.ceiling_ms[_STEP] for line in lines if _STEP in line.ceiling_ms]
    if ceilings:
        axes.axvline(ceilings[0], color=_INK, linewidth=1.0, linestyle="--")
        axes.annotate(
            "bare GEMMs",
            (ceilings[0], 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -8),
            textcoords="offset points",
            color=_INK,
            size=7,
        )


def _memory_panel(axes: Axes, lines: Sequence[Line], names: Sequence[str]) -> None:
    """Draw the peak of extra memory."""
    _frame(axes, names, "extra memory, GB")
    axes.set_yticklabels([])
    axes.set_xscale("log")
    largest = _MIN_GIGABYTES
    for position, line in _bars(lines, names, lines[0].case):
        measurement = line.passes[_STEP]
        extra = measurement.peak_extra_bytes
        if measurement.status != OK or extra is None:
            axes.text(
                0.01,
                position,
                measurement.status,
                va="center",
                color=_INK,
                size=7,
                transform=axes.get_yaxis_transform(),
            )
            continue
        axes.barh(position, extra / 1e9, _BAR, color=_COLORS[line.family, line.rows])
        largest = max(largest, extra / 1e9)
    axes.set_xlim(_MIN_GIGABYTES, 2 * largest)


def _bars(lines: Sequence[Line], names: Sequence[str], case: Case) -> list[tuple[float, Line]]:
    """Return where each line's bar stands: sets of rows one below the other at its name."""
    found = []
    for index, name in enumerate(names):
        for offset, rows in enumerate(case.row_sets):
            line = find_line(lines, name, rows)
            if line is not None and _STEP in line.passes:
                middle = (len(case.row_sets) - 1) / 2
                found.append((index + (offset - middle) * _BAR, line))
    return found


def _frame(axes: Axes, names: Sequence[str], title: str) -> None:
    """Name the rows from top to bottom and draw a quiet grid."""
    axes.set_title(title, color=_INK, size=9, loc="left")
    axes.set_yticks(range(len(names)), names, size=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(which="both", colors=_INK, labelsize=7)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
