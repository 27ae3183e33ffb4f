"""One case of ``bench.policy``: a model with random weights, its batch, and twenty real updates.

The model is built from a Qwen3 ``config.json`` with random weights, so that nothing is downloaded.
A batch is what a PrefixRL step trains on: groups of rollouts that share prompt and prefix, three
groups with a prefix to one without, packed into streams; tokens and rewards are drawn from a seed.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prefixrl_mcore.accounting.hardware import peak_flops
from prefixrl_mcore.accounting.model_flops import NO_WORK, ModelFlops, Work, sequence_work
from prefixrl_mcore.config.model_shape import read_model_shape
from prefixrl_mcore.config.policy import LossConfig, PolicyConfig
from prefixrl_mcore.data.packing import PackedBatch, pack
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.records import TrainingSequence

_PREFIXED_OF_FOUR = 3
"""PrefixRL mixes problems with and without prefixes 3:1."""

_NUM_WARMUP_STEPS = 4
"""First steps that are not timed: compilation, choice of kernels, growth of the memory pool."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyCase:
    """A model and the work of one step."""

    name: str
    """Part of the record."""

    hf_config: dict[str, Any]
    """What ``config.json`` would say."""

    stream_tokens: int
    """Tokens of a packed stream, one microbatch."""

    num_groups: int
    """Groups of a step."""

    group_size: int
    """Rollouts of a group."""

    prompt_tokens: tuple[int, int]
    """Fewest and most tokens of a prompt."""

    prefix_tokens: tuple[int, int]
    """Fewest and most tokens of a prefix, where there is one."""

    completion_tokens: tuple[int, int]
    """Fewest and most tokens of a completion."""

    lr: float
    """Learning rate, constant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyResult:
    """What twenty updates of one variant took and gave."""

    variant: str
    """Name of the variant."""

    layers: tuple[str, ...]
    """What the policy chose to run on, with the reasons."""

    num_parameters: int
    """Of the model; a tied embedding once."""

    num_tokens: int
    """Prompt, prefix and completion tokens of a step."""

    num_trained_tokens: int
    """Completion tokens of a step."""

    num_computed_tokens: int
    """Tokens that the model ran in a step, kept padding included."""

    model_flops: float
    """Of a step, forward and backward: see ``prefixrl_mcore.accounting.model_flops``."""

    step_seconds: tuple[float, ...]
    """Of every step, in order."""

    seconds: float
    """Median of the steps after the warm-up."""

    tokens_per_second: float
    """``num_tokens / seconds``."""

    mfu: float | None
    """``model_flops / seconds`` over the device's dense peak; None where that is not known."""

    peak_bytes: int | None
    """Most memory that was allocated in the steps; None on the CPU."""

    losses: tuple[float, ...]
    """Of every step, before its update."""

    gradient_norms: tuple[float, ...]
    """Of every step, before clipping."""


def qwen3_config(
    *, hidden: int, layers: int, heads: int, groups: int, ffn: int, vocab: int
) -> dict[str, Any]:
    """Return the ``config.json`` of a Qwen3 model with tied embeddings; heads have at most 128."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": min(128, 2 * hidden // heads),
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    }


FULL = PolicyCase(
    name="qwen3-0.6b",
    hf_config=qwen3_config(hidden=1024, layers=28, heads=16, groups=8, ffn=3072, vocab=151936),
    stream_tokens=16384,
    num_groups=8,
    group_size=8,
    prompt_tokens=(100, 400),
    prefix_tokens=(500, 2000),
    completion_tokens=(300, 3000),
    lr=1e-5,
)
"""Qwen3-0.6B: 0.6e9 parameters, about 160,000 tokens a step."""

TINY = PolicyCase(
    name="tiny",
    hf_config=qwen3_config(hidden=32, layers=2, heads=4, groups=2, ffn=64, vocab=96),
    stream_tokens=256,
    num_groups=4,
    group_size=2,
    prompt_tokens=(4, 10),
    prefix_tokens=(5, 20),
    completion_tokens=(8, 40),
    lr=1e-2,
)
"""The same on a CPU in a second."""


def build_batch(case: PolicyCase, seed: int) -> tuple[PackedBatch, Work]:
    """Return the batch of every step, and how much it runs through the model, padding not counted.

    Rewards are 0 or 1 and advantages what is left without the group's mean, as in REINFORCE; at
    least one rollout of a group succeeds and one fails, so that each group trains.
    """
    generator = np.random.default_rng(seed)
    sequences: list[TrainingSequence] = []
    work = NO_WORK
    for group in range(case.num_groups):
        has_prefix = group % 4 < _PREFIXED_OF_FOUR
        context = _draw_tokens(case, generator, case.prompt_tokens)
        if has_prefix:
            context += _draw_tokens(case, generator, case.prefix_tokens)
        rewards = generator.integers(0, 2, case.group_size)
        rewards[:2] = (0, 1)
        for number, reward in enumerate(rewards.tolist()):
            completion = _draw_tokens(case, generator, case.completion_tokens)
            sequences.append(
                TrainingSequence(
                    sequence_id=f"{group}-{number}",
                    group_index=group,
                    context_token_ids=context,
                    completion_token_ids=completion,
                    advantage=reward - float(rewards.mean()),
                )
            )
            work += sequence_work(len(context) + len(completion), len(completion))
    batch = pack(
        sequences,
        stream_tokens=case.stream_tokens,
        max_completion_tokens=case.completion_tokens[1],
    )
    return batch, work


def run_variant(
    case: PolicyCase,
    variant: str,
    settings: dict[str, Any],
    *,
    num_steps: int,
    seed: int,
    report: Callable[[int, float, float], None],
) -> PolicyResult:
    """Build the policy, update it ``num_steps`` times on the same batch, and return what it took.

    Args:
        case: model and batch.
        variant: its name.
        settings: keys of ``policy`` that make it.
        num_steps: updates; the first ones are not timed.
        seed: of weights and data.
        report: called after each step with its number, seconds and loss.

    Raises:
        ValueError: if there are too few steps, or the machine cannot run the variant.
    """
    if num_steps <= _NUM_WARMUP_STEPS:
        raise ValueError(f"--steps must be above {_NUM_WARMUP_STEPS} of warm-up, got {num_steps}")
    batch, work = build_batch(case, seed)
    policy = MegatronPolicy(
        hf_config=case.hf_config,
        policy=PolicyConfig.model_validate(
            {"optimizer": {"lr": case.lr, "clip_grad": 1.0}, **settings}
        ),
        loss=LossConfig(),
        stream_tokens=case.stream_tokens,
        temperature=1.0,
        num_steps=num_steps,
        seed=seed,
    )
    policy.adopt_model_weights()
    has_cuda = policy.topology.device.type == "cuda"
    if has_cuda:
        torch.cuda.reset_peak_memory_stats()
    updates, step_seconds = [], []
    for step in range(num_steps):
        start = time.perf_counter()
        updates.append(policy.update(batch))
        if has_cuda:
            torch.cuda.synchronize()
        step_seconds.append(time.perf_counter() - start)
        report(step, step_seconds[-1], updates[-1].loss)
    seconds = float(np.median(step_seconds[_NUM_WARMUP_STEPS:]))
    flops = ModelFlops.of(read_model_shape(case.hf_config)).forward_backward(work)
    peak = peak_flops(torch.cuda.get_device_name(), "bfloat16") if has_cuda else None
    result = PolicyResult(
        variant=variant,
        layers=policy.layers.reasons,
        num_parameters=sum(p.numel() for c in policy.model_chunks for p in c.parameters()),
        num_tokens=work.num_tokens,
        num_trained_tokens=batch.num_trained_tokens,
        num_computed_tokens=updates[0].num_computed_tokens,
        model_flops=flops,
        step_seconds=tuple(step_seconds),
        seconds=seconds,
        tokens_per_second=work.num_tokens / seconds,
        mfu=None if peak is None else flops / seconds / peak,
        peak_bytes=torch.cuda.max_memory_allocated() if has_cuda else None,
        losses=tuple(update.loss for update in updates),
        gradient_norms=tuple(update.gradient_norm for update in updates),
    )
    del policy  # before the next variant is built
    gc.collect()
    if has_cuda:
        torch.cuda.empty_cache()
    return result


def _draw_tokens(
    case: PolicyCase, generator: np.random.Generator, length: tuple[int, int]
) -> tuple[int, ...]:
    """Return random tokens, small ids more often, as frequent tokens are in a text."""
    vocab = int(case.hf_config["vocab_size"])
    number = int(generator.integers(length[0], length[1] + 1))
    return tuple((vocab * generator.random(number) ** 4).astype(np.int64).tolist())
