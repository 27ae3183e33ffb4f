"""Tiny Hugging Face model folders with random weights, written where a test asks for them.

The model is a Qwen3 of 32 tokens. Its weights are random but large, so that its distributions
are far from uniform and greedy continuations differ from context to context.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"

VOCABULARY: tuple[str, ...] = (
    *(PAD, BOS, EOS, UNK),
    *"0123456789",
    *"abcdef",
    *("+", "-", "*", "=", ":", ",", "(", ")"),
    *(r"\boxed{0}", r"\boxed{1}", r"\boxed{2}"),
    "<user>",
)
"""[32] token of each id: words are separated by blanks, a boxed value is one token."""

PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(4)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} <user> {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} :{% endif %}"
)
"""``<bos> <user> 1 + 2 :`` for the one-message conversation ``1 + 2``."""

_WEIGHT_STD = 0.15
"""Of matrices and embeddings; gives next-token entropies of 1-3 nats at hidden size 64-128."""


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of ``VOCABULARY`` with its chat template."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue] # stub: read-only
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_qwen3(
    *,
    seed: int = 0,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    head_dim: int = 16,
    ffn_size: int = 128,
    vocab_size: int = len(VOCABULARY),
    tie_word_embeddings: bool = True,
) -> Qwen3ForCausalLM:
    """Return a float32 Qwen3 on the CPU whose weights, norms included, are drawn from ``seed``."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=ffn_size,
        max_position_embeddings=4096,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,  # a padding row would be held at zero
        dtype="float32",
    )
    return randomize(Qwen3ForCausalLM(config), seed)


def build_tiny_qwen3_moe(
    *,
    seed: int = 0,
    num_layers: int = 2,
    num_experts: int = 4,
    num_experts_per_token: int = 2,
    is_renormalized: bool = True,
    vocab_size: int = len(VOCABULARY),
    tie_word_embeddings: bool = False,
) -> Qwen3MoeForCausalLM:
    """Return a float32 Qwen3-MoE on the CPU with random weights."""
    config = Qwen3MoeConfig(
        **_shared_settings(num_layers, vocab_size, tie_word_embeddings),
        head_dim=16,
        intermediate_size=128,
        moe_intermediate_size=48,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_token,
        norm_topk_prob=is_renormalized,
    )
    return randomize(Qwen3MoeForCausalLM(config), seed)


def build_tiny_qwen2(
    *,
    seed: int = 0,
    num_layers: int = 2,
    vocab_size: int = len(VOCABULARY),
    tie_word_embeddings: bool = True,
) -> Qwen2ForCausalLM:
    """Return a float32 Qwen2.5 on the CPU with random weights, biases included."""
    config = Qwen2Config(
        **_shared_settings(num_layers, vocab_size, tie_word_embeddings), intermediate_size=128
    )
    return randomize(Qwen2ForCausalLM(config), seed)


def build_tiny_llama(
    *,
    seed: int = 0,
    num_layers: int = 2,
    vocab_size: int = len(VOCABULARY),
    tie_word_embeddings: bool = False,
) -> LlamaForCausalLM:
    """Return a float32 Llama 3 on the CPU with random weights.

    Its rotary embedding was made for 64 positions, so that the frequencies of its small heads
    are unscaled, in between and scaled.
    """
    config = LlamaConfig(
        **_shared_settings(num_layers, vocab_size, tie_word_embeddings),
        intermediate_size=128,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    return randomize(LlamaForCausalLM(config), seed)


def build_tiny_families() -> dict[str, PreTrainedModel]:
    """Return a model of four layers of every family, as the layouts are tested with.

    33 tokens do not divide by two, so that tensor-parallel ranks see a padded vocabulary.
    """
    sizes: dict[str, int] = {"num_layers": 4, "vocab_size": 33}
    return {
        "qwen3": build_tiny_qwen3(**sizes, tie_word_embeddings=False),
        "qwen3-tied": build_tiny_qwen3(**sizes),
        "qwen3-moe": build_tiny_qwen3_moe(**sizes),
        "llama-3": build_tiny_llama(**sizes),
        "qwen2.5-tied": build_tiny_qwen2(**sizes),
    }


def _shared_settings(num_layers: int, vocab_size: int, is_tied: bool) -> dict[str, Any]:
    """Return the sizes that the families have in common."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": is_tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
        "dtype": "float32",
    }


def randomize[T: PreTrainedModel](model: T, seed: int) -> T:
    """Draw all weights of ``model`` from ``seed``; return it, float32, in evaluation mode."""
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = weight.dim() == 1 and not name.endswith(".bias")
            weight.copy_(1.0 + 0.2 * noise if is_norm else _WEIGHT_STD * noise)
    return model


def write_model_folder(model: PreTrainedModel, folder: Path) -> Path:
    """Write ``model``, its generation config and the tiny tokenizer; return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID
    )
    model.save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


def write_tiny_qwen3(folder: Path, *, seed: int = 0, tie_word_embeddings: bool = True) -> Path:
    """Write a complete Hugging Face folder of the tiny Qwen3; return ``folder``."""
    model = build_tiny_qwen3(seed=seed, tie_word_embeddings=tie_word_embeddings)
    return write_model_folder(model, folder)


def write_demo_sized_qwen3(folder: Path, *, seed: int = 0) -> Path:
    """Write a Qwen3 of the size that the demo trains (332k parameters); return ``folder``."""
    model = build_tiny_qwen3(
        seed=seed, hidden_size=128, num_key_value_heads=4, head_dim=32, ffn_size=256
    )
    return write_model_folder(model, folder)
