"""Where each token of a completion ends in its text, for logprobs by token."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_JOINED = 8
"""Tokens decoded together before a character that is split over tokens counts as undecodable."""


class TokenPieces:
    """Finds token boundaries in decoded text; without a tokenizer it finds none."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """Use ``tokenizer``; None makes :meth:`ends` answer None always."""
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path | None) -> Self:
        """Read ``tokenizer.json`` of a model folder if it is there."""
        file = None if folder is None else folder / "tokenizer.json"
        if file is None or not file.is_file():
            return cls(None)
        try:
            return cls(Tokenizer.from_file(str(file)))
        except Exception as error:  # tokenizers raises no narrower type
            logger.warning("%s cannot be loaded, logprobs are shown by position: %s", file, error)
            return cls(None)

    def ends(self, token_ids: Sequence[int], text: str) -> list[int] | None:
        """Return the offset in ``text`` at which each token ends, or None if they do not align.

        White space that decoding puts between tokens belongs to the token after it. An end token
        that was left out of the text ends where the one before it does; of a character that is
        split over several tokens the last one has the text.

        Args:
            token_ids: [num_completion_tokens] the completion.
            text: what they were decoded to, with or without the end token.
        """
        if self._tokenizer is None:
            return None
        ends: list[int] = []
        waiting: list[int] = []
        position = 0
        for index, token_id in enumerate(token_ids):
            waiting.append(token_id)
            piece = self._decode(waiting)
            if piece.endswith(_REPLACEMENT) and len(waiting) < _MAX_JOINED:
                ends.append(position)
                continue
            waiting = []
            end = _match(text, position, piece)
            if end is None and index == len(token_ids) - 1 and not text[position:].strip():
                end = position
            if end is None:
                return None
            position = end
            ends.append(position)
        return ends if not text[position:].strip() else None

    def _decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of some tokens, special tokens written out."""
        assert self._tokenizer is not None, "ends() returns before it decodes"
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)


def _match(text: str, position: int, piece: str) -> int | None:
    """Return where ``piece`` ends when it stands at ``position``, white space aside."""
    if text.startswith(piece, position):
        return position + len(piece)
    bare = piece.strip()
    start = position
    while start < len(text) and text[start].isspace():
        start += 1
    return start + len(bare) if text.startswith(bare, start) else None
