"""Prompt rendering and the hashes that identify it."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prefixrl_mcore.config.data import PromptConfig
from prefixrl_mcore.data.prompts import PromptRenderer
from prefixrl_mcore.records import Problem
from tests.support.byte_tokenizer import END, write_byte_tokenizer
from tests.support.tiny_models import BOS_ID, EOS_ID, build_tiny_tokenizer

PROBLEM = Problem(problem_id="p", text="1 + {1} ?", answer="2")
TEXT = PromptConfig(style="text", template="Q: {problem}\nA: \\boxed{{}}")
CHAT = PromptConfig(template="{problem} Box it.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_text_style_encodes_the_filled_template(folder: Path) -> None:
    renderer = PromptRenderer(folder, TEXT)
    prompt = renderer.render(PROBLEM)
    assert prompt.problem is PROBLEM
    assert renderer.decode(prompt.token_ids) == "Q: 1 + {1} ?\nA: \\boxed{}"
    assert len(prompt.token_ids) == len("Q: 1 + {1} ?\nA: \\boxed{}")


def test_chat_style_applies_the_template_with_a_generation_prompt(folder: Path) -> None:
    renderer = PromptRenderer(folder, CHAT)
    prompt = renderer.render(PROBLEM)
    expected = "<|start|>user\n1 + {1} ? Box it.<|end|><|start|>assistant\n"
    assert renderer.decode(prompt.token_ids) == expected
    # Special tokens are one id each: the count is that of the text without them, plus three.
    assert len(prompt.token_ids) == len("user\n1 + {1} ? Box it.assistant\n") + 3


def test_a_system_turn_goes_first(folder: Path) -> None:
    renderer = PromptRenderer(folder, CHAT.model_copy(update={"system": "Think."}))
    text = renderer.decode(renderer.render(PROBLEM).token_ids)
    assert text.startswith("<|start|>system\nThink.<|end|><|start|>user\n")


def test_the_word_level_tokenizer_of_the_demo_model_works(tmp_path: Path) -> None:
    build_tiny_tokenizer().save_pretrained(tmp_path)
    renderer = PromptRenderer(tmp_path, PromptConfig(template="{problem}"))
    prompt = renderer.render(Problem(problem_id="p", text="1 + 2", answer="3"))
    assert prompt.token_ids[0] == BOS_ID
    assert renderer.decode(prompt.token_ids) == "<bos> <user> 1 + 2 :"
    assert renderer.stop_token_ids == (EOS_ID,)
    # Punctuation is not moved to the word before it.
    assert renderer.decode(renderer.encode_continuation("1 , 2")) == "1 , 2"


def test_completion_text_leaves_out_only_a_final_end_token(folder: Path) -> None:
    renderer = PromptRenderer(folder, TEXT)
    token_ids = renderer.encode_continuation("The answer is 2")
    end = renderer.end_token_id
    assert renderer.completion_text((*token_ids, end)) == "The answer is 2"
    assert renderer.completion_text(token_ids) == "The answer is 2"
    assert renderer.decode((*token_ids, end)) == f"The answer is 2{END}"
    assert renderer.completion_text(()) == ""


def test_decoding_does_not_clean_up_spaces(folder: Path) -> None:
    renderer = PromptRenderer(folder, TEXT)
    for text in ("a , b .  c 's", " leading", "do n't ?", "\n\n", "é ∑ 漢"):
        assert renderer.decode(renderer.encode_continuation(text)) == text


def test_stop_tokens_come_from_the_generation_config(folder: Path, tmp_path: Path) -> None:
    assert PromptRenderer(folder, TEXT).stop_token_ids == (257,)
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = copy / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [9, 257, 9]}))
    renderer = PromptRenderer(copy, TEXT)
    assert (renderer.stop_token_ids, renderer.end_token_id) == ((9, 257), 257)
    config.write_text(json.dumps({"eos_token_id": 9}))
    renderer = PromptRenderer(copy, TEXT)
    assert (renderer.stop_token_ids, renderer.end_token_id) == ((9,), 9)
    config.write_text(json.dumps({"eos_token_id": [999]}))
    with pytest.raises(ValueError, match=r"end tokens in 0\.\.257, got \[999\]"):
        PromptRenderer(copy, TEXT)
    config.write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        PromptRenderer(copy, TEXT)


def test_the_tokenizer_hash_depends_on_content_and_not_on_place_or_use(
    folder: Path, tmp_path: Path
) -> None:
    renderer = PromptRenderer(folder, TEXT)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert PromptRenderer(copy, TEXT).tokenizer_hash == renderer.tokenizer_hash
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.pad_token = END
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path / "used")
    assert PromptRenderer(tmp_path / "used", TEXT).tokenizer_hash == renderer.tokenizer_hash
    merged = write_byte_tokenizer(tmp_path / "merged", merges=(("a", "b"),))
    assert PromptRenderer(merged, TEXT).tokenizer_hash != renderer.tokenizer_hash
    assert PromptRenderer(merged, TEXT).chat_template_hash == renderer.chat_template_hash


def test_the_order_of_merges_changes_the_tokenizer_hash(tmp_path: Path) -> None:
    # Both have the same tokens; "abc" is tokenised differently.
    merges = ((("a", "b"), ("b", "c")), (("b", "c"), ("a", "b")))
    renderers = [
        PromptRenderer(write_byte_tokenizer(tmp_path / str(i), merges=m), TEXT)
        for i, m in enumerate(merges)
    ]
    assert renderers[0].tokenizer_hash != renderers[1].tokenizer_hash


def test_the_template_hash_depends_on_everything_that_makes_the_prompt(
    folder: Path, tmp_path: Path
) -> None:
    other = write_byte_tokenizer(tmp_path, chat_template="{{ messages[0]['content'] }} ")
    hashes = {
        PromptRenderer(folder, CHAT).chat_template_hash,
        PromptRenderer(folder, CHAT.model_copy(update={"system": ""})).chat_template_hash,
        PromptRenderer(
            folder, CHAT.model_copy(update={"template": "{problem}"})
        ).chat_template_hash,
        PromptRenderer(folder, CHAT.model_copy(update={"style": "text"})).chat_template_hash,
        PromptRenderer(other, CHAT).chat_template_hash,
    }
    assert len(hashes) == 5
    # The chat template does not matter for plain text.
    text = {PromptRenderer(f, TEXT).chat_template_hash for f in (folder, other)}
    assert len(text) == 1


def test_a_template_that_prints_the_date_gives_the_same_prompt_every_day(tmp_path: Path) -> None:
    template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}Today: {{ date_string }}\n{{ messages[0]['content'] }}"
    )
    folder = write_byte_tokenizer(tmp_path, chat_template=template)
    renderer = PromptRenderer(folder, CHAT)
    text = renderer.decode(renderer.render(PROBLEM).token_ids)
    assert text.startswith("Today: 26 Jul 2024\n")
    assert datetime.now().strftime("%d %b %Y") not in text


def test_a_missing_chat_template_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    folder = write_byte_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match=r"no chat template.*set data\.prompt\.style = 'text'"):
        PromptRenderer(folder, CHAT)
    PromptRenderer(folder, TEXT)


def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; set model\.path"):
        PromptRenderer(tmp_path / "none", TEXT)
    with pytest.raises(ValueError, match="cannot be loaded"):
        PromptRenderer(tmp_path, TEXT)


@pytest.mark.parametrize("template", ["{problem} {answer}", "{problem} {}", "{problem} {"])
def test_a_template_with_other_fields_is_an_error(folder: Path, template: str) -> None:
    with pytest.raises(ValueError, match=r"the only field is \{problem\}"):
        PromptRenderer(folder, PromptConfig(style="text", template=template))


def test_a_prompt_that_ends_with_a_stop_token_is_an_error(folder: Path) -> None:
    renderer = PromptRenderer(folder, PromptConfig(style="text", template="{problem}" + END))
    with pytest.raises(ValueError, match="problem 'p': the prompt must not be empty and must not"):
        renderer.render(PROBLEM)
