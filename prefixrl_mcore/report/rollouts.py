"""The rollouts that a report carries: a bounded, even choice of whole groups.

Rollout tables of a long run are gigabytes; a page must open at once. Groups are chosen evenly
over the steps and within a step, never by their reward, so that what is shown is not flattering,
and the page says how many of how many it shows.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefixrl_mcore.report.token_spans import TokenPieces

MAX_ROLLOUTS = 1200
"""Rollouts in one page, over all runs."""

MAX_BYTES = 12_000_000
"""JSON of the rollouts in one page, over all runs."""

MAX_TABLES = 16
"""Rollout tables (steps) read per run; the first and the last are always among them."""

MAX_TEXT = 20_000
"""Characters of one prompt, prefix or completion; the middle of a longer one is left out."""

_COLUMNS = (
    "step",
    "group_index",
    "rollout_index",
    "problem_id",
    "trace_id",
    "fraction",
    "answer",
    "prompt_text",
    "prefix_text",
    "completion_text",
    "prompt_token_ids",
    "prefix_token_ids",
    "completion_token_ids",
    "rollout_logprobs",
    "reward",
    "advantage",
    "reason",
    "extracted",
    "finish_reason",
    "policy_version",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutChoice:
    """The rollouts of one run that go into the page."""

    groups: tuple[Mapping[str, Any], ...]
    """Groups in the compact form that ``assets/reader.js`` reads, by rising step."""

    num_shown: int
    """Rollouts in ``groups``."""

    num_total: int
    """Rollouts in all readable tables of the run."""

    num_tables: int
    """Readable rollout tables of the run."""

    num_tables_shown: int
    """Tables that the shown rollouts come from."""

    num_shortened: int
    """Texts of which the middle was left out."""

    notices: tuple[str, ...]
    """Tables that could not be read."""


def choose_rollouts(
    folder: Path,
    *,
    tokenizer_folder: Path | None,
    max_rollouts: int = MAX_ROLLOUTS,
    max_bytes: int = MAX_BYTES,
) -> RolloutChoice:
    """Return an even choice of a run's rollouts.

    Args:
        folder: the run folder; its tables are ``rollouts/*.parquet``.
        tokenizer_folder: where a ``tokenizer.json`` may be, for logprobs by token; without one
            the page shows logprobs in a strip beside the text.
        max_rollouts: upper bound on rollouts; the first group is shown even if it is larger.
        max_bytes: upper bound on their JSON, with the same exception.
    """
    notices: list[str] = []
    counts = _count_rows(folder / "rollouts", notices)
    pieces = TokenPieces.load(tokenizer_folder)
    per_table = [_groups_of(path, notices) for path in _evenly(list(counts), MAX_TABLES)]
    chosen: list[dict[str, Any]] = []
    num_shown = num_bytes = num_shortened = 0
    for rows in _round_robin([_evenly(groups, len(groups)) for groups in per_table if groups]):
        group, shortened = _compact_group(rows, pieces)
        size = len(json.dumps(group, ensure_ascii=False).encode())
        if chosen and (num_shown + len(rows) > max_rollouts or num_bytes + size > max_bytes):
            break
        chosen.append(group)
        num_shown += len(rows)
        num_bytes += size
        num_shortened += shortened
    chosen.sort(key=lambda group: (group["step"], group["group"]))
    return RolloutChoice(
        groups=tuple(chosen),
        num_shown=num_shown,
        num_total=sum(counts.values()),
        num_tables=len(counts),
        num_tables_shown=len({group["step"] for group in chosen}),
        num_shortened=num_shortened,
        notices=tuple(notices),
    )


def _count_rows(folder: Path, notices: list[str]) -> dict[Path, int]:
    """Return the rows of every readable table, by name (and so by step)."""
    counts = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            metadata = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            notices.append(f"rollouts/{path.name} could not be read: {error}")
            continue
        counts[path] = metadata.num_rows
    return counts


def _groups_of(path: Path, notices: list[str]) -> list[list[dict[str, Any]]]:
    """Return the rows of one table by group; nothing, with a notice, if columns are missing."""
    names = set(pq.read_schema(path).names)
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        notices.append(f"rollouts/{path.name} lacks {', '.join(missing)}; it is not shown")
        return []
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(path, columns=list(_COLUMNS)).to_pylist():
        groups.setdefault(row["group_index"], []).append(row)
    return [groups[index] for index in sorted(groups)]


def _evenly[T](items: Sequence[T], count: int) -> list[T]:
    """Return up to ``count`` items, ends included, ordered so that any start is spread out.

    The order bisects: first, last, middle, quarters, ...
    """
    if len(items) > count:
        last = len(items) - 1
        items = [items[round(i * last / max(1, count - 1))] for i in range(count)]
    order: list[int] = []
    spans = [(0, len(items) - 1)]
    for index in (0, len(items) - 1):
        if 0 <= index < len(items) and index not in order:
            order.append(index)
    while spans:
        low, high = spans.pop(0)
        middle = (low + high) // 2
        if low < middle < high:
            order.append(middle)
            spans += [(low, middle), (middle, high)]
    return [items[index] for index in order]


def _round_robin[T](lists: Sequence[Sequence[T]]) -> Iterator[T]:
    """Yield the first item of every list, then the second of every list, ..."""
    for rank in range(max((len(items) for items in lists), default=0)):
        for items in lists:
            if rank < len(items):
                yield items[rank]


def _compact_group(
    rows: Sequence[Mapping[str, Any]], pieces: TokenPieces
) -> tuple[dict[str, Any], int]:
    """Return one group in the page's form, and how many of its texts were shortened."""
    first = rows[0]
    prompt, prefix = _shortened(first["prompt_text"]), _shortened(first["prefix_text"])
    rollouts = [_compact_rollout(row, pieces) for row in rows]
    num_shortened = sum(len(row["completion_text"] or "") > MAX_TEXT for row in rows) + sum(
        len(first[name] or "") > MAX_TEXT for name in ("prompt_text", "prefix_text")
    )
    group = {
        "step": first["step"],
        "group": first["group_index"],
        "problem": first["problem_id"],
        "trace": first["trace_id"],
        "fraction": round(first["fraction"] or 0.0, 4),
        "answer": first["answer"],
        "version": first["policy_version"],
        "prompt": prompt,
        "prefix": prefix,
        "prompt_tokens": len(first["prompt_token_ids"] or ()),
        "prefix_tokens": len(first["prefix_token_ids"] or ()),
        "rollouts": rollouts,
    }
    return group, num_shortened


def _compact_rollout(row: Mapping[str, Any], pieces: TokenPieces) -> dict[str, Any]:
    """Return one rollout: logprobs in hundredths of a nat, token ends as text offsets."""
    text = row["completion_text"] or ""
    token_ids = row["completion_token_ids"] or []
    logprobs = row["rollout_logprobs"] or []
    rollout: dict[str, Any] = {
        "i": row["rollout_index"],
        "text": _shortened(text),
        "tokens": len(token_ids),
        "reward": _finite(row["reward"]),
        "advantage": _finite(row["advantage"]),
        "reason": row["reason"],
        "extracted": row["extracted"],
        "finish": row["finish_reason"],
    }
    if len(text) <= MAX_TEXT and logprobs:
        rollout["logprobs"] = [
            None if lp is None or not math.isfinite(lp) else round(100 * lp) for lp in logprobs
        ]
        ends = pieces.ends(token_ids, text)
        if ends is not None:
            rollout["ends"] = ends
    return rollout


def _finite(value: float | None) -> float | None:
    """Return ``value`` with four decimals, or None when it is no finite number."""
    return None if value is None or not math.isfinite(value) else round(value, 4)


def _shortened(text: str | None) -> str:
    """Return ``text``, its middle replaced by a count when it is too long."""
    text = text or ""
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters not shown ...]\n{text[-half:]}"
