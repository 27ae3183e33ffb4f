"""Token boundaries in decoded text, for word-level and byte-level tokenizers."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from prefixrl_mcore.report.token_spans import TokenPieces


def _words() -> Tokenizer:
    """Return a word-level tokenizer whose decoding puts blanks between words."""
    return Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "66": 2, "\\boxed{0}": 3}, "<eos>"))


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A byte-level BPE without merges: every character outside ASCII is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    return tokenizer


def test_words_end_where_they_end_in_the_text() -> None:
    assert TokenPieces(_words()).ends([1, 2, 3], "a 66 \\boxed{0}") == [1, 4, 14]


def test_an_end_token_may_be_in_the_text_or_not() -> None:
    pieces = TokenPieces(_words())
    assert pieces.ends([1, 0], "a <eos>") == [1, 7]
    assert pieces.ends([1, 0], "a") == [1, 1]


def test_text_of_other_tokens_does_not_align() -> None:
    pieces = TokenPieces(_words())
    assert pieces.ends([1, 2], "a 67") is None
    assert pieces.ends([1], "a 66") is None
    assert pieces.ends([1, 0, 2], "a 66") is None


def test_a_character_of_several_tokens_belongs_to_its_last(byte_level: Tokenizer) -> None:
    text = "x é😀 y"
    token_ids = byte_level.encode(text).ids
    assert len(token_ids) == 10  # 1 + 1 + 2 + 4 + 1 + 1 bytes
    ends = TokenPieces(byte_level).ends(token_ids, text)
    assert ends == [1, 2, 2, 3, 3, 3, 3, 4, 5, 6]


def test_without_a_tokenizer_there_are_no_ends(tmp_path: Path) -> None:
    assert TokenPieces.load(None).ends([1], "a") is None
    assert TokenPieces.load(tmp_path).ends([1], "a") is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert TokenPieces.load(tmp_path).ends([1], "a") is None


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    _words().save(str(tmp_path / "tokenizer.json"))
    assert TokenPieces.load(tmp_path).ends([1, 2], "a 66") == [1, 4]
