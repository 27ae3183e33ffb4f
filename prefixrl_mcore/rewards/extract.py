r"""Where a text states its final answer: the extraction rules, in the order of their rank.

1. **Boxes.** The last closed ``\boxed{...}`` (or ``\fbox{...}``). Boxes that stand side by side,
   with nothing but separators between them (``,`` ``;`` ``and`` ``or`` ``$`` blanks), are one
   answer with several parts. A box that is never closed says nothing.
2. **Phrases.** The last of ``#### x``, a line ``A: x``, ``answer: x``, ``(final) answer is x``, or
   a line ``Final Answer`` with x below it. What follows must be an answer at once: mathematics
   (``$x$``, ``\(x\)``, ``\[x\]``, or a sentence without words), a number (with or without words
   behind it: ``12 apples``), or a few words without any number (``Tuesday``). Where prose follows
   (``Answer: let us see``), the phrase does not count.
3. **Last number**, or last short mathematics with a number in it, whichever ends later. Only for
   a completion that has ended by itself: in one that was cut off it is no answer.

The highest rank that finds something decides; a lower rank is not asked whether it fits better.
A statement counts only if it *ends* behind ``start``, the length of the prefix: what the prefix
has stated is not the policy's merit, but a box that the prefix opens and the completion closes is.

Everything here is linear in the text's length; of very many phrases only the last 64 are read.
No import beyond the standard library.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_MAX_STATEMENT_CHARS = 2000
"""How far behind a phrase its statement may reach."""
_MAX_GAP_CHARS = 40
"""Between two boxes of one answer."""
_MAX_PHRASES = 64
"""Phrases that are read, from the end of the text."""
_MAX_LITERAL_WORDS = 4
"""Longest answer in words that a phrase can state."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_SEPARATORS = re.compile(
    r"(?:[\s,;$~]|\\[,;()\[\] ]|\\q?quad|(?:\\text\s*\{\s*)?\b(?:and|or)\b\s*\}?)*"
)
_PHRASE = re.compile(
    r"(?:"
    r"\#{4}"  # GSM8K's reference solutions
    r"|^[ \t*_]*A[*_]*:"  # GSM8K's published model solutions
    r"|^[ \t#*_]*(?i:final\s+)?(?i:answer)[ \t*_:]*$"  # a heading
    r"|\b(?i:answer)(?:[ \t]+(?i:to|of|for|in)[ \t][^.\n:]{1,80}?)?"
    r"(?:[ \t*_]*[:=]|[ \t*_]+(?i:is|are|equals)\b)(?!\s*n[o']t\b)"
    r")[\s:*_`]*",
    re.MULTILINE,
)
_MATHS = re.compile(
    r"(?<!\\)\$\$(?P<a>[^$]{1,2000})\$\$|(?<![\\\d])\$(?P<b>[^$\n]{1,2000})\$"
    r"|\\\[(?P<c>(?:[^\\]|\\(?![\[\]])){1,2000})\\\]|\\\((?P<d>(?:[^\\\n]|\\(?![()])){1,2000})\\\)"
)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n")
_TRAILING_CHARS = " \t\r\f\v.*_`,:!?"
_COMMANDS = re.compile(r"\\(?:text|mbox|math|operatorname)[a-z]*\s*\{[^{}]*\}|\\[a-zA-Z]+")
_WORDS = re.compile(r"\b(?!(?:and|or|pi|sqrt|sin|cos|tan|ln|log|exp|inf|infty)\b)[a-zA-Z]{2,}")
_DIGIT = re.compile(r"\d")
_NUMBER = re.compile(
    r"(?<![\w.,^])(?:[-+\u2212]\s?)?(?:\\?[$\u20ac\u00a3]\s?)?(?:[-\u2212])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:\s\d+/\d+|\s?/\s?\d+)?(?:\s?(?:\\?%|percent\b))?"
)
_GLUED = re.compile(r"[a-zA-Z]\b|\s?[\^*+(=\\]|:\d")
"""Behind a number these make it the beginning of something larger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A stated answer and where it stands."""

    text: str
    """The answer as it was written, without box or phrase."""

    start: int
    """Index of the first character, box or phrase included."""

    end: int
    """Index behind the last character."""


def find_boxes(text: str) -> list[Statement]:
    """Return every closed box that is not inside another one, in order."""
    boxes: list[Statement] = []
    open_braces: list[tuple[int, int] | None] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "{":
            open_braces.append(None)
        elif token.endswith("{") and token != r"\{":
            open_braces.append(match.span())
        elif token == "}" and open_braces and (opening := open_braces.pop()):
            while boxes and boxes[-1].start > opening[0]:
                boxes.pop()  # it was inside this one
            content = text[opening[1] : match.start()].strip()
            boxes.append(Statement(text=content, start=opening[0], end=match.end()))
    return boxes


def find_phrases(text: str) -> Iterator[Statement]:
    """Yield what the final-answer phrases state, the last one first; most state nothing."""
    matches = list(_PHRASE.finditer(text))[-_MAX_PHRASES:]
    for match in reversed(matches):
        window = text[match.end() : match.end() + _MAX_STATEMENT_CHARS]
        if stated := _read_statement(window):
            content, length = stated
            yield Statement(text=content, start=match.start(), end=match.end() + length)


def find_final(text: str, *, start: int, has_stopped: bool) -> Statement | None:
    """Return the final answer that is stated in ``text[start:]``, by the rules of this module.

    Args:
        text: prefix and completion.
        start: length of the prefix.
        has_stopped: the completion ended by itself.
    """
    return (
        _last_boxes(text, start)
        or next((phrase for phrase in find_phrases(text) if phrase.end > start), None)
        or (_last_number(text, start) if has_stopped else None)
    )


def _last_boxes(text: str, start: int) -> Statement | None:
    """Return the last box, joined with those right before it."""
    boxes = find_boxes(text)
    if not boxes or boxes[-1].end <= start:
        return None
    parts = [boxes.pop()]
    while boxes and _are_side_by_side(text, boxes[-1], parts[-1]):
        parts.append(boxes.pop())
    contents = dict.fromkeys(part.text for part in reversed(parts))
    return Statement(text=", ".join(contents), start=parts[-1].start, end=parts[0].end)


def _are_side_by_side(text: str, left: Statement, right: Statement) -> bool:
    gap = text[left.end : right.start]
    return len(gap) <= _MAX_GAP_CHARS and _SEPARATORS.fullmatch(gap) is not None


def _read_statement(window: str) -> tuple[str, int] | None:
    """Return the answer that a phrase is followed by and its length, or None for prose."""
    maths = _MATHS.match(window)
    if maths and (content := _maths_content(maths)):
        return content, maths.end()
    end = _SENTENCE_END.search(window)
    sentence = window[: end.start() if end else None].rstrip(_TRAILING_CHARS)
    if not sentence:
        return None
    words = _WORDS.findall(_COMMANDS.sub(" ", sentence))
    if not words:
        return sentence, len(sentence)
    number = _NUMBER.match(sentence)
    if number and not _GLUED.match(sentence, number.end()):
        return number.group(), number.end()
    if not _DIGIT.search(sentence) and len(sentence.split()) <= _MAX_LITERAL_WORDS:
        return sentence, len(sentence)
    return None


def _last_number(text: str, start: int) -> Statement | None:
    """Return the last number or inline mathematics with a number, whichever ends later."""
    found = []
    for match in list(_NUMBER.finditer(text))[-1:]:
        found.append(Statement(text=match.group(), start=match.start(), end=match.end()))
    for match in reversed(list(_MATHS.finditer(text))):
        content = _maths_content(match)
        if content and _DIGIT.search(content):
            found.append(Statement(text=content, start=match.start(), end=match.end()))
            break
    last = max(found, key=lambda statement: statement.end, default=None)
    return last if last and last.end > start else None


def _maths_content(match: re.Match[str]) -> str | None:
    """Return what stands between the delimiters, unless it is prose between two prices."""
    content = next(group for group in match.groups() if group is not None).strip()
    return None if _WORDS.search(_COMMANDS.sub(" ", content)) else content
