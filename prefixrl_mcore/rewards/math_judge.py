r"""What a judging child does: extract a stated answer and compare it by math-verify.

This module imports math-verify and sympy, so it is imported in the judging processes only.
Functions here may hang, exhaust memory or crash on what a completion contains; that is why they
run where they can be killed. math-verify's own time limits are switched off: they rest on
``SIGALRM``, which long operations in C never get to see.
"""

import logging
import re
from dataclasses import dataclass
from functools import lru_cache

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase
from sympy.core.random import seed as seed_sympy

from prefixrl_mcore.rewards.extract import find_boxes, find_final, find_phrases
from prefixrl_mcore.rewards.wire import Json

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its limits are off

MAX_ANSWER_CHARS = 4000
"""Longer answers are not parsed; they are right only if they equal the reference literally."""
MAX_SHOWN_CHARS = 200
"""Of an extracted answer that is reported back."""
_MAX_CANDIDATES = 32
"""Different statements of a prefix that are compared with the reference."""

_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0)]
_SIMPLE_INTEGER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3}){1,4}|\d{1,15})")
_WRAPPER = re.compile(
    r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|textrm|textnormal)\s*\{([^{}]*)\}"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u00a0\u2009\u202f]+")
_DELIMITERS = re.compile(r"\\\$|\$|(?<!\\)\\[()\[\]]")
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_THOUSANDS = re.compile(r"(?<=\d)(?: |~|\\[,;:! ]|\{,\})(?=\d{3}(?!\d))")
_MIXED = re.compile(r"([-+]?\d+)\s+(\d+)\s?/\s?(\d+)")
_LOOSE_NUMBERS = re.compile(r"(?<=\d)\s+(?=\d)")
_SCIENTIFIC = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_QUANTITY = re.compile(
    r"(?P<number>[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+]?\.\d+)\s*"
    r"(?:[a-zA-Z]{2,}[a-zA-Z ./-]*|\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?)\.?"
)
_TIME = re.compile(r"\d{1,2}:\d{2}(?:\s?[ap]\.?m\.?)?", re.IGNORECASE)
_LITERAL = re.compile(r"(?=.*[^\W\d_]{2})[^\d\\{}^=<>+*/|]+")
_LONG_WORD = re.compile(r"[^\W\d_]{4}")
_PROSE_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00d7": r"\cdot ",
        "\u00b7": r"\cdot ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u00b0": r"^\circ ",
        "\u20ac": None,
        "\u00a3": None,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer made ready for comparison: words, or what math-verify read."""

    literal: str
    """Lower-case words when the answer is words or a time of day; otherwise empty."""

    parsed: tuple[Basic | MatrixBase | str, ...]
    """math-verify's reading, an expression first where there is one; empty for long words."""

    @property
    def is_understood(self) -> bool:
        """The answer is words, or mathematics that was parsed."""
        return bool(self.literal) or bool(self.parsed and not isinstance(self.parsed[0], str))


def judge(payload: Json) -> Json:
    """Do one job; the payload says which.

    * ``["final", reference, text, start, has_stopped]`` and ``["sequence", reference, text]``
      return ``[reason, extracted]``.
    * ``["check", form, reference]`` returns what is wrong with the reference, or None.
    * ``["states", form, reference, text]`` returns whether the text states the final answer.
    """
    seed_sympy(0)  # sympy tests some identities at random points: verdicts must not vary
    match payload:
        case ["final", str(reference), str(text), int(start), bool(has_stopped)]:
            return list(judge_final(reference, text, start=start, has_stopped=has_stopped))
        case ["sequence", str(reference), str(text)]:
            return list(judge_sequence(reference, text))
        case ["check", str(form), str(reference)]:
            return check(form, reference)
        case ["states", str(form), str(reference), str(text)]:
            return states_answer(form, reference, text)
        case _:
            raise ValueError(f"unknown payload {str(payload)[:200]!r}")


def judge_final(reference: str, text: str, *, start: int, has_stopped: bool) -> tuple[str, str]:
    """Return (reason, extracted) for the last answer that ``text[start:]`` states."""
    statement = find_final(text, start=start, has_stopped=has_stopped)
    if statement is None or not statement.text.strip():
        return "no_answer", ""
    return compare(reference, statement.text), statement.text[:MAX_SHOWN_CHARS]


def judge_sequence(reference: str, text: str) -> tuple[str, str]:
    """Return (reason, extracted) for all boxes of the text against the reference's parts."""
    boxes = [box.text for box in find_boxes(text)]
    extracted = ", ".join(boxes)[:MAX_SHOWN_CHARS]
    parts = split_parts(reference)
    if not boxes:
        return "no_answer", extracted
    if len(boxes) != len(parts):
        return "wrong", extracted
    for part, box in zip(parts, boxes, strict=True):
        reason = compare(part, box)
        if reason != "correct":
            return reason, extracted
    return "correct", extracted


def split_parts(reference: str) -> list[str]:
    """Split at the commas that are outside all brackets; blanks around parts are dropped."""
    parts, depth, begin = [], 0, 0
    for index, character in enumerate(reference):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(reference[begin:index].strip())
            begin = index + 1
    return [*parts, reference[begin:].strip()]


def compare(reference: str, candidate: str) -> str:
    """Return ``correct``, ``wrong``, ``too_long`` or ``bad_reference``.

    Equal strings are equal answers and two short integers are compared as such; all else is
    math-verify's to decide.
    """
    reference, candidate = reference.strip(), candidate.strip()
    if reference == candidate:
        return "correct" if reference else "bad_reference"
    if _SIMPLE_INTEGER.fullmatch(reference) and _SIMPLE_INTEGER.fullmatch(candidate):
        is_same = int(reference.replace(",", "")) == int(candidate.replace(",", ""))
        return "correct" if is_same else "wrong"
    if len(candidate) > MAX_ANSWER_CHARS:
        return "too_long"
    known = read_answer(reference)
    if not known.is_understood:
        return "bad_reference"
    return "correct" if are_equal(known, read_answer(candidate)) else "wrong"


def are_equal(reference: Answer, candidate: Answer) -> bool:
    """Compare two answers: equal words are equal, all else is math-verify's to decide."""
    if reference.literal and reference.literal == candidate.literal:
        return True
    return verify(list(reference.parsed), list(candidate.parsed), timeout_seconds=None)


@lru_cache(maxsize=1024)
def read_answer(text: str) -> Answer:
    """Return an answer ready for comparison.

    Before math-verify reads it: delimiters, calculator annotations and units behind a number are
    dropped, thousands separators joined, mixed numbers and ``1e5`` written in LaTeX. Two of its
    readings are prevented: a word as the product of its letters (``xyz`` may be one, a word of
    four letters is not), and ``1 2``, which is a list here, as the sum 3.
    """
    plain = _tidy(text)
    if _TIME.fullmatch(plain):
        return Answer(literal=re.sub(r"[\s.]", "", plain).casefold(), parsed=())
    literal = ""
    if _LITERAL.fullmatch(plain):
        literal = " ".join(plain.strip(".!\"'` ").casefold().split())
        if _LONG_WORD.search(plain):
            return Answer(literal=literal, parsed=())
    if match := _QUANTITY.fullmatch(plain):
        plain = match["number"]
    elif match := _MIXED.fullmatch(plain):
        plain = rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}"
    elif "\\" not in plain and _LOOSE_NUMBERS.search(plain):
        plain = _LOOSE_NUMBERS.sub(", ", plain)
    elif match := _SCIENTIFIC.fullmatch(plain):
        plain = rf"{match[1]} \cdot 10^{{{match[2]}}}"
    parsed = parse(
        rf"\boxed{{{plain}}}", _EXTRACTION, extraction_mode="first_match", parsing_timeout=0
    )
    return Answer(literal=literal, parsed=tuple(parsed))


def _tidy(text: str) -> str:
    """Return the text without what carries no meaning in an answer."""
    plain = _CALCULATOR.sub("", text).translate(_CHARACTERS)
    plain = _CONTROL.sub(" ", plain).strip().strip("*_`").strip()
    plain = _DELIMITERS.sub("", plain).strip()
    while match := _WRAPPER.fullmatch(plain):
        plain = match[1].strip()
    plain = _THOUSANDS.sub("", plain)
    return plain.removesuffix(".") if plain[-2:-1].isdigit() else plain


def check(form: str, reference: str) -> str | None:
    """Return what is wrong with a reference answer, or None when it can be verified."""
    parts = split_parts(reference) if form == "sequence" else [reference]
    for part in parts:
        shown = repr(part[:MAX_SHOWN_CHARS])
        if not part.strip():
            return f"empty answer in {reference[:MAX_SHOWN_CHARS]!r}"
        if len(part) > MAX_ANSWER_CHARS:
            return f"unknown answer format: {len(part)} characters, at most {MAX_ANSWER_CHARS}"
        answer = read_answer(part)
        if not answer.is_understood:
            return f"unknown answer format: math-verify cannot read {shown}"
        if not answer.literal and _is_prose(part):
            return f"unknown answer format: {shown} mixes words and numbers"
        if not answer.literal and not verify(
            answer.parsed[0], answer.parsed[0], timeout_seconds=None
        ):
            return f"unknown answer format: math-verify does not find {shown} equal to itself"
        are_equal(answer, read_answer("7"))  # may exceed the limits, as it would for every rollout
    return None


def _is_prose(text: str) -> bool:
    """Two words and more that are neither LaTeX nor the unit of a quantity."""
    plain = _tidy(text)
    without_text = re.sub(r"\\[a-z]+\s*\{[a-zA-Z ,.]*\}", " ", plain)
    return not _QUANTITY.fullmatch(plain) and len(_PROSE_WORD.findall(without_text)) >= 2


def states_answer(form: str, reference: str, text: str) -> bool:
    """Whether a text states the final answer: a box or a final-answer phrase that equals it.

    The number merely occurring in the text is no statement. Any box or phrase counts, not only
    the last one. In the sequence form the text states the answer when its first boxes are all
    the parts.
    """
    if form == "sequence":
        boxes, parts = find_boxes(text), split_parts(reference)
        return len(boxes) >= len(parts) and all(
            compare(part, box.text) == "correct" for part, box in zip(parts, boxes, strict=False)
        )
    final = find_final(text, start=0, has_stopped=False)
    statements = [*([final] if final else []), *find_phrases(text), *reversed(find_boxes(text))]
    candidates = list(dict.fromkeys(statement.text for statement in statements))
    return any(
        compare(reference, candidate) == "correct" for candidate in candidates[:_MAX_CANDIDATES]
    )
