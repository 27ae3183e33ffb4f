"""A byte-level Hugging Face tokenizer folder: every text has tokens, and comes back exactly."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

START, END = "<|start|>", "<|end|>"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""``<|start|>user\\n1 + 1<|end|><|start|>assistant\\n``."""


def write_byte_tokenizer(
    folder: Path,
    *,
    merges: tuple[tuple[str, str], ...] = (),
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write the tokenizer to ``folder`` and return it.

    Ids 0..255 are bytes (in the order of the byte-level alphabet), then one per merge, then START
    and END.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue] # stub: read-only
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue] # stub: read-only
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return folder
