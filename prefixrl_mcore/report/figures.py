"""The demo's picture, which the README shows: accuracy against FLOPs, and the unlock curve."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from prefixrl_mcore.report.headline import AccuracyPoint, accuracy_points, set_names
from prefixrl_mcore.report.reader import TRAIN_SET, EvaluationRecord, RunRecord, read_runs
from prefixrl_mcore.report.sections import set_title
from prefixrl_mcore.report.style import LIGHT_COLORS, RunStyle, run_styles

_MARKERS = {0: "o", 1: "s", 2: "D", 3: "^", 4: "v", 5: "P", 6: "X"}
_DASHES = ("-", "--", ":", "-.")
_INK = "#4a5361"
_GRID = "#e1e5eb"
_MIN_NAMED_SHARE = 0.17
"""Share of the x axis that the shaded stretch needs to hold its name."""
_Z95 = 1.96
"""Half-width of a 95 % normal interval in standard errors."""


def plot_headline(run_folders: Sequence[Path], out_png: Path) -> Path:
    """Write three panels as PNG and return the path.

    Accuracy without a prefix against total FLOPs on training problems and on the first held-out
    set (one scale; off-policy compute shaded), and the unlock curve before and after training.

    Args:
        run_folders: the runs.
        out_png: the picture; its folder is made when missing.

    Raises:
        ConfigError: if no folder is given, one is given twice, or one holds no run.
    """
    runs = read_runs(run_folders)
    styles = run_styles(runs)
    held_out = next((name for name in set_names(runs) if name != TRAIN_SET), None)
    figure = Figure(figsize=(13.5, 4.3), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    train_axes, held_out_axes, unlock_axes = figure.subplots(1, 3)
    held_out_axes.sharey(train_axes)
    _accuracy_panel(train_axes, runs, styles, TRAIN_SET)
    if held_out is None:
        _say(held_out_axes, "Held-out problems", "no held-out set was evaluated")
    else:
        _accuracy_panel(held_out_axes, runs, styles, held_out)
    train_axes.set_ylabel("accuracy without a prefix", color=_INK)
    train_axes.set_ylim(bottom=0.0)
    _unlock_panel(unlock_axes, runs, styles)
    _legend(figure, train_axes, unlock_axes)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png, dpi=160, facecolor="white")
    return out_png


def _accuracy_panel(
    axes: Axes, runs: Sequence[RunRecord], styles: Sequence[RunStyle], name: str
) -> None:
    """Draw accuracy against FLOPs of every run on one problem set."""
    _frame(axes, set_title(name), "total FLOPs")
    has_points = False
    for run, style in zip(runs, styles, strict=True):
        points = [(p.flops, p) for p in accuracy_points(run, name) if p.flops is not None]
        has_points = has_points or bool(points)
        offset = run.charged("collect") + run.charged("sft")
        if offset > 0.0:
            color = LIGHT_COLORS[style.slot]
            axes.axvspan(0.0, offset, color=color, alpha=0.07, linewidth=0)
            axes.axvline(offset, color=color, linewidth=1.0, linestyle=(0, (1, 2)))
        _draw_points(axes, points, style)
    if has_points:
        axes.set_xlim(left=0.0)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0), useMathText=True)
        _name_offsets(axes, max(run.charged("collect") + run.charged("sft") for run in runs))
    else:
        _say(axes, set_title(name), "not evaluated yet")


def _name_offsets(axes: Axes, offset: float) -> None:
    """Write what the shaded stretch is, inside it where it is wide enough."""
    if offset == 0.0:
        return
    is_wide = offset > _MIN_NAMED_SHARE * axes.get_xlim()[1]
    axes.annotate(
        "off-policy\ncompute",
        xy=(offset / 2 if is_wide else offset, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(0 if is_wide else 5, 0),
        textcoords="offset points",
        ha="center" if is_wide else "left",
        va="top",
        fontsize=8.5,
        color=_INK,
    )


def _draw_points(
    axes: Axes, points: Sequence[tuple[float, AccuracyPoint]], style: RunStyle
) -> None:
    """Draw one run's evaluations with their 95 % band."""
    flops = [x for x, _ in points]
    values = [point.accuracy for _, point in points]
    axes.plot(flops, values, label=style.title, markersize=4.5, **_line(style))
    if points and all(point.stderr is not None for _, point in points):
        halves = [_Z95 * (point.stderr or 0.0) for _, point in points]
        low = [max(0.0, v - h) for v, h in zip(values, halves, strict=True)]
        high = [min(1.0, v + h) for v, h in zip(values, halves, strict=True)]
        axes.fill_between(flops, low, high, color=LIGHT_COLORS[style.slot], alpha=0.13, linewidth=0)


def _unlock_panel(axes: Axes, runs: Sequence[RunRecord], styles: Sequence[RunStyle]) -> None:
    """Draw the unlock curve before training once, and after training for every run."""
    _frame(axes, "Unlock curve", "prefix, share of the trace")
    curves = [[e for e in run.evaluations if e.unlock] for run in runs]
    if not any(curves):
        _say(axes, "Unlock curve", "not measured yet")
        return
    before = next((e for measured in curves for e in measured if e.step == 0), None)
    if before is not None:
        fractions, accuracies = _curve(before)
        label = "before training"
        axes.plot(
            fractions, accuracies, "o--", color=_INK, label=label, markersize=4, linewidth=1.6
        )
    for measured, style in zip(curves, styles, strict=True):
        if measured and not (before is not None and measured[-1].step == 0):
            axes.plot(*_curve(measured[-1]), markersize=4.5, **_line(style))
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(0.0, 1.0)
    axes.set_ylabel("accuracy", color=_INK)


def _curve(evaluation: EvaluationRecord) -> tuple[list[float], list[float]]:
    """Return fractions and accuracies of the points that were measured."""
    known = [(p.low, p.accuracy) for p in evaluation.unlock if p.accuracy is not None]
    return [fraction for fraction, _ in known], [accuracy for _, accuracy in known]


def _line(style: RunStyle) -> dict[str, Any]:
    """Return a run's colour, marker and line."""
    dashes = {"": 0, "7 4": 1, "2 3": 2, "9 3 2 3": 3}
    return {
        "color": LIGHT_COLORS[style.slot],
        "marker": _MARKERS[style.slot],
        "linestyle": _DASHES[dashes[style.dash]],
        "linewidth": 1.8,
    }


def _frame(axes: Axes, title: str, x_title: str) -> None:
    """Give a panel its title, axis title and quiet frame."""
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    axes.set_xlabel(x_title, color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aab2bf")
    axes.tick_params(colors=_INK, labelsize=9.5)


def _say(axes: Axes, title: str, text: str) -> None:
    """Say in a panel why it is empty."""
    _frame(axes, title, "")
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_INK)
    axes.set_xticks([])


def _legend(figure: Figure, *panels: Axes) -> None:
    """Put one legend under all panels."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=len(handles),
            frameon=False,
        )
