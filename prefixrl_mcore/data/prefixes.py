"""Prefixes: cut from traces (``prefix_cuts``), and kept in a folder.

The folder holds ``prefixes.parquet`` with the cuts and ``prefixes.json`` with their origin.
The header is written last and names the table's checksum, so a folder without a header, or with a
header that does not fit, is no prefix folder. Nothing is overwritten by different content.
"""

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefixrl_mcore.config.data import PrefixConfig
from prefixrl_mcore.config.json_files import read_json_object
from prefixrl_mcore.data.prefix_cuts import PrefixStats, answer_finder, check_room, cut_prefixes
from prefixrl_mcore.data.traces import check_hash
from prefixrl_mcore.observability.atomic import write_bytes_atomic, write_json_atomic
from prefixrl_mcore.records import PrefixedProblem, Problem

__all__ = ["PrefixStats", "answer_finder", "cut_prefixes", "read_prefixes", "write_prefixes"]

_logger = logging.getLogger(__name__)

_TABLE = "prefixes.parquet"
_HEADER = "prefixes.json"
_FORMAT_VERSION = 1

_SCHEMA = pa.schema(
    [
        pa.field("prefixed_problem_id", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("trace_id", pa.string(), nullable=False),
        pa.field("cut", pa.int64(), nullable=False),
        pa.field("fraction", pa.float64(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("prefix_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("answer_in_prefix", pa.bool_(), nullable=False),
    ]
)


def write_prefixes(
    folder: Path,
    prefixed: Sequence[PrefixedProblem],
    *,
    config: PrefixConfig,
    tokenizer_hash: str,
    chat_template_hash: str,
    stats: PrefixStats,
) -> None:
    """Write the prefixes; a folder that holds the same ones already is left as it is.

    Raises:
        ValueError: if the folder holds other prefixes.
    """
    content = _table_bytes(prefixed)
    header: dict[str, Any] = {
        "format_version": _FORMAT_VERSION,
        "tokenizer_hash": tokenizer_hash,
        "chat_template_hash": chat_template_hash,
        "config": config.model_dump(mode="json"),
        "num_prefixes": len(prefixed),
        "prefixes_hash": _content_hash(prefixed),
        "table_sha256": hashlib.sha256(content).hexdigest(),
        "stats": asdict(stats),
    }
    if (folder / _HEADER).exists():
        _check_equal(folder, _read_header(folder), header)
        return
    write_bytes_atomic(folder / _TABLE, content)
    write_json_atomic(folder / _HEADER, header)


def read_prefixes(
    folder: Path,
    problems: Sequence[Problem],
    tokenizer_hash: str,
    chat_template_hash: str,
    config: PrefixConfig | None = None,
    *,
    max_total_tokens: int | None = None,
) -> list[PrefixedProblem]:
    """Return the prefixes of the given problems, in the order in which they were written.

    Prefixes of other problems are left out; their number is logged.

    Args:
        folder: written by ``write_prefixes``.
        problems: problems to train on.
        tokenizer_hash: hash that the prefixes must have been made with.
        chat_template_hash: hash that the prompts must have been made with.
        config: settings that the prefixes must have been cut with; None accepts any.
        max_total_tokens: prompt, prefix and completion together; None has no limit.

    Raises:
        ValueError: if the folder has no prefixes or damaged ones, a hash or a setting differs, a
            problem's answer has changed since, or a prefix leaves no room for a completion.
    """
    header = _read_header(folder)
    check_hash("tokenizer", folder, header["tokenizer_hash"], tokenizer_hash)
    check_hash("chat template", folder, header["chat_template_hash"], chat_template_hash)
    if config is not None and header["config"] != config.model_dump(mode="json"):
        raise ValueError(
            f"{folder}: was cut with {header['config']}, the config says "
            f"{config.model_dump(mode='json')}; use the settings it was cut with, or cut into "
            "another data.prefixes"
        )
    rows = _read_rows(folder, header["table_sha256"])
    by_id = {problem.problem_id: problem for problem in problems}
    items = [_item(row, by_id[row["problem_id"]]) for row in rows if row["problem_id"] in by_id]
    if max_total_tokens is not None:
        check_room(items, max_total_tokens)
    if len(items) < len(rows):
        _logger.warning(
            "%s: %d of %d prefixes belong to problems that are not trained on, and are left out",
            folder,
            len(rows) - len(items),
            len(rows),
        )
    return items


def _item(row: Mapping[str, Any], problem: Problem) -> PrefixedProblem:
    """Return one row as a record."""
    if row["answer"] != problem.answer:
        raise ValueError(
            f"prefix {row['prefixed_problem_id']!r}: the answer of problem "
            f"{problem.problem_id!r} was {row['answer']!r} when it was cut and is "
            f"{problem.answer!r} now; collect and cut again"
        )
    return PrefixedProblem(
        prefixed_problem_id=row["prefixed_problem_id"],
        problem=problem,
        prompt_token_ids=tuple(row["prompt_token_ids"]),
        prefix_token_ids=tuple(row["prefix_token_ids"]),
        trace_id=row["trace_id"],
        fraction=row["fraction"],
        answer_in_prefix=row["answer_in_prefix"],
    )


def _rows(prefixed: Sequence[PrefixedProblem]) -> list[dict[str, Any]]:
    """Return the records as rows of the table."""
    return [
        {
            "prefixed_problem_id": item.prefixed_problem_id,
            "problem_id": item.problem.problem_id,
            "trace_id": item.trace_id,
            "cut": len(item.prefix_token_ids),
            "fraction": item.fraction,
            "prompt_token_ids": item.prompt_token_ids,
            "prefix_token_ids": item.prefix_token_ids,
            "answer": item.problem.answer,
            "answer_in_prefix": item.answer_in_prefix,
        }
        for item in prefixed
    ]


def _table_bytes(prefixed: Sequence[PrefixedProblem]) -> bytes:
    """Return the Parquet file's content."""
    table = pa.Table.from_pylist(_rows(prefixed), schema=_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _content_hash(prefixed: Sequence[PrefixedProblem]) -> str:
    """Hash the rows, independent of Parquet's version."""
    return hashlib.sha256(json.dumps(_rows(prefixed)).encode()).hexdigest()


def _check_equal(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse to replace other prefixes."""
    names = ("tokenizer_hash", "chat_template_hash", "config", "prefixes_hash")
    differing = [name for name in names if found[name] != expected[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder}: holds other prefixes already ({name} is {found[name]}, would be "
            f"{expected[name]}); nothing was changed; choose another data.prefixes, or remove the "
            "folder"
        )


def _read_header(folder: Path) -> dict[str, Any]:
    """Read and check ``prefixes.json``."""
    path = folder / _HEADER
    if not path.exists():
        raise ValueError(
            f"{folder}: holds no prefixes; run `prefixrl prefixes` first, or correct data.prefixes"
        )
    header = read_json_object(path, remedy="restore this header from a copy")
    if header.get("format_version") != _FORMAT_VERSION:
        raise ValueError(
            f"{path}: expected a header of format version {_FORMAT_VERSION}; use the version that "
            "wrote it, or cut the prefixes again"
        )
    return header


def _read_rows(folder: Path, sha256: str) -> list[dict[str, Any]]:
    """Read the table after checking that it is the one the header was written for."""
    path = folder / _TABLE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing; cut the prefixes again") from None
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: damaged: its SHA-256 is {found}, the header says {sha256}; cut the prefixes "
            "again"
        )
    return pq.read_table(io.BytesIO(content), schema=_SCHEMA).to_pylist()
