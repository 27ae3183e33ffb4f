"""The demo's base policy: a small Qwen3 trained from scratch to imitate imperfect demonstrators.

Training has two phases. The textbook phase shows mostly sound solutions, so that the policy can
carry the sound methods out; the corpus phase shows few, so that it seldom chooses them. The result
knows how to solve a quiz and almost never does: the starting point that PrefixRL is made for.

Matrices of the layers are trained with Muon, everything else with AdamW.
Shape suffixes: B demonstrations, S sequence, V vocabulary.
"""

import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from prefixrl_mcore.demo.quiz import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, PROMPT_END_TOKEN, Quiz
from prefixrl_mcore.demo.tokenizer import encode, write_tokenizer

_IGNORED_TARGET = -100
_FINAL_LR_FRACTION = 0.02
_MAX_POSITIONS = 512
"""Positions the model declares; rotary embeddings have none that would be trained."""
_QUERY_KEY_NORM_GAIN = 1.5
"""Initial gain of the query and key norms; sharper attention from the start learns to copy the
digits of a problem in fewer steps than a gain of 1."""

_EMBEDDING_STD = 0.1
"""Initial standard deviation of the embedding. With 0.02 here and in the matrices the quiz's table
is not learned in 240 steps (0.43 of the sound steps right); with this and ``hidden_size ** -0.5``
in the matrices every sound step is right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BasePolicySettings:
    """Size and training of the base policy."""

    hidden_size: int = 128
    """Width of the residual stream."""

    num_layers: int = 2
    """Transformer layers."""

    num_attention_heads: int = 4
    """Query heads, each ``hidden_size / num_attention_heads`` wide."""

    num_key_value_heads: int = 4
    """Key and value heads."""

    ffn_hidden_size: int = 256
    """Width of the feed-forward layer."""

    num_steps: int = 360
    """Optimizer steps; every step sees new problems."""

    batch_size: int = 32
    """Demonstrations per step."""

    num_warmup_steps: int = 20
    """Steps of linear warm-up."""

    constant_fraction: float = 0.37
    """Share of the steps before the learning rates fall linearly."""

    textbook_fraction: float = 0.65
    """Share of the steps that show the textbook."""

    textbook_sound_probability: float = 0.7
    """Probability of the sound method per step of a textbook solution."""

    sound_probability: float = 0.1
    """Probability of the sound method per step of a corpus solution."""

    muon_lr: float = 0.03
    """Learning rate of the layers' matrices."""

    adamw_lr: float = 5e-3
    """Learning rate of embeddings and norms."""

    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down."""

    num_threads: int = 1
    """Torch threads; more only help where no other process competes for the cores."""

    seed: int = 0
    """Seed of weights and demonstrations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainProgress:
    """Where pre-training stands, after each step."""

    step: int
    """Steps done."""

    num_steps: int
    """Steps in all."""

    phase: str
    """``textbook`` or ``corpus``."""

    loss_nats: float
    """Mean negative log-likelihood per solution token of the step's batch."""

    seconds: float
    """Wall time since the start."""


OnProgress = Callable[[PretrainProgress], None]


def build_base_policy(
    quiz: Quiz,
    settings: BasePolicySettings,
    folder: Path,
    *,
    on_progress: OnProgress | None = None,
) -> None:
    """Pre-train a base policy and write it as a Hugging Face folder.

    The folder (config, safetensors weights, generation config, tokenizer with chat template)
    appears under its name only when it is complete. Equal arguments give equal weights on one
    machine.

    Args:
        quiz: the rules.
        settings: size and training.
        folder: where to write; must not exist.
        on_progress: called after each step.

    Raises:
        ValueError: if the folder exists.
    """
    if folder.exists():
        raise ValueError(f"base policy folder {folder}: exists; remove it or choose another")
    model = pretrain(quiz, settings, on_progress=on_progress)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _no_progress_bars():
        model.save_pretrained(partial)
    write_tokenizer(quiz, partial)
    partial.replace(folder)


def pretrain(
    quiz: Quiz, settings: BasePolicySettings, *, on_progress: OnProgress | None = None
) -> Qwen3ForCausalLM:
    """Return a float32 policy that imitates the quiz's demonstrators; see the module docstring.

    Raises:
        RuntimeError: if the loss stops being finite.
    """
    rng = random.Random(settings.seed)
    start = time.monotonic()
    num_textbook_steps = round(settings.textbook_fraction * settings.num_steps)
    with _torch_threads(settings.num_threads):
        model = _build_model(quiz, settings)
        optimizers = _build_optimizers(model, settings)
        for step in range(settings.num_steps):
            is_textbook = step < num_textbook_steps
            sound = (
                settings.textbook_sound_probability if is_textbook else settings.sound_probability
            )
            token_ids_BS, targets_BS = demonstration_batch(
                quiz, settings.batch_size, sound_probability=sound, rng=rng
            )
            _set_learning_rates(optimizers, settings, step)
            loss = _train_step(model, optimizers, token_ids_BS, targets_BS, settings.clip_grad)
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"base policy: loss is {loss} at step {step}; lower muon_lr and adamw_lr"
                )
            if on_progress is not None:
                on_progress(
                    PretrainProgress(
                        step=step + 1,
                        num_steps=settings.num_steps,
                        phase="textbook" if is_textbook else "corpus",
                        loss_nats=loss,
                        seconds=time.monotonic() - start,
                    )
                )
    return model.eval()


def demonstration_batch(
    quiz: Quiz, num_demonstrations: int, *, sound_probability: float, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Return new problems with demonstrations, and the next-token targets.

    Returns:
        token_ids_BS: [B, S] int64, prompt + solution, padded on the right.
        targets_BS: [B, S] int64, the token that follows each position where that token belongs to
            the solution (end token included), -100 elsewhere.
    """
    rows: list[list[int]] = []
    for _ in range(num_demonstrations):
        digits = [(rng.randrange(10), rng.randrange(10)) for _ in range(quiz.num_parts)]
        problem = quiz.problem(digits, source="demonstration")
        solution = quiz.demonstration(problem, sound_probability=sound_probability, rng=rng)
        rows.append(encode(quiz, f"{BOS_TOKEN} {problem.text} {PROMPT_END_TOKEN} {solution}"))
    longest = max(len(row) for row in rows)
    pad = quiz.vocabulary.index(PAD_TOKEN)
    token_ids_BS = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    targets_BS = torch.full_like(token_ids_BS, _IGNORED_TARGET)
    for index, row in enumerate(rows):
        solution_ids = row[quiz.num_prompt_tokens :]
        targets_BS[index, quiz.num_prompt_tokens - 1 : len(row) - 1] = torch.tensor(solution_ids)
    return token_ids_BS, targets_BS


def _build_model(quiz: Quiz, settings: BasePolicySettings) -> Qwen3ForCausalLM:
    vocabulary = quiz.vocabulary
    pad, bos, eos = (vocabulary.index(token) for token in (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN))
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.ffn_hidden_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_attention_heads,
        num_key_value_heads=settings.num_key_value_heads,
        head_dim=settings.hidden_size // settings.num_attention_heads,
        max_position_embeddings=_MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        dtype="float32",
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Qwen3ForCausalLM(config)
        _init_weights(model, matrix_std=settings.hidden_size**-0.5)
    model.generation_config = GenerationConfig(pad_token_id=pad, bos_token_id=bos, eos_token_id=eos)
    return model.train()


def _init_weights(model: nn.Module, *, matrix_std: float) -> None:
    for name, parameter in model.named_parameters():
        if _is_layer_matrix(name, parameter):
            nn.init.normal_(parameter, std=matrix_std)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=_EMBEDDING_STD)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.constant_(parameter, _QUERY_KEY_NORM_GAIN)


def _is_layer_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and ".layers." in name


def _build_optimizers(model: nn.Module, settings: BasePolicySettings) -> list[Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the rest, with their peak rates kept."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if _is_layer_matrix(name, p)]
    others = [p for name, p in named if not _is_layer_matrix(name, p)]
    muon = Muon(
        matrices,
        lr=settings.muon_lr,
        momentum=0.9,
        weight_decay=0.0,
        adjust_lr_fn="original",
    )
    adamw = AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def _set_learning_rates(
    optimizers: list[Optimizer], settings: BasePolicySettings, step: int
) -> None:
    scale = learning_rate_scale(settings, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def learning_rate_scale(settings: BasePolicySettings, step: int) -> float:
    """Return the fraction of the peak rates at ``step``: warm-up, constant, linear decay."""
    if step < settings.num_warmup_steps:
        return (step + 1) / settings.num_warmup_steps
    decay_start = settings.constant_fraction * settings.num_steps
    if step < decay_start:
        return 1.0
    progress = (step - decay_start) / (settings.num_steps - decay_start)
    return 1.0 - (1.0 - _FINAL_LR_FRACTION) * progress


def _train_step(
    model: Qwen3ForCausalLM,
    optimizers: list[Optimizer],
    token_ids_BS: Tensor,
    targets_BS: Tensor,
    clip_grad: float,
) -> float:
    """Take one step on the mean loss over solution tokens; return it, nats."""
    # Padding is on the right and attention is causal, so no attention mask is needed.
    logits_BSV = model(input_ids=token_ids_BS, use_cache=False).logits
    loss = functional.cross_entropy(
        logits_BSV.flatten(0, 1), targets_BS.flatten(), ignore_index=_IGNORED_TARGET
    )
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing over the progress that the caller shows."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


@contextmanager
def _torch_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
