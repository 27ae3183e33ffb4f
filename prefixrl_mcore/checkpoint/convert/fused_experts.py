"""Experts that a Hugging Face folder stores fused, as weights of single experts.

transformers 5 holds the experts of a layer as two tensors in memory: ``experts.gate_up_proj``
[experts, 2 x width, hidden], gate rows over up rows, and ``experts.down_proj``
[experts, hidden, width]. It writes one tensor per expert and matrix all the same, as
transformers 4 does and SGLang reads, unless it is told not to
(``save_original_format=False``); other tools write the state dict as it is in memory.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from prefixrl_mcore.checkpoint.manifest import CheckpointError

_FUSED_NAME = re.compile(r"(?P<layer>.*\.experts\.)(?P<kind>gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NUM_DIMS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedPart:
    """Where a weight of one expert lies in a fused tensor."""

    name: str
    """Name of the weight of its own, as unfused folders have it."""

    stored_name: str
    """Name of the fused tensor."""

    expert: int
    """Index along the first dimension."""

    first_row: int
    """Where its rows begin."""

    num_rows: int
    """Rows that it has."""

    num_columns: int
    """Columns of the fused tensor."""

    def cut(self, stored: Tensor) -> Tensor:
        """Return the weight.

        Args:
            stored: the fused tensor, or a safetensors slice of it, which reads only what is asked.
        """
        rows = slice(self.first_row, self.first_row + self.num_rows)
        return stored[self.expert : self.expert + 1, rows][0]


def fused_parts(stored_name: str, shape: tuple[int, ...], *, where: Path) -> Iterator[FusedPart]:
    """Yield the weights in a tensor if it is a fused one, otherwise nothing.

    Args:
        stored_name: name in the safetensors file.
        shape: its shape.
        where: the file, for errors.

    Raises:
        CheckpointError: if its rows cannot be half gate and half up.
    """
    match = _FUSED_NAME.fullmatch(stored_name)
    if match is None or len(shape) != _NUM_DIMS:
        return
    parts = _PARTS[match["kind"]]
    num_rows, rest = divmod(shape[1], len(parts))
    if rest:
        raise CheckpointError(
            f"{where}: {stored_name} has shape {list(shape)}, expected an even second dimension, "
            "gate rows over up rows; download the model folder again"
        )
    for expert in range(shape[0]):
        for index, part in enumerate(parts):
            yield FusedPart(
                name=f"{match['layer']}{expert}.{part}.weight",
                stored_name=stored_name,
                expert=expert,
                first_row=index * num_rows,
                num_rows=num_rows,
                num_columns=shape[2],
            )
