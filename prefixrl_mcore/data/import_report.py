"""What became of every trace of an imported file."""

import collections
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A trace that was not stored."""

    where: str
    """File and line."""

    problem_id: str
    """The problem; empty when unknown."""

    reason: str
    """``unknown_problem``, ``stop_token_inside``, ``token_out_of_range``, ``too_long``,
    ``duplicate``, ``already_solved`` (another trace of the problem is kept), or
    ``verifier:<reason of the verdict>``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Disagreement:
    """A trace whose label and verdict differ."""

    where: str
    """File and line."""

    problem_id: str
    """The problem."""

    answer: str
    """The reference answer."""

    label: bool
    """What the file says."""

    reason: str
    """The verdict's reason."""

    extracted: str
    """The answer that the verifier found; empty when none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """What became of every trace of a file."""

    num_candidates: int
    """Traces in the file."""

    num_accepted: int
    """Traces that were stored."""

    rejections: tuple[Rejection, ...]
    """All others, in the order of the file."""

    num_labelled: int
    """Verified traces with a label."""

    disagreements: tuple[Disagreement, ...]
    """Those whose label and verdict differ."""

    num_inexact_texts: int
    """Texts that do not come back unchanged from their tokens (a lossy tokenizer)."""

    ignored_fields: dict[str, int]
    """Fields of the file that nothing was made of -> lines that have them."""

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> rejections."""
        return dict(collections.Counter(rejection.reason for rejection in self.rejections))

    @property
    def label_agreement(self) -> float | None:
        """Share of labelled, verified traces whose verdict equals the label; None without any."""
        if not self.num_labelled:
            return None
        return 1.0 - len(self.disagreements) / self.num_labelled
