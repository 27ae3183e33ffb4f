"""The rollouts that a report carries: a bounded, even choice of whole groups.

Rollout tables of a long run are gigabytes; a page must open at once. Groups are chosen evenly
over the steps and within a step, never by their reward, so that what is shown is not flattering,
and the page says how many of how many it shows.
"""

import json
import math
from collections import Counter
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
    "version_spans",
    "is_dropped",
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
    sizes = _group_sizes(folder / "rollouts", notices)
    tables = [path for path, groups in sizes.items() if groups]
    plan = _plan({path: sizes[path] for path in _evenly(tables, MAX_TABLES)}, max_rollouts)
    compact = _read_groups(plan, TokenPieces.load(tokenizer_folder))
    chosen: list[dict[str, Any]] = []
    num_bytes = num_shortened = 0
    for place in plan:
        group, shortened = compact[place]
        num_bytes += len(json.dumps(group, ensure_ascii=False).encode("utf-8", "replace"))
        if chosen and num_bytes > max_bytes:
            break
        chosen.append(group)
        num_shortened += shortened
    chosen.sort(key=lambda group: (group["step"], group["group"]))
    return RolloutChoice(
        groups=tuple(chosen),
        num_shown=sum(len(group["rollouts"]) for group in chosen),
        num_total=sum(sum(groups.values()) for groups in sizes.values()),
        num_tables=len(sizes),
        num_tables_shown=len({group["step"] for group in chosen}),
        num_shortened=num_shortened,
        notices=tuple(notices),
    )


def _group_sizes(folder: Path, notices: list[str]) -> dict[Path, dict[int, int]]:
    """Return the rollouts of every group of every usable table, by name (and so by step)."""
    sizes = {}
    for path in sorted(folder.glob("*.parquet")):
        try:
            missing = [name for name in _COLUMNS if name not in pq.read_schema(path).names]
            if missing:
                notices.append(f"rollouts/{path.name} lacks {', '.join(missing)}; not shown")
                continue
            column = pq.read_table(path, columns=["group_index"])["group_index"]
        except (OSError, pa.ArrowException) as error:
            notices.append(f"rollouts/{path.name} could not be read: {error}")
            continue
        sizes[path] = dict(sorted(Counter(column.to_pylist()).items()))
    return sizes


def _plan(sizes: Mapping[Path, Mapping[int, int]], max_rollouts: int) -> list[tuple[Path, int]]:
    """Return (table, group index) of the groups to read, the most important first."""
    orders = [[(p, g) for g in _evenly(list(groups), len(groups))] for p, groups in sizes.items()]
    plan: list[tuple[Path, int]] = []
    num_rollouts = 0
    for path, group in _round_robin(orders):
        num_rollouts += sizes[path][group]
        if plan and num_rollouts > max_rollouts:
            break
        plan.append((path, group))
    return plan


def _read_groups(
    plan: Sequence[tuple[Path, int]], pieces: TokenPieces
) -> dict[tuple[Path, int], tuple[dict[str, Any], int]]:
    """Return the planned groups in the page's form, each with its number of shortened texts.

    A table of long completions is gigabytes as Python lists, so only planned rows become any.
    """
    compact = {}
    for path in dict.fromkeys(path for path, _ in plan):
        wanted = [group for other, group in plan if other == path]
        table = pq.read_table(path, columns=list(_COLUMNS), filters=[("group_index", "in", wanted)])
        rows: dict[int, list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            rows.setdefault(row["group_index"], []).append(row)
        for group, members in rows.items():
            compact[path, group] = _compact_group(members, pieces)
    return compact


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
        "versions": _versions(rows),
        "dropped": bool(first["is_dropped"]),
        "prompt": prompt,
        "prefix": prefix,
        "prompt_tokens": len(first["prompt_token_ids"] or ()),
        "prefix_tokens": len(first["prefix_token_ids"] or ()),
        "rollouts": rollouts,
    }
    return group, num_shortened


def _versions(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the oldest and the newest policy version that sampled any of the rows' tokens."""
    spans = [span["policy_version"] for row in rows for span in row["version_spans"] or ()]
    versions = spans or [row["policy_version"] for row in rows]
    return [min(versions), max(versions)]


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
