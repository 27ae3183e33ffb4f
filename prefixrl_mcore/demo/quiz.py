r"""The K-part quiz: a synthetic, verifiable task that is hard without the start of a solution.

Part ``i`` of a problem names an operation and two digits ``x0 x1``. Its answer is
``k = table[10 * m0 + m1]`` with ``m0 = (x0 + a0) mod 10`` and ``m1 = (x1 + a1) mod 10``; the
digits ``a0 a1`` belong to the operation, the table to the whole quiz. A solution is one step per
part. A step names a method; only one method, the sound one, works the answer out::

    a 6 6 Q 9 1 \boxed{2}      sound: writes m0 m1, then the answer
    a 6 6 S \boxed{0}          any other method: a guess

A problem counts as solved when all K boxed answers are right, so a policy that takes the sound
method with probability ``s`` solves it with ``q ** K``, ``q = s + (1 - s) / num_values``, and
succeeds after a prefix that holds ``j`` steps with ``q ** (K - j)``. The sound method is shared by
all problems and, by default, by all parts: what is learned at the end of a solution helps at its
start. No torch here.
"""

import json
import os
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from prefixrl_mcore.records import Problem

PAD_TOKEN = "<pad>"
UNK_TOKEN = "<unk>"
BOS_TOKEN = "<bos>"
EOS_TOKEN = "<eos>"
PROMPT_END_TOKEN = ":"
"""Stands between the problem and the solution; the chat template's generation prompt."""

ANSWER_SEPARATOR = ","
"""Separates the parts of a reference answer (reward ``answer_form = "sequence"``)."""

_NUM_DIGITS = 10
_METHOD_NAMES = string.ascii_uppercase[string.ascii_uppercase.index("P") :]
_SOUND_STEP_TOKENS = 7


@dataclass(frozen=True, kw_only=True)
class Quiz:
    """The rules of one quiz; equal fields give equal rules, answers and vocabularies."""

    num_parts: int = 8
    """Parts of a problem, each with an answer of its own."""

    num_ops: int = 8
    """Operations; part ``i`` uses operation ``i mod num_ops``. With fewer operations than parts a
    policy has to count steps to know which part comes next, and loses count when its steps grow
    longer than those that it was pre-trained on."""

    num_methods: int = 4
    """Methods that a step can name, one of them sound for each operation."""

    is_method_shared: bool = True
    """All operations have the same sound method. Otherwise each draws its own, and what raises
    one operation's sound method lowers the others': runs then lose operations for good."""

    num_values: int = 3
    """Possible answers of a part; a guess is right with probability ``1 / num_values``."""

    seed: int = 0
    """Seed of the hidden rules: digits and sound method of each operation, and the table."""

    def __post_init__(self) -> None:
        """Refuse sizes that the names or the digits cannot express."""
        bounds = {
            "num_parts": (self.num_parts, 1, 64),
            "num_ops": (self.num_ops, 1, len(string.ascii_lowercase)),
            "num_methods": (self.num_methods, 2, len(_METHOD_NAMES)),
            "num_values": (self.num_values, 2, _NUM_DIGITS),
        }
        for name, (value, low, high) in bounds.items():
            if not low <= value <= high:
                raise ValueError(f"quiz: {name} must lie in {low}..{high}, got {value}")

    @cached_property
    def _rules(self) -> "_Rules":
        return _draw_rules(self)

    @property
    def op_names(self) -> tuple[str, ...]:
        """[num_ops] operation tokens."""
        return tuple(string.ascii_lowercase[: self.num_ops])

    @property
    def method_names(self) -> tuple[str, ...]:
        """[num_methods] method tokens."""
        return tuple(_METHOD_NAMES[: self.num_methods])

    @property
    def sound_methods(self) -> dict[str, str]:
        """Operation token → its sound method's token."""
        methods = (self.method_names[index] for index in self._rules.sound_method_indices)
        return dict(zip(self.op_names, methods, strict=True))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token, in the order of the token ids; the four special tokens come first."""
        digits = tuple(string.digits)
        boxed = tuple(_boxed(value) for value in range(self.num_values))
        special = (PAD_TOKEN, UNK_TOKEN, BOS_TOKEN, EOS_TOKEN)
        return (*special, PROMPT_END_TOKEN, *digits, *boxed, *self.op_names, *self.method_names)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of a rendered prompt: begin, three per part, prompt end."""
        return 2 + 3 * self.num_parts

    @property
    def max_completion_tokens(self) -> int:
        """Tokens of the longest well-formed solution, end token included."""
        return _SOUND_STEP_TOKENS * self.num_parts + 1

    def part_answer(self, part: int, digits: tuple[int, int]) -> int:
        """Return the right value of one part, in 0..num_values - 1."""
        first, second = self._worked_digits(part, digits)
        return self._rules.table[_NUM_DIGITS * first + second]

    def _worked_digits(self, part: int, digits: tuple[int, int]) -> tuple[int, int]:
        offsets = self._rules.offsets[part % self.num_ops]
        return (digits[0] + offsets[0]) % _NUM_DIGITS, (digits[1] + offsets[1]) % _NUM_DIGITS

    def problem(self, digits: Sequence[tuple[int, int]], *, source: str) -> Problem:
        """Return the problem with these digits; its id is ``<source>-<all digits>``.

        Args:
            digits: [num_parts] pairs of digits 0..9.
            source: name of the set that the problem belongs to.
        """
        if len(digits) != self.num_parts:
            raise ValueError(f"quiz: expected {self.num_parts} digit pairs, got {len(digits)}")
        parts = [f"{self._op(part)} {x0} {x1}" for part, (x0, x1) in enumerate(digits)]
        answers = [str(self.part_answer(part, pair)) for part, pair in enumerate(digits)]
        return Problem(
            problem_id=f"{source}-" + "".join(f"{x0}{x1}" for x0, x1 in digits),
            text=" ".join(parts),
            answer=ANSWER_SEPARATOR.join(answers),
        )

    def _op(self, part: int) -> str:
        return self.op_names[part % self.num_ops]

    def digits_of(self, problem: Problem) -> list[tuple[int, int]]:
        """Return the [num_parts] digit pairs that a problem's text states.

        Raises:
            ValueError: if the text is not a problem of this quiz.
        """
        tokens = problem.text.split()
        expected_ops = [self._op(part) for part in range(self.num_parts)]
        if len(tokens) != 3 * self.num_parts or tokens[0::3] != expected_ops:
            raise ValueError(
                f"problem {problem.problem_id}: not a {self.num_parts}-part quiz over "
                f"{' '.join(self.op_names)}, got {problem.text!r}"
            )
        return [(int(x0), int(x1)) for x0, x1 in zip(tokens[1::3], tokens[2::3], strict=True)]

    def demonstration(
        self, problem: Problem, *, sound_probability: float, rng: random.Random
    ) -> str:
        """Return a solution as an imperfect demonstrator writes it, end token included.

        Each step takes the sound method with ``sound_probability``, otherwise one of the others,
        uniformly, and then guesses uniformly.
        """
        steps = [
            self.solution_step(part, digits, method=self._draw_method(part, sound_probability, rng),
                               guess=rng.randrange(self.num_values))
            for part, digits in enumerate(self.digits_of(problem))
        ]  # fmt: skip
        return " ".join([*steps, EOS_TOKEN])

    def _draw_method(self, part: int, sound_probability: float, rng: random.Random) -> str:
        sound = self.sound_methods[self._op(part)]
        if rng.random() < sound_probability:
            return sound
        return rng.choice([method for method in self.method_names if method != sound])

    def solution_step(self, part: int, digits: tuple[int, int], *, method: str, guess: int) -> str:
        """Return one step: worked out if ``method`` is sound for the part, else ``guess``."""
        start = f"{self._op(part)} {digits[0]} {digits[1]} {method}"
        if method != self.sound_methods[self._op(part)]:
            return f"{start} {_boxed(guess)}"
        worked = self._worked_digits(part, digits)
        return f"{start} {worked[0]} {worked[1]} {_boxed(self.part_answer(part, digits))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rules:
    """The hidden part of a quiz."""

    offsets: tuple[tuple[int, int], ...]
    """[num_ops] digits 1..9 added to a part's digits."""

    sound_method_indices: tuple[int, ...]
    """[num_ops] index of the operation's sound method."""

    table: tuple[int, ...]
    """[100] answer of each pair of worked digits."""


def _draw_rules(quiz: Quiz) -> _Rules:
    rng = random.Random(quiz.seed)
    offsets = tuple((rng.randint(1, 9), rng.randint(1, 9)) for _ in range(quiz.num_ops))
    sound = tuple(rng.randrange(quiz.num_methods) for _ in range(quiz.num_ops))
    if quiz.is_method_shared:
        sound = sound[:1] * quiz.num_ops
    table = [index % quiz.num_values for index in range(_NUM_DIGITS**2)]
    rng.shuffle(table)
    return _Rules(offsets=offsets, sound_method_indices=sound, table=tuple(table))


def _boxed(value: int) -> str:
    return f"\\boxed{{{value}}}"


def draw_problem_sets(
    quiz: Quiz, sizes: Mapping[str, int], *, seed: int
) -> dict[str, list[Problem]]:
    """Return one list of problems per name; no two problems of any list have equal digits.

    Args:
        quiz: the rules.
        sizes: set name → number of problems; the name begins each id.
        seed: seed of the digits; the sets depend on the order of ``sizes``.

    Raises:
        ValueError: if more problems are asked for than half of those that exist.
    """
    num_wanted = sum(sizes.values())
    num_existing = _NUM_DIGITS ** (2 * quiz.num_parts)
    if num_wanted > num_existing // 2:
        raise ValueError(
            f"quiz: {num_wanted} problems wanted but only {num_existing} exist with "
            f"{quiz.num_parts} part(s); ask for at most half of them or raise num_parts"
        )
    rng = random.Random(seed)
    seen: set[tuple[tuple[int, int], ...]] = set()
    problem_sets: dict[str, list[Problem]] = {}
    for name, size in sizes.items():
        problems: list[Problem] = []
        while len(problems) < size:
            digits = tuple((rng.randrange(10), rng.randrange(10)) for _ in range(quiz.num_parts))
            if digits not in seen:
                seen.add(digits)
                problems.append(quiz.problem(digits, source=name))
        problem_sets[name] = problems
    return problem_sets


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Write problems as JSONL with the keys ``id``, ``problem`` and ``answer``.

    The file appears under its name only when it is complete; an existing file is replaced.

    Raises:
        ValueError: if two problems share an id.
    """
    ids = [problem.problem_id for problem in problems]
    if len(set(ids)) != len(ids):
        duplicate = next(problem_id for problem_id in ids if ids.count(problem_id) > 1)
        raise ValueError(f"{path}: problem id {duplicate!r} occurs more than once")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for problem in problems:
            row = {"id": problem.problem_id, "problem": problem.text, "answer": problem.answer}
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
