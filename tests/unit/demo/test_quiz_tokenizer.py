"""The quiz's tokenizer folder, read back through transformers."""

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefixrl_mcore.demo.quiz import Quiz
from prefixrl_mcore.demo.tokenizer import encode, write_tokenizer

QUIZ = Quiz(num_parts=3, num_ops=3, num_methods=3)
PROBLEM = QUIZ.problem([(6, 6), (0, 4), (8, 7)], source="train")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(QUIZ, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_token_ids_follow_the_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == list(QUIZ.vocabulary)
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert special == (2, 3, 0)


def test_prompt_is_begin_problem_and_colon(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": PROBLEM.text}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert rendered == "<bos> a 6 6 b 0 4 c 8 7 :"
    token_ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert token_ids == encode(QUIZ, str(rendered))
    assert len(encode(QUIZ, str(rendered))) == QUIZ.num_prompt_tokens == 11


def test_solution_survives_encoding_and_decoding(tokenizer: PreTrainedTokenizerFast) -> None:
    text = QUIZ.demonstration(PROBLEM, sound_probability=0.5, rng=random.Random(1))
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert token_ids == encode(QUIZ, text)
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text.removesuffix(" <eos>")


def test_assistant_turn_is_prompt_solution_and_end(tokenizer: PreTrainedTokenizerFast) -> None:
    solution = r"a 6 6 P \boxed{1}"
    turns = [
        {"role": "user", "content": PROBLEM.text},
        {"role": "assistant", "content": solution},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == r"<bos> a 6 6 b 0 4 c 8 7 : a 6 6 P \boxed{1} <eos>"


def test_unknown_words_become_unknown_tokens_but_encode_refuses_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert tokenizer.encode("a hello 6", add_special_tokens=False) == [
        QUIZ.vocabulary.index("a"),
        QUIZ.vocabulary.index("<unk>"),
        QUIZ.vocabulary.index("6"),
    ]
    with pytest.raises(ValueError, match="'hello', which is not in the quiz's vocabulary"):
        encode(QUIZ, "a hello 6")


def test_chat_template_refuses_other_roles(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="user and assistant turns only, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "a"}], tokenize=False)
