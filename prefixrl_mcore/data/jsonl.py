"""Strict reading of JSON Lines: every fault names the file, the line and the field."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonRow:
    """One object of a JSON Lines file, with its place for error messages."""

    path: Path
    """The file."""

    line: int
    """Line number, from 1."""

    values: dict[str, Any]
    """The object."""

    @property
    def where(self) -> str:
        """``<file>, line <n>``."""
        return f"{self.path}, line {self.line}"

    def required(self, field: str) -> Any:  # noqa: ANN401 - any JSON value; callers check it
        """Return a field's value.

        Raises:
            ValueError: if the row does not have the field.
        """
        if field not in self.values:
            raise ValueError(
                f"{self.where}: field {field!r} is missing; the row has "
                f"{', '.join(map(repr, self.values)) or 'no fields'}; name the right field in the "
                "config or correct the row"
            )
        return self.values[field]

    def text(self, field: str) -> str:
        """Return a field that must be a non-blank string, unchanged."""
        value = self.required(field)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{self.where}: field {field!r} must be a non-empty string, got {_shown(value)}"
            )
        return value

    def scalar_text(self, field: str) -> str:
        """Return a field that may be a string, an integer or a float, as canonical text.

        Strings lose surrounding white space only. Integral floats become integers (``27.0`` is
        ``27``), other floats their shortest exact decimal form.

        Raises:
            ValueError: for any other type, an empty string, or a number that is not finite.
        """
        value = self.required(field)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, float) and math.isfinite(value):
            return str(int(value)) if value.is_integer() else repr(value)
        raise ValueError(
            f"{self.where}: field {field!r} must be a non-empty string or a finite number, "
            f"got {_shown(value)}"
        )


def read_jsonl(path: Path) -> Iterator[JsonRow]:
    """Yield the objects of a UTF-8 JSON Lines file; blank lines are skipped.

    Raises:
        ValueError: if the file is missing or empty, or a line is not UTF-8, not JSON, or not an
            object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: does not exist; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, expected a JSON Lines file") from None
    is_empty = True
    # Split bytes, not text: JSON strings may contain U+2028, which str.splitlines would cut at.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            is_empty = False
            yield JsonRow(path=path, line=number, values=_object(path, number, line))
    if is_empty:
        raise ValueError(f"{path}: is empty, expected one JSON object per line")


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Parse one line as an object."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8: {error}; re-encode the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not valid JSON: {error.msg} at column {error.colno}; "
            "expected one JSON object per line"
        ) from None
    except RecursionError:
        raise ValueError(f"{path}, line {number}: JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, got {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """Render a value for an error, short."""
    text = json.dumps(value, ensure_ascii=False)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
