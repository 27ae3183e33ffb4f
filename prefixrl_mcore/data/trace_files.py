r"""Readers of trace files made elsewhere.

``jsonl``: one trace per line with the fields

* ``problem_id``, or ``problem``: the exact problem text;
* ``text``: what follows the prompt, or ``token_ids``: the same as ids of *our* tokenizer;
* optional: ``finish_reason`` (``stop`` unless given), ``is_correct`` (a label), ``source_model``,
  ``rollout_logprobs`` (with ``token_ids`` only), ``temperature``, ``seed``, ``num_tries``,
  ``flops``, ``seconds``, ``tokenizer_hash`` (checked against ours).

``gsm8k_solutions``: the file of model solutions published with GSM8K. Each line has ``question``,
``ground_truth`` and, for each model, ``{"solution": str, "is_correct": bool}`` under the model's
name. Calculator annotations (``<<48/2=24>>``) are removed; the rest stays as it is, with the
answer in a last line ``A: 24``.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from prefixrl_mcore.data.jsonl import JsonRow, read_jsonl
from prefixrl_mcore.records import FinishReason

TraceFormat = Literal["jsonl", "gsm8k_solutions"]

_FIELDS = frozenset(
    {
        *("problem_id", "problem", "text", "token_ids", "finish_reason", "is_correct"),
        *("source_model", "rollout_logprobs", "temperature", "seed", "num_tries", "flops"),
        *("seconds", "tokenizer_hash"),
    }
)
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One trace of a file, before it is tokenised and verified."""

    where: str
    """``<file>, line <n>``, with the model's name where a line holds several."""

    problem_id: str | None
    """The problem's id; None when ``problem_text`` names it."""

    problem_text: str | None
    """The problem's exact text; None when ``problem_id`` names it."""

    text: str | None
    """What follows the prompt; None when ``token_ids`` has it."""

    token_ids: tuple[int, ...] | None
    """The same as token ids; None when ``text`` has it."""

    finish_reason: FinishReason
    """Why it ended."""

    source_model: str | None
    """The model that wrote it; None when the file does not say."""

    label: bool | None
    """Correctness according to the file; None without a label."""

    rollout_logprobs: tuple[float, ...]
    """Nats, one per token id; empty when unknown."""

    temperature: float | None
    """Sampling temperature; None when unknown."""

    seed: int | None
    """Seed; None when unknown."""

    num_tries: int
    """Attempts that it took, itself included."""

    flops: float
    """FLOPs that it took; 0 when unknown."""

    seconds: float
    """Wall time that it took; 0 when unknown."""

    tokenizer_hash: str | None
    """Tokenizer of the token ids; None when the file does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateFile:
    """All traces of a file."""

    candidates: tuple[Candidate, ...]
    """In the order of the file."""

    ignored_fields: dict[str, int]
    """Field that nothing was made of -> lines that have it."""


def read_candidates(path: Path, file_format: TraceFormat) -> CandidateFile:
    """Read a trace file; the whole file is checked before anything is returned.

    Raises:
        ValueError: if the file is missing, empty or malformed, or a field is missing or of a
            wrong type; names file, line and field.
    """
    if file_format == "jsonl":
        candidates: list[Candidate] = []
        ignored: Counter[str] = Counter()
        for row in read_jsonl(path):
            candidates.append(_candidate(row))
            ignored.update(row.values.keys() - _FIELDS)
        return CandidateFile(candidates=tuple(candidates), ignored_fields=dict(ignored))
    if file_format == "gsm8k_solutions":
        found = tuple(c for row in read_jsonl(path) for c in _gsm8k_candidates(row))
        return CandidateFile(candidates=found, ignored_fields={})
    raise ValueError(f"trace format must be jsonl or gsm8k_solutions, got {file_format!r}")


def _candidate(row: JsonRow) -> Candidate:
    """Read one line of the ``jsonl`` format."""
    values = row.values
    _exactly_one(row, "problem_id", "problem")
    _exactly_one(row, "text", "token_ids")
    finish_reason = values.get("finish_reason", "stop")
    if finish_reason not in get_args(FinishReason):
        raise _wrong(row, "finish_reason", f"one of {', '.join(get_args(FinishReason))}")
    token_ids = _numbers(row, "token_ids", int)
    rollout_logprobs = _numbers(row, "rollout_logprobs", float) or ()
    if rollout_logprobs and len(rollout_logprobs) != len(token_ids or ()):
        raise _wrong(row, "rollout_logprobs", f"{len(token_ids or ())} numbers, one per token id")
    num_tries = _optional(row, "num_tries", int, 1)
    if num_tries < 1:
        raise _wrong(row, "num_tries", "at least 1")
    for field in ("flops", "seconds"):
        if _optional(row, field, float, 0.0) < 0.0:
            raise _wrong(row, field, "at least 0")
    return Candidate(
        where=row.where,
        problem_id=row.scalar_text("problem_id") if "problem_id" in values else None,
        problem_text=row.text("problem") if "problem" in values else None,
        text=row.text("text") if "text" in values else None,
        token_ids=token_ids,
        finish_reason=finish_reason,
        source_model=row.text("source_model") if "source_model" in values else None,
        label=_optional(row, "is_correct", bool, None),
        rollout_logprobs=rollout_logprobs,
        temperature=_optional(row, "temperature", float, None),
        seed=_optional(row, "seed", int, None),
        num_tries=num_tries,
        flops=_optional(row, "flops", float, 0.0),
        seconds=_optional(row, "seconds", float, 0.0),
        tokenizer_hash=row.text("tokenizer_hash") if "tokenizer_hash" in values else None,
    )


def _gsm8k_candidates(row: JsonRow) -> Iterator[Candidate]:
    """Read one line of the ``gsm8k_solutions`` format, one candidate per model."""
    question = row.text("question")
    models = [name for name, value in row.values.items() if isinstance(value, dict)]
    if not models:
        raise ValueError(
            f"{row.where}: expected fields {{'solution', 'is_correct'}} under a model's name, got "
            f"fields {', '.join(map(repr, row.values))}; is this the file of model solutions?"
        )
    for model in models:
        solution = JsonRow(path=row.path, line=row.line, values=row.values[model])
        if not isinstance(solution.required("is_correct"), bool):
            raise _wrong(solution, "is_correct", "true or false")
        yield Candidate(
            where=f"{row.where}, {model}",
            problem_id=None,
            problem_text=question,
            text=_ANNOTATION.sub("", solution.text("solution")),
            token_ids=None,
            finish_reason="stop",
            source_model=model,
            label=solution.values["is_correct"],
            rollout_logprobs=(),
            temperature=None,
            seed=None,
            num_tries=1,
            flops=0.0,
            seconds=0.0,
            tokenizer_hash=None,
        )


def _exactly_one(row: JsonRow, first: str, second: str) -> None:
    """Refuse a line that has both fields or neither."""
    if (first in row.values) == (second in row.values):
        both = "both" if first in row.values else "neither"
        raise ValueError(
            f"{row.where}: expected exactly one of the fields {first!r} and {second!r}, got {both}"
        )


def _numbers[T: (int, float)](row: JsonRow, field: str, kind: type[T]) -> tuple[T, ...] | None:
    """Return a non-empty list of numbers, or None when the field is not there."""
    if field not in row.values:
        return None
    value = row.values[field]
    if isinstance(value, list) and value and all(_is_number(v, kind) for v in value):
        return tuple(kind(v) for v in value)
    raise _wrong(row, field, f"a non-empty list of {kind.__name__}")


def _optional[D](row: JsonRow, field: str, kind: type, default: D) -> Any | D:  # noqa: ANN401 - typed by kind
    """Return a scalar field of the given kind, or the default when it is missing or null."""
    value = row.values.get(field)
    if value is None:
        return default
    if isinstance(value, bool) if kind is bool else _is_number(value, kind):
        return kind(value)
    raise _wrong(row, field, f"a value of type {kind.__name__}")


def _is_number(value: object, kind: type) -> bool:
    """Return whether a JSON value is an int, or for ``float`` any number."""
    accepted = (int, float) if kind is float else (int,)
    return isinstance(value, accepted) and not isinstance(value, bool)


def _wrong(row: JsonRow, field: str, expected: str) -> ValueError:
    """Return the error of a field with a wrong value."""
    return ValueError(
        f"{row.where}: field {field!r} must be {expected}, got {str(row.values[field])[:60]!r}"
    )
