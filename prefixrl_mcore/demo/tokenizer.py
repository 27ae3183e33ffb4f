r"""The quiz's Hugging Face tokenizer: one token per whitespace-separated word.

Decoding joins tokens with single spaces, so ``\boxed{2}`` survives as one word. The chat template
renders a user turn as ``<bos> <problem>``, the generation prompt as `` :`` and an assistant turn
as `` : <solution> <eos>``.
"""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from prefixrl_mcore.demo.quiz import (
    BOS_TOKEN,
    EOS_TOKEN,
    PAD_TOKEN,
    PROMPT_END_TOKEN,
    UNK_TOKEN,
    Quiz,
)

_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ bos_token + ' ' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ ' " + PROMPT_END_TOKEN + " ' + message['content'] + ' ' + eos_token }}"
    "{%- else -%}{{ raise_exception('the quiz has user and assistant turns only, got '"
    " + message['role']) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' " + PROMPT_END_TOKEN + "' }}{%- endif -%}"
)


def build_tokenizer(quiz: Quiz) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a quiz; token ids follow ``quiz.vocabulary``.

    A word outside the vocabulary becomes the unknown token (inference servers warm up with text of
    their own); ``encode`` refuses it.
    """
    vocabulary = {token: index for index, token in enumerate(quiz.vocabulary)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK_TOKEN))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=quiz.num_prompt_tokens + quiz.max_completion_tokens,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def encode(quiz: Quiz, text: str) -> list[int]:
    """Return the token ids of quiz text without the Hugging Face machinery.

    Raises:
        ValueError: if a word is not a token of the quiz.
    """
    token_ids = {token: index for index, token in enumerate(quiz.vocabulary)}
    unknown = [word for word in text.split() if word not in token_ids]
    if unknown:
        raise ValueError(f"quiz text holds {unknown[0]!r}, which is not in the quiz's vocabulary")
    return [token_ids[word] for word in text.split()]


def write_tokenizer(quiz: Quiz, folder: Path) -> None:
    """Write the tokenizer's files (with the chat template) into an existing folder."""
    build_tokenizer(quiz).save_pretrained(folder)
