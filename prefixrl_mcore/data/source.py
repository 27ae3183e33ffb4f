"""What the trainer takes its prompts from: shuffled epochs over a union, resumable to the item.

The union of prefixed and original problems is one list; with three prefixes per problem it is the
paper's 3:1 mixture. There is no weighting and no curriculum.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prefixrl_mcore.records import PrefixedProblem, Prompt

_logger = logging.getLogger(__name__)


def original_problems(prompts: Iterable[Prompt]) -> list[PrefixedProblem]:
    """Return the problems without a prefix, in the order of the prompts."""
    return [
        PrefixedProblem(
            prefixed_problem_id=prompt.problem.problem_id,
            problem=prompt.problem,
            prompt_token_ids=prompt.token_ids,
        )
        for prompt in prompts
    ]


def union(
    prefixed: Sequence[PrefixedProblem], originals: Sequence[PrefixedProblem]
) -> list[PrefixedProblem]:
    """Return original and prefixed problems in one list, after checking that they belong together.

    Raises:
        ValueError: if a prefixed problem has no original, or another prompt than its original
            (the problem's text was changed after its trace had been recorded).
    """
    by_id = {item.problem.problem_id: item for item in originals}
    for item in prefixed:
        original = by_id.get(item.problem.problem_id)
        if original is None:
            raise ValueError(
                f"prefixed problem {item.prefixed_problem_id!r}: problem "
                f"{item.problem.problem_id!r} is not among the {len(by_id)} training problems; "
                "cut the prefixes again for this problem file"
            )
        if original.prompt_token_ids != item.prompt_token_ids:
            raise ValueError(
                f"prefixed problem {item.prefixed_problem_id!r}: its prompt "
                f"({len(item.prompt_token_ids)} tokens) differs from the problem's prompt now "
                f"({len(original.prompt_token_ids)} tokens); the problem was changed after its "
                "trace was recorded; collect it again"
            )
    return [*originals, *prefixed]


class MixtureSource:
    """Endless shuffled epochs over a fixed set of prefixed problems.

    Each epoch is a permutation that depends on the seed, the epoch and the set only, not on the
    order of the list. An epoch's last items and the next epoch's first may share one ``take``;
    the next epoch's order is then adjusted so that no item comes twice in it.
    """

    def __init__(self, prefixed_problems: Sequence[PrefixedProblem], seed: int) -> None:
        """Start before the first item of epoch 0.

        Args:
            prefixed_problems: the union; ids must be unique.
            seed: seed of the order.

        Raises:
            ValueError: if the list is empty or an id occurs twice.
        """
        if not prefixed_problems:
            raise ValueError("mixture source: got no problems, expected at least one")
        items = sorted(prefixed_problems, key=lambda item: item.prefixed_problem_id)
        ids = [item.prefixed_problem_id for item in items]
        for first, second in itertools.pairwise(ids):
            if first == second:
                raise ValueError(f"mixture source: id {first!r} occurs twice; ids must be unique")
        self._items = items
        self._seed = seed
        self._fingerprint = _fingerprint(items)
        self._epoch = 0
        self._cursor = 0
        self._avoided: tuple[int, ...] = ()
        self._num_head = 0
        self._order = self._make_order()
        self._num_repeats = 0
        self._returned: list[int] = []
        self._index = {item.prefixed_problem_id: index for index, item in enumerate(items)}

    def __len__(self) -> int:
        """Return the number of distinct items."""
        return len(self._items)

    @property
    def num_repeats(self) -> int:
        """Items that came more than once in one ``take``, over the source's life."""
        return self._num_repeats

    def take(self, count: int) -> list[PrefixedProblem]:
        """Return the next ``count`` items, crossing epochs where needed.

        Items that were given back come first; one whose turn in the epoch falls into the same
        ``take`` has it in the next one. No item comes twice unless ``count`` exceeds the number of
        items; then every item comes once before any comes again, the repeats are counted in
        ``num_repeats``, and a warning is logged the first time. Each repeat is a group of its own.

        Raises:
            ValueError: if ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"take: count must be at least 1, got {count}")
        taken = self._take_returned(count)
        returned = frozenset(taken) if count <= len(self._items) else frozenset()
        while len(taken) < count:
            if self._cursor == len(self._order):
                self._start_next_epoch(taken, count)
            index = self._order[self._cursor]
            self._cursor += 1
            (self._returned if index in returned else taken).append(index)
        self._count_repeats(taken)
        return [self._items[index] for index in taken]

    def give_back(self, items: Iterable[PrefixedProblem]) -> None:
        """Put items that were taken, and not used, before all others, in the order given."""
        self._returned = [self._index[i.prefixed_problem_id] for i in items] + self._returned

    def find(self, prefixed_problem_id: str) -> PrefixedProblem:
        """Return the item of an id.

        Raises:
            KeyError: if there is none.
        """
        return self._items[self._index[prefixed_problem_id]]

    def state(self) -> dict[str, Any]:
        """Return a JSON-serialisable position; with the same set and seed it is exact."""
        return {
            "seed": self._seed,
            "fingerprint": self._fingerprint,
            "epoch": self._epoch,
            "cursor": self._cursor,
            "avoided": list(self._avoided),
            "num_head": self._num_head,
            "num_repeats": self._num_repeats,
            "returned": [self._items[index].prefixed_problem_id for index in self._returned],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state()`` of a source over the same set with the same seed.

        Raises:
            ValueError: if the set or the seed differ; the source is then unchanged.
        """
        for name, own in (("seed", self._seed), ("fingerprint", self._fingerprint)):
            if state[name] != own:
                raise ValueError(
                    f"mixture source: {name} of the saved position is {state[name]}, of this run "
                    f"{own}; resume with the same problems, prefixes and seed"
                )
        self._epoch = int(state["epoch"])
        self._cursor = int(state["cursor"])
        self._avoided = tuple(state["avoided"])
        self._num_head = int(state["num_head"])
        self._num_repeats = int(state["num_repeats"])
        self._returned = [self._index[name] for name in state["returned"]]
        self._order = self._make_order()

    def _take_returned(self, count: int) -> list[int]:
        """Take what was given back, each item once where ``count`` leaves room for the others.

        An item stands there more than once if it was given back while a turn of it was put off.
        """
        taken: list[int] = []
        left: list[int] = []
        for index in self._returned:
            is_free = count > len(self._items) or index not in taken
            (taken if is_free and len(taken) < count else left).append(index)
        self._returned = left
        return taken

    def _start_next_epoch(self, taken: Sequence[int], count: int) -> None:
        """Move to the next epoch, whose first items avoid those of the current ``take``."""
        self._epoch += 1
        self._cursor = 0
        recent = taken[-(len(taken) % len(self._items)) :] if len(taken) % len(self._items) else ()
        self._avoided = tuple(sorted(recent))
        self._num_head = min(count - len(taken), len(self._items) - len(self._avoided))
        self._order = self._make_order()

    def _make_order(self) -> list[int]:
        """Return the current epoch's order: the first ``num_head`` items are not avoided ones."""
        rng = np.random.default_rng([self._seed, self._epoch])
        shuffled = rng.permutation(len(self._items)).tolist()
        avoided = set(self._avoided)
        head = [index for index in shuffled if index not in avoided][: self._num_head]
        in_head = set(head)
        return head + [index for index in shuffled if index not in in_head]

    def _count_repeats(self, taken: Sequence[int]) -> None:
        """Count items beyond their first occurrence; warn once."""
        num_repeats = len(taken) - len(set(taken))
        if num_repeats and not self._num_repeats:
            _logger.warning(
                "one step takes %d prompts but there are only %d; the rest are repeated as groups "
                "of their own; lower batch.prompts_per_step to avoid that",
                len(taken),
                len(self._items),
            )
        self._num_repeats += num_repeats


def _fingerprint(items: Sequence[PrefixedProblem]) -> str:
    """Hash the identity of a set: ids, which name trace and cut, and the contexts' lengths."""
    lines = (
        f"{item.prefixed_problem_id}\t{len(item.prompt_token_ids)}\t{len(item.prefix_token_ids)}"
        for item in items
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
