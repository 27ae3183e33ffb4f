"""The report: one HTML file that needs nothing else, comparing one or several runs.

Tables and texts are rendered here, with everything escaped; charts and the rollout reader are
drawn by plain JavaScript from JSON that is embedded in the page. Text of models reaches the
document only through ``textContent``, and a content security policy forbids any request.
"""

import json
import logging
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.observability.atomic import write_text_atomic
from prefixrl_mcore.report import sections
from prefixrl_mcore.report.headline import compare, reference_index, set_names
from prefixrl_mcore.report.payload import build_payload
from prefixrl_mcore.report.reader import RunRecord, read_runs
from prefixrl_mcore.report.rollouts import (
    MAX_BYTES,
    MAX_ROLLOUTS,
    RolloutChoice,
    choose_rollouts,
)
from prefixrl_mcore.report.style import RunStyle, run_styles

logger = logging.getLogger(__name__)

_SCRIPTS = ("base.js", "chart.js", "panels.js", "reader.js", "page.js")


def build_report(
    run_folders: Sequence[Path],
    out: Path,
    *,
    max_rollouts: int = MAX_ROLLOUTS,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write one self-contained HTML file about the runs and return its path.

    A run may still be going, or lack any part; the page says what is missing where it is missing.

    Args:
        run_folders: the runs to compare, in the order in which they are shown.
        out: the HTML file; replaced atomically.
        max_rollouts: rollouts embedded in the page, shared evenly by the runs.
        max_bytes: their size as JSON, shared evenly by the runs.

    Raises:
        ConfigError: if no folder is given, one is given twice, or one holds no run.
    """
    runs = read_runs(run_folders)
    styles = run_styles(runs)
    choices = [
        choose_rollouts(
            run.folder,
            tokenizer_folder=_tokenizer_folder(run),
            max_rollouts=max_rollouts // len(runs),
            max_bytes=max_bytes // len(runs),
        )
        for run in runs
    ]
    page = _render(runs, styles, choices, time.time())
    # Half of a split character (a lone surrogate in a JSON file) cannot be written as UTF-8.
    page = page.encode("utf-8", "replace").decode("utf-8")
    if out.is_dir():
        raise ConfigError(f"report --out {out}: is a folder; name a file")
    write_text_atomic(out, page)
    logger.info("report of %d run(s): %s (%.1f MB)", len(runs), out, len(page.encode()) / 1e6)
    return out


def _tokenizer_folder(run: RunRecord) -> Path | None:
    """Return the model folder of the config."""
    path = run.config.get("model.path")
    return Path(path) if isinstance(path, str) else None


def _render(
    runs: Sequence[RunRecord],
    styles: Sequence[RunStyle],
    choices: Sequence[RolloutChoice],
    now: float,
) -> str:
    """Return the page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_asset("report.html.j2"))
    comparisons = compare(runs)
    reference = reference_index(runs)
    titles = [style.title for style in styles]
    several = len(runs) > 1
    return template.render(
        title=" vs ".join(titles) if several else f"{titles[0]} run",
        lead=_lead(runs),
        css=Markup(_asset("report.css")),
        script=Markup("\n".join(_asset(name) for name in _SCRIPTS)),
        data=_embedded(build_payload(runs, styles)),
        rollouts=_embedded([list(choice.groups) for choice in choices]),
        runs=sections.run_cards(runs, styles, now),
        reference=titles[reference],
        results_lead=sections.results_lead(comparisons, runs, styles, reference),
        headline_rows=sections.headline_rows(runs, styles),
        headline_notes=sections.headline_notes(runs),
        set_titles=[sections.set_title(name) for name in set_names(runs)],
        comparisons=sections.comparison_rows(comparisons),
        comparisons_empty=_comparisons_empty(runs),
        stages=sections.stage_rows(runs),
        collections=sections.collection_rows(runs, styles),
        collections_missing=sections.collections_missing(runs, styles),
        rollouts_lead=_rollouts_lead(choices),
        rollout_notices=[notice for choice in choices for notice in choice.notices],
        settings=sections.setting_tables(runs),
        settings_lead=sections.settings_lead(runs),
        written=sections.written_at(now),
    )


def _asset(name: str) -> str:
    """Return one file of ``assets/``."""
    return resources.files("prefixrl_mcore.report").joinpath("assets", name).read_text("utf-8")


def _embedded(value: object) -> Markup:
    """Return JSON that cannot leave its script element, whatever text it contains."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _lead(runs: Sequence[RunRecord]) -> str:
    """Return what ran, in one sentence."""
    models = dict.fromkeys(str(run.config.get("model.path", "unknown model")) for run in runs)
    problems = dict.fromkeys(str(run.config.get("data.problems", "?")) for run in runs)
    count = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    return (
        f"{count} of {', '.join(models)} on {', '.join(problems)}. Accuracy is always measured "
        "without a prefix; FLOPs include collection and SFT."
    )


def _comparisons_empty(runs: Sequence[RunRecord]) -> str:
    """Return why no accuracy can be compared."""
    if not any(run.evals for run in runs):
        return "No evaluation has been recorded yet."
    return "No run reached an accuracy of 0.05 on any set."


def _rollouts_lead(choices: Sequence[RolloutChoice]) -> str:
    """Return how many of the rollouts the page shows."""
    shown = sum(choice.num_shown for choice in choices)
    total = sum(choice.num_total for choice in choices)
    tables = sum(choice.num_tables for choice in choices)
    tables_shown = sum(choice.num_tables_shown for choice in choices)
    if total == 0:
        return "Rollout tables appear here once training has written some."
    text = (
        f"Showing {shown:,} of {total:,} written rollouts, from {tables_shown} of {tables} tables: "
        "whole groups, chosen evenly over steps, never by reward."
    )
    shortened = sum(choice.num_shortened for choice in choices)
    return f"{text} {shortened} long texts are shortened in the middle." if shortened else text
