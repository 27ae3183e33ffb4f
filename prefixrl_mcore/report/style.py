"""Names, colours and line styles of the runs: the same in the page and in the README's picture.

The colours are a set that readers with any common colour blindness can tell apart (after Okabe
and Ito, darkened on white and lightened on dark); markers repeat the distinction without colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prefixrl_mcore.report.reader import RunRecord

TITLES = {"prefixrl": "PrefixRL", "rl": "RL", "sft_then_rl": "SFT + RL"}
"""Display name of each known method."""

LIGHT_COLORS = ("#0062b3", "#c25700", "#00795a", "#a03d7f", "#7a5c00", "#5b5fc7", "#4d4d4d")
"""Colour of each slot on a white page."""

DARK_COLORS = ("#58aef2", "#f09a4a", "#3ecb9c", "#e58cc4", "#d8b64a", "#a6a9ff", "#b8b8b8")
"""Colour of each slot on a dark page."""

MARKERS = ("circle", "square", "diamond", "triangle", "circle", "square", "diamond")
"""Marker of each slot."""

DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""Line styles of several runs of one method; the first is solid."""

_METHOD_SLOTS = {"prefixrl": 0, "rl": 1, "sft_then_rl": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStyle:
    """How one run is drawn and called."""

    title: str
    """Name to show."""

    slot: int
    """Index into the colours and markers; fixed for the known methods."""

    dash: str
    """SVG dash array; empty is solid."""


def run_styles(runs: Sequence[RunRecord]) -> list[RunStyle]:
    """Return one style per run: a colour per method, a line style per run of the method."""
    slots = dict(_METHOD_SLOTS)
    seen: dict[str, int] = {}
    styles = []
    for run in runs:
        slot = slots.setdefault(run.method, len(slots) % len(LIGHT_COLORS))
        repeat = seen.get(run.method, 0)
        seen[run.method] = repeat + 1
        title = TITLES.get(run.method, run.method) + run.label.removeprefix(run.method)
        styles.append(RunStyle(title=title, slot=slot, dash=DASHES[repeat % len(DASHES)]))
    return styles
