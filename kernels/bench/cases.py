"""What is computed: shapes, masks, and random data with the statistics of a trained model.

Shape suffixes: ``T`` tokens of a batch, ``A`` active ones (that carry loss), ``R`` rows given to an
implementation (T or A), ``H`` hidden size, ``V`` vocabulary.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rows = Literal["active", "all"]
"""``active``: an implementation gets the rows that carry loss, packed together. ``all``: it gets
the whole batch, and is told which rows carry loss."""

Mask = Literal["contiguous", "random"]
"""``contiguous``: the tail of every sequence, as completions are. ``random``: any tokens."""

IGNORE_INDEX = -100
"""Target of a row that carries no loss, in the convention of ``torch.nn.functional``."""

_SEQUENCE_TOKENS = 2048
_LOGIT_STD = 3.0
_PLANTED_SHARE = 0.7
_PLANTED_LOGITS = (8.0, 20.0)
"""Most tokens of a completion are near-certain: their target's logit is raised by this much."""
_BLOCK_ROWS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One size and mask; all implementations get the same tensors."""

    hidden_size: int
    """H."""

    vocab_size: int
    """V, the columns that one GPU holds."""

    num_tokens: int
    """T."""

    active_fraction: float
    """Share of the tokens that carry loss, in (0, 1]."""

    mask: Mask
    """Which tokens carry loss."""

    def __post_init__(self) -> None:
        """Refuse sizes without meaning."""
        if min(self.hidden_size, self.vocab_size, self.num_tokens) < 1:
            raise ValueError(f"case: sizes must be positive, got {self.name}")
        if not 0.0 < self.active_fraction <= 1.0:
            raise ValueError(f"case: active fraction must be in (0, 1], got {self.active_fraction}")
        if self.mask not in ("contiguous", "random"):
            raise ValueError(f"case: mask must be contiguous or random, got {self.mask!r}")

    @property
    def num_active(self) -> int:
        """A: tokens that carry loss."""
        return max(1, round(self.active_fraction * self.num_tokens))

    @property
    def shape(self) -> str:
        """Hidden size and vocabulary, as on the command line."""
        return f"{self.hidden_size}/{self.vocab_size}"

    @property
    def row_sets(self) -> tuple[Rows, ...]:
        """The ways in which an implementation can be given the rows; one when all are active."""
        return ("active",) if self.num_active == self.num_tokens else ("active", "all")

    @property
    def name(self) -> str:
        """One line that identifies the case."""
        mask = "" if self.active_fraction == 1.0 else f", {self.mask} mask"
        return f"{self.shape}, T = {self.num_tokens}, active {self.active_fraction:g}{mask}"


SHAPES = ("2560/151936", "4096/151936", "8192/128256", "8192/16032")
"""Qwen3-4B, Qwen3-8B, Llama-3-70B, and one of eight shards of the last."""

TOKENS = (8192, 16384, 32768)
FRACTIONS = (0.2, 0.5, 1.0)
MASKS: tuple[Mask, ...] = ("contiguous", "random")


def sweep(
    shapes: Iterable[str] = SHAPES,
    tokens: Iterable[int] = TOKENS,
    fractions: Iterable[float] = FRACTIONS,
    masks: Sequence[Mask] = MASKS,
) -> list[Case]:
    """Return every combination; masks differ only where not all tokens are active.

    Raises:
        ValueError: if a shape is not written as ``hidden/vocabulary``.
    """
    cases = []
    for shape in shapes:
        hidden_size, vocab_size = _parse_shape(shape)
        for num_tokens in tokens:
            for fraction in fractions:
                for mask in masks if fraction < 1.0 else MASKS[:1]:
                    case = Case(
                        hidden_size=hidden_size,
                        vocab_size=vocab_size,
                        num_tokens=num_tokens,
                        active_fraction=fraction,
                        mask=mask,
                    )
                    cases.append(case)
    return cases


def _parse_shape(text: str) -> tuple[int, int]:
    """Return hidden size and vocabulary of ``hidden/vocabulary``."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"--shapes: expected hidden/vocabulary, as 4096/151936, got {text!r}")
    return int(parts[0]), int(parts[1])


def quick_sweep() -> list[Case]:
    """Return the cases of ``--quick``: they decide every target on one shape."""
    return sweep(("4096/151936",), (8192, 32768), (0.2, 1.0), ("contiguous",))


def tiny_sweep() -> list[Case]:
    """Return the cases of a machine without a GPU: no size is a multiple of a block."""
    return sweep(("64/130",), (24,), (0.5, 1.0), MASKS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What an implementation is given."""

    case: Case
    """The sizes."""

    rows: Rows
    """Which rows these are."""

    hidden_RH: Tensor
    """[R, H] bfloat16 hidden states."""

    weight_VH: Tensor
    """[V, H] bfloat16 output embedding."""

    targets_R: Tensor
    """[R] int64 token ids; ``IGNORE_INDEX`` where a row carries no loss."""

    active_rows: Tensor
    """[A] int64 on the host: rows of ``hidden_RH`` that carry loss, ascending."""

    @property
    def num_active(self) -> int:
        """Rows that carry loss; every implementation divides its sum by this."""
        return self.case.num_active

    @property
    def active_targets(self) -> Tensor:
        """[A] int64 token ids of the rows that carry loss."""
        if self.rows == "active":
            return self.targets_R
        return self.targets_R[self.active_rows.to(self.targets_R.device)]


def build_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Return the whole batch of a case.

    Hidden states are standard normal and the weight is scaled so that logits have a standard
    deviation of about 3; for most rows the target's logit is raised by 8 to 20.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weight_VH = _normal(case.vocab_size, case.hidden_size, generator)
    weight_VH *= _LOGIT_STD / case.hidden_size**0.5
    hidden_TH = _normal(case.num_tokens, case.hidden_size, generator)
    targets_T = torch.randint(
        0, case.vocab_size, (case.num_tokens,), generator=generator, device=device
    )
    _plant(hidden_TH, weight_VH, targets_T, generator)
    active_rows = active_positions(case, seed)
    masked_T = torch.full_like(targets_T, IGNORE_INDEX)
    on_device = active_rows.to(device)
    masked_T[on_device] = targets_T[on_device]
    return Inputs(
        case=case,
        rows="all" if case.num_active < case.num_tokens else "active",
        hidden_RH=hidden_TH,
        weight_VH=weight_VH,
        targets_R=masked_T,
        active_rows=active_rows,
    )


def select_rows(inputs: Inputs, rows: Rows) -> Inputs:
    """Return the batch as one of its row sets; ``active`` copies the rows that carry loss."""
    if rows == inputs.rows:
        return inputs
    if rows == "all":
        raise ValueError("select_rows: a batch of active rows alone does not know the others")
    on_device = inputs.active_rows.to(inputs.hidden_RH.device)
    return Inputs(
        case=inputs.case,
        rows="active",
        hidden_RH=inputs.hidden_RH[on_device],
        weight_VH=inputs.weight_VH,
        targets_R=inputs.targets_R[on_device],
        active_rows=torch.arange(inputs.num_active),
    )


def active_positions(case: Case, seed: int) -> Tensor:
    """Return the [A] ascending positions of the tokens that carry loss, on the host."""
    generator = torch.Generator().manual_seed(seed)
    if case.mask == "random":
        return torch.randperm(case.num_tokens, generator=generator)[: case.num_active].sort().values
    starts = list(range(0, case.num_tokens, _SEQUENCE_TOKENS))
    lengths = [min(_SEQUENCE_TOKENS, case.num_tokens - start) for start in starts]
    counts = _completion_lengths(case, lengths, generator)
    tails = [
        torch.arange(start + length - count, start + length)
        for start, length, count in zip(starts, lengths, counts, strict=True)
    ]
    return torch.cat(tails)


def _completion_lengths(
    case: Case, lengths: Sequence[int], generator: torch.Generator
) -> list[int]:
    """Return completions of half to one and a half times the mean length, A tokens together."""
    factors = (0.5 + torch.rand(len(lengths), generator=generator)).tolist()
    counts = [
        min(length, round(case.active_fraction * length * factor))
        for length, factor in zip(lengths, factors, strict=True)
    ]
    missing = case.num_active - sum(counts)
    for index, length in enumerate(lengths):
        moved = max(-counts[index], min(missing, length - counts[index]))
        counts[index] += moved
        missing -= moved
    return counts


def _normal(num_rows: int, num_columns: int, generator: torch.Generator) -> Tensor:
    """Return standard normal bfloat16; drawn in float32, a block of rows at a time."""
    values = torch.empty(num_rows, num_columns, dtype=torch.bfloat16, device=generator.device)
    for first in range(0, num_rows, _BLOCK_ROWS):
        block = values[first : first + _BLOCK_ROWS]
        block.copy_(torch.randn(block.shape, generator=generator, device=generator.device))
    return values


def _plant(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, generator: torch.Generator
) -> None:
    """Raise the target's logit of most rows by adding a multiple of its weight."""
    low, high = _PLANTED_LOGITS
    for first in range(0, hidden_TH.size(0), _BLOCK_ROWS):
        rows = slice(first, first + _BLOCK_ROWS)
        target_RH = weight_VH[targets_T[rows]].float()
        draws = torch.rand(2, target_RH.size(0), generator=generator, device=hidden_TH.device)
        peaks_R = torch.where(draws[0] < _PLANTED_SHARE, low + (high - low) * draws[1], 0.0)
        scale_R = peaks_R / target_RH.square().sum(1)
        hidden_TH[rows] = (hidden_TH[rows].float() + scale_R[:, None] * target_RH).bfloat16()
