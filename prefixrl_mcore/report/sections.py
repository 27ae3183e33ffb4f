"""The page's tables and texts as plain values for the template, which escapes all of them."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from prefixrl_mcore.report.formats import (
    MISSING,
    format_accuracy,
    format_count,
    format_flops,
    format_ratio,
    format_seconds,
)
from prefixrl_mcore.report.headline import (
    AccuracyPoint,
    Comparison,
    Reach,
    accuracy_points,
    set_names,
)
from prefixrl_mcore.report.reader import TRAIN_SET, RunRecord
from prefixrl_mcore.report.style import DARK_COLORS, LIGHT_COLORS, RunStyle

STALE_SECONDS = 300.0
"""A run whose progress file is older than this counts as stopped; it is rewritten every second."""


def set_title(name: str) -> str:
    """Return how a problem set is called in the page."""
    if name == TRAIN_SET:
        return "Training problems"
    return "Held-out problems" if name == "heldout" else f"Held-out: {name}"


def run_cards(
    runs: Sequence[RunRecord], styles: Sequence[RunStyle], now: float
) -> list[dict[str, Any]]:
    """Return what the card of each run shows."""
    return [
        {
            "title": style.title,
            "light": LIGHT_COLORS[style.slot],
            "dark": DARK_COLORS[style.slot],
            "status": run_status(run, now),
            "figures": _figures(run, set_names(runs)),
            "facts": _facts(run),
            "notices": run.notices,
        }
        for run, style in zip(runs, styles, strict=True)
    ]


def run_status(run: RunRecord, now: float) -> dict[str, str]:
    """Return whether the run is finished, running, failed or stopped, as ``kind`` and ``text``."""
    progress = run.progress
    if not progress:
        return {"kind": "unknown", "text": "no progress recorded"}
    waiting_for = str(progress.get("waiting_for", "?"))
    stage, completed, total = (progress.get(k, "?") for k in ("stage", "completed", "total"))
    where = f"{stage} {completed}/{total}"
    if waiting_for.startswith("failed"):
        return {"kind": "failed", "text": f"failed in {where}"}
    if waiting_for == "done":
        return {"kind": "finished", "text": f"{where} done"}
    written = progress.get("time")
    age = now - written if isinstance(written, (int, float)) else math.inf
    if age <= STALE_SECONDS:
        return {"kind": "running", "text": f"running: {where}, waiting for {waiting_for}"}
    silent = f", silent for {format_seconds(age)}" if math.isfinite(age) else ""
    return {"kind": "stopped", "text": f"stopped in {where}{silent}"}


def _figures(run: RunRecord, names: Sequence[str]) -> list[dict[str, str]]:
    """Return the large numbers of a card: final accuracies and the FLOPs spent."""
    figures = []
    for name in names[:2]:
        points = accuracy_points(run, name)
        detail = f"± {1.96 * points[-1].stderr:.3f}" if points and points[-1].stderr else ""
        value = format_accuracy(points[-1].accuracy if points else None)
        title = set_title(name).removesuffix(" problems")
        figures.append({"name": title, "value": value, "detail": detail})
    total = format_flops(run.charged("total") or None)
    return [*figures, {"name": "Total FLOPs", "value": total, "detail": ""}]


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return the small print of a card."""
    commit = run.environment.get("git_commit")
    dirty = ", with uncommitted changes" if run.environment.get("git_is_dirty") else ""
    config = run.config
    facts = [
        ("Folder", str(run.folder)),
        ("Model", str(config.get("model.path") or MISSING)),
        ("Problems", str(config.get("data.problems") or MISSING)),
        ("Steps", f"{_num_steps(run)} of {config.get('trainer.num_steps', '?')}"),
        ("Batch", _batch(config)),
        ("Rollouts", ", ".join(sorted(set(run.engines.values()))) or MISSING),
        ("Commit", f"{str(commit)[:12]}{dirty}" if commit else "not recorded"),
    ]
    return [(name, value) for name, value in facts if value != MISSING]


def _batch(config: Mapping[str, Any]) -> str:
    """Return ``16 prompts x 8 rollouts``."""
    prompts, group_size = config.get("batch.prompts_per_step"), config.get("batch.group_size")
    if prompts is None or group_size is None:
        return MISSING
    return f"{prompts} prompts \N{MULTIPLICATION SIGN} {group_size} rollouts"


def _num_steps(run: RunRecord) -> int:
    """Return the optimizer steps that the metrics tell of."""
    updates = run.train[-1].step + 1 if run.train else 0
    return max(updates, run.evals[-1].step if run.evals else 0)


def headline_rows(runs: Sequence[RunRecord], styles: Sequence[RunStyle]) -> list[dict[str, Any]]:
    """Return the headline table: one row per run."""
    names = set_names(runs)
    rows = []
    for run, style in zip(runs, styles, strict=True):
        cells = []
        for name in names:
            points = accuracy_points(run, name)
            cells += [_final_cell(points), _best_cell(points)]
        rows.append(
            {
                "title": style.title,
                "steps": _num_steps(run),
                "cells": cells,
                "total": format_flops(run.charged("total") or None),
                "collect": format_flops(run.charged("collect")),
                "sft": format_flops(run.charged("sft")),
                "seconds": format_seconds(_wall_seconds(run)),
            }
        )
    return rows


def _final_cell(points: Sequence[AccuracyPoint]) -> dict[str, str]:
    """Return the last evaluation."""
    if not points:
        return {"value": MISSING, "detail": "not evaluated"}
    stderr = points[-1].stderr
    return {
        "value": format_accuracy(points[-1].accuracy),
        "detail": f"± {1.96 * stderr:.3f}" if stderr is not None else f"step {points[-1].step}",
    }


def _best_cell(points: Sequence[AccuracyPoint]) -> dict[str, str]:
    """Return the best evaluation."""
    if not points:
        return {"value": MISSING, "detail": ""}
    best = max(points, key=lambda point: point.accuracy)
    return {"value": format_accuracy(best.accuracy), "detail": f"step {best.step}"}


def _wall_seconds(run: RunRecord) -> float | None:
    """Return the time of all stages, or of the training steps where stages are not known."""
    if run.stage_seconds:
        return sum(run.stage_seconds.values())
    _, seconds = run.series("time/step_seconds")
    return sum(seconds) if seconds else None


def headline_notes(runs: Sequence[RunRecord]) -> list[str]:
    """Return what the reader must know before believing the headline table."""
    notes = []
    if not any(run.evals for run in runs):
        notes.append("No evaluation has been recorded yet: there is no accuracy to compare.")
    elif not any(run.held_out for run in runs):
        notes.append(
            "No held-out set was evaluated: accuracy on training problems alone cannot tell "
            "learning from memorising."
        )
    if len({run.config.get("model.path") for run in runs}) > 1:
        notes.append("The runs start from different models; compare with care.")
    return notes


def results_lead(
    comparisons: Sequence[Comparison],
    runs: Sequence[RunRecord],
    styles: Sequence[RunStyle],
    reference: int,
) -> str:
    """Return one sentence per problem set about the FLOPs to reach one accuracy."""
    sentences = ["Accuracy without a prefix, and the compute it took."]
    if len(runs) > 1:
        for name in set_names(runs):
            rows = [c for c in comparisons if c.set_name == name]
            sentences += [_sentence(rows, styles, reference)] if rows else []
    return " ".join(sentences)


def _sentence(rows: Sequence[Comparison], styles: Sequence[RunStyle], reference: int) -> str:
    """Compare at the highest accuracy that the reference and another run reached.

    Where no other run reached any, at the highest that the reference did.
    """
    subject = f"{set_title(rows[0].set_name)}: {styles[reference].title}"
    arrived = [row for row in rows if row.reaches[reference].flops is not None]
    if not arrived:
        return f"{subject} reached none of the accuracies below, another run did."
    shared = [row for row in arrived if sum(reach.flops is not None for reach in row.reaches) > 1]
    row = max(shared or arrived, key=lambda comparison: comparison.threshold)
    others = [
        f"{style.title} {_in_words(reach)}"
        for i, (style, reach) in enumerate(zip(styles, row.reaches, strict=True))
        if i != reference
    ]
    spent = format_flops(row.reaches[reference].flops)
    return f"{subject} reached {row.threshold:.2f} with {spent} FLOPs; {'; '.join(others)}."


def _in_words(reach: Reach) -> str:
    """Return what one run did about an accuracy that the reference reached."""
    if reach.flops is not None and reach.ratio is not None:
        return f"needed {format_ratio(reach.ratio)} that"
    if reach.ratio is not None:
        return f"never reached it, having spent {format_ratio(reach.ratio)} that"
    if reach.budget == 0.0:
        return "was not evaluated"
    return "never reached it, but also spent less"


def comparison_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the table of FLOPs to reach an accuracy."""
    rows = []
    previous = None
    for comparison in comparisons:
        rows.append(
            {
                "is_first": comparison.set_name != previous,
                "set_title": set_title(comparison.set_name),
                "threshold": f"{comparison.threshold:.2f}",
                "cells": [_comparison_cell(reach) for reach in comparison.reaches],
            }
        )
        previous = comparison.set_name
    return rows


def _comparison_cell(reach: Reach) -> dict[str, str]:
    """Return one run at one accuracy."""
    if reach.flops is not None:
        ratio = format_ratio(reach.ratio) if reach.ratio is not None else ""
        return {"flops": format_flops(reach.flops), "ratio": ratio, "detail": ""}
    if reach.budget == 0.0:
        return {"flops": "not evaluated", "ratio": "", "detail": ""}
    detail = f"within {format_flops(reach.budget)} FLOPs"
    if reach.ratio_kind == "at_least" and reach.ratio is not None:
        return {"flops": "", "ratio": f"more than {format_ratio(reach.ratio)}", "detail": detail}
    return {"flops": "", "ratio": "", "detail": detail}


def stage_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return seconds per stage."""
    stages = dict.fromkeys(stage for run in runs for stage in run.stage_seconds)
    return [
        {"name": stage, "cells": [format_seconds(run.stage_seconds.get(stage)) for run in runs]}
        for stage in stages
    ]


def collection_rows(runs: Sequence[RunRecord], styles: Sequence[RunStyle]) -> list[dict[str, Any]]:
    """Return the collection table: the runs whose trace store can be read."""
    rows = []
    for index, (run, style) in enumerate(zip(runs, styles, strict=True)):
        if run.collection is None:
            continue
        one = run.collection
        share = f" ({one.num_solved / one.num_problems:.0%})" if one.num_problems else ""
        cells = [
            format_count(one.num_problems),
            f"{format_count(one.num_solved)}{share}",
            format_count(one.num_tries),
            format_count(one.median_tries),
            format_count(one.num_tokens),
            format_flops(one.flops),
            format_seconds(one.seconds),
        ]
        row = {"index": index, "title": style.title, "cells": cells, "folder": str(one.folder)}
        rows.append(row)
    return rows


def collections_missing(runs: Sequence[RunRecord], styles: Sequence[RunStyle]) -> str:
    """Return which runs show no collection, and why; empty when all do."""
    texts = []
    for run, style in zip(runs, styles, strict=True):
        if run.collection is not None:
            continue
        charged = run.charged("collect")
        texts.append(
            f"{style.title}: {format_flops(charged)} FLOPs were charged, but the trace store is "
            "not where the config says."
            if charged
            else f"{style.title}: nothing was collected for this run."
        )
    return " ".join(texts)


def setting_tables(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return settings and versions side by side, those that differ first and highlighted."""
    settings = _rows([run.config for run in runs])
    versions = _rows([run.environment for run in runs])
    differing = [row for row in settings if row["differs"]]
    return [
        {"title": f"Settings that differ ({len(differing)})", "rows": differing, "is_open": True},
        {
            "title": f"All settings ({len(settings)})",
            "rows": settings,
            "is_open": not differing and not versions,
        },
        {"title": "Commit, versions, machine", "rows": versions, "is_open": True},
    ]


def settings_lead(runs: Sequence[RunRecord]) -> str:
    """Return what the settings tables can and cannot say."""
    missing = [str(run.folder) for run in runs if not run.config]
    if missing:
        return f"No config.json in {', '.join(missing)}: its settings are unknown."
    return "Keys with different values are highlighted." if len(runs) > 1 else ""


def _rows(trees: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per dotted key of any run."""
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = []
    for key in keys:
        cells = [_setting(tree[key]) if key in tree else "not set" for tree in trees]
        rows.append({"key": key, "cells": cells, "differs": len(set(cells)) > 1})
    return rows


def _setting(value: object) -> str:
    """Return a setting as text: strings bare, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def written_at(now: float) -> str:
    """Return the time of writing."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
