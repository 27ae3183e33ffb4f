"""``prefixrl check``: what a config would run, worked out without starting anything.

The memory figures are arithmetic from the model's ``config.json``, not measurements; each line
says what it counts, so that a reader can check it.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prefixrl_mcore.accounting.flops import sampling_flops, update_flops
from prefixrl_mcore.config.layout import (
    check_divisible,
    check_experts,
    check_positions,
    check_stream,
    check_supported,
)
from prefixrl_mcore.config.model_shape import ModelShape, read_hf_config, read_model_shape
from prefixrl_mcore.config.precision import check_precision
from prefixrl_mcore.config.run import RunConfig

_GIB = 1024**3
_OPTIMIZER_BYTES = {"bfloat16": 12, "float32": 8}
"""Per parameter: two float32 moments, and beside bfloat16 weights a float32 main weight."""

_HEAD_CHUNK_BYTES = 256 * 1024**2
"""Bound on one chunk of float32 logits, as ``prefixrl_kernels.head`` sets it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """The shape of a decoder and its parameter counts."""

    shape: ModelShape
    """What training builds."""

    num_parameters: int
    """N: tied embedding counted once, norms and biases left out (below one in a thousand)."""

    num_embedding_parameters: int
    """Parameters of embedding and, where untied, output layer; part of N."""

    num_expert_parameters: int
    """Parameters of all experts; part of N, 0 in a dense model."""

    @property
    def num_active_parameters(self) -> int:
        """Parameters that a token meets; the FLOPs of sampling and updates are counted with it."""
        mixture = self.shape.mixture
        if mixture is None:
            return self.num_parameters
        met = self.num_expert_parameters * mixture.num_experts_per_token // mixture.num_experts
        return self.num_parameters - self.num_expert_parameters + met


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one trainer rank; each part on the pipeline stage that needs most of it.

    Symbols: ``P`` parameters on the rank, ``w`` bytes of a weight (2 in bfloat16, 4 in float32),
    ``T`` stream tokens of a rank (those of a stream / ``cp``), ``H`` hidden size, ``L`` layers,
    ``V`` vocabulary, ``tp``, ``pp``, ``cp`` and ``dp`` the parallel sizes.
    """

    weights: float
    """``P w`` with ``P = (layer parameters / pp + embedding parameters / min(pp, 2)) / tp``, where
    experts are divided by ``ep etp`` in place of ``tp``."""

    gradients: float
    """``4 P``: float32 buffer."""

    optimizer: float
    """``12 P`` in bfloat16 (main weight, two moments), ``8 P`` in float32; divided by ``dp cp``
    with ``use_distributed_optimizer``, that of experts by ``tp dp cp / (ep etp)``."""

    activations: float
    """Saved for the backward pass by ``L / pp`` layers in each of the ``pp`` microbatches that the
    first stage holds at most (one forward, one backward): ``34 T H (w / 2) / tp`` per layer, where
    34 is bytes per element of ``T H`` at 16 bit, attention probabilities not stored (selective
    recomputation keeps less, which is not taken off); with full
    recomputation one tensor per layer, ``T H w``, divided by ``tp`` with sequence parallelism.
    The copies of tokens that a mixture routes to its experts are left out."""

    head: float
    """``2 R (V / tp) 4 + 4 (V / tp) H``: one chunk of ``R`` rows of float32 logits with its
    gradient, and the float32 gradient of the output weight. ``R`` is at most ``T`` and at most
    what keeps the logits within 256 MiB, ``2**28 // (4 V / tp)``, but at least 1."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def print_check(config: RunConfig, console: Console | None = None) -> None:
    """Print layout, batch, memory and FLOPs of a config.

    Raises:
        ConfigError: if training would refuse the model or the layout.
    """
    console = console or Console()
    size = read_model_size(config.model.path)
    check_layout(config, size.shape)
    table = Table(title=f"{config.method}: {config.model.path}", show_header=False)
    for name, value in _rows(config, size):
        table.add_row(name, value)
    console.print(table)
    missing = [str(p) for p in _inputs(config) if not p.exists()]
    if missing:
        console.print(f"not there yet: {', '.join(missing)}", style="yellow", highlight=False)


def read_model_size(folder: Path) -> ModelSize:
    """Return the sizes in a Hugging Face folder's ``config.json``.

    Raises:
        ConfigError: if training would refuse the file: it is missing, of a model family that is
            not supported, or asks for something that is not implemented.
    """
    shape = read_model_shape(read_hf_config(folder))
    hidden, heads = shape.hidden_size, shape.num_attention_heads + shape.num_query_groups
    attention = 2 * hidden * shape.kv_channels * heads
    num_embeddings = 1 if shape.tie_word_embeddings else 2
    embedding = num_embeddings * shape.vocab_size * hidden
    mixture = shape.mixture
    feed_forward = 3 * hidden * shape.ffn_hidden_size
    experts = mixture.num_experts * feed_forward if mixture else 0
    router = mixture.num_experts * hidden if mixture else 0
    layer = attention + (experts + router if mixture else feed_forward)
    return ModelSize(
        shape=shape,
        num_parameters=shape.num_layers * layer + embedding,
        num_embedding_parameters=embedding,
        num_expert_parameters=shape.num_layers * experts,
    )


def check_layout(config: RunConfig, shape: ModelShape) -> None:
    """Refuse what training would refuse: an unsupported layout, or one that does not fit the model.

    Raises:
        ConfigError: with the numbers that do not fit.
    """
    check_supported(config.policy.parallel)
    check_divisible(shape, config.policy.parallel)
    check_experts(shape, config.policy)
    check_stream(config.policy.parallel, config.stream_tokens)
    check_precision(shape, config.policy, config.stream_tokens)
    check_positions(shape, config.rollout.max_total_tokens)


def estimate_memory(config: RunConfig, size: ModelSize) -> MemoryEstimate:
    """Return the bytes on the trainer rank that needs most; formulas in ``MemoryEstimate``."""
    policy, parallel = config.policy, config.policy.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    width = 2 if policy.dtype == "bfloat16" else 4
    parts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    experts = size.num_expert_parameters / pp / parts
    layer_parameters = (
        size.num_parameters - size.num_embedding_parameters - size.num_expert_parameters
    )
    others = (layer_parameters / pp + size.num_embedding_parameters / min(pp, 2)) / tp
    on_rank = others + experts
    stepped = on_rank
    if policy.optimizer.use_distributed_optimizer:
        replicas = parallel.data_parallel_size * parallel.context_parallel_size
        stepped = others / replicas + experts / (tp * replicas / parts)
    return MemoryEstimate(
        weights=on_rank * width,
        gradients=on_rank * 4,
        optimizer=stepped * _OPTIMIZER_BYTES[policy.dtype],
        activations=_activation_bytes(config, size.shape, width),
        head=_head_bytes(config, size.shape),
    )


def predict_rank_bytes(config: RunConfig) -> float:
    """Return the bytes that the trainer rank needs which needs most.

    Raises:
        ConfigError: if training would refuse the model.
    """
    return estimate_memory(config, read_model_size(config.model.path)).total


def _activation_bytes(config: RunConfig, shape: ModelShape, width: int) -> float:
    """Return the saved activations of the first stage; ``width`` is bytes of an element."""
    parallel = config.policy.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    elements = config.stream_tokens / parallel.context_parallel_size * shape.hidden_size
    if config.policy.recompute != "full":
        per_layer = 34 * elements * (width / 2) / tp
    else:
        per_layer = elements * width / (tp if parallel.sequence_parallel else 1)
    num_microbatches = pp
    return per_layer * (shape.num_layers / pp) * num_microbatches


def _head_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Return the head's logits and weight gradient on the last stage."""
    parallel = config.policy.parallel
    tp = parallel.tensor_model_parallel_size
    vocab = shape.padded_vocab_size(tp) // tp
    tokens = config.stream_tokens // parallel.context_parallel_size
    rows = min(tokens, max(1, _HEAD_CHUNK_BYTES // (4 * vocab)))
    return 2 * rows * vocab * 4 + vocab * shape.hidden_size * 4


def _rows(config: RunConfig, size: ModelSize) -> list[tuple[str, str]]:
    """Return the lines of the table."""
    parallel, batch, rollout = config.policy.parallel, config.batch, config.rollout
    memory = estimate_memory(config, size)
    num_rollouts = batch.prompts_per_step * batch.group_size
    most_tokens = num_rollouts * rollout.max_total_tokens
    n = size.num_active_parameters
    most_flops = sampling_flops(n, most_tokens) + update_flops(n, most_tokens)
    layout = (
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} x "
        f"CP {parallel.context_parallel_size} x DP {parallel.data_parallel_size} = "
        f"{parallel.world_size} trainer ranks"
    )
    if size.shape.mixture:
        layout += f", experts over {parallel.expert_model_parallel_size}"
        if parallel.expert_tensor_parallel_size > 1:
            layout += f" x {parallel.expert_tensor_parallel_size} (tensor)"
    return [
        (
            "parameters",
            f"{size.num_parameters:.4g} ({size.shape.num_layers} layers, hidden "
            f"{size.shape.hidden_size})" + (f", {n:.4g} for a token" if size.shape.mixture else ""),
        ),
        ("layout", layout),
        ("precision", _precision_row(config)),
        (
            "step",
            f"{batch.prompts_per_step} prompts x {batch.group_size} rollouts = {num_rollouts}",
        ),
        (
            "tokens of a step",
            f"at most {most_tokens:.4g} ({num_rollouts} x {rollout.max_total_tokens}), of them "
            f"{num_rollouts * rollout.max_completion_tokens:.4g} sampled",
        ),
        ("stream", f"{config.stream_tokens} tokens in one microbatch"),
        ("FLOPs of a step", f"at most {most_flops:.3g} (2ND sampling + 6ND update)"),
        (
            "steps",
            f"{config.trainer.num_steps}: at most "
            f"{config.trainer.num_steps * most_flops:.3g} FLOPs",
        ),
        ("prefixes", _prefix_row(config)),
        ("memory: weights", _gib(memory.weights)),
        ("memory: gradients", _gib(memory.gradients)),
        ("memory: optimizer", _gib(memory.optimizer)),
        ("memory: activations", _gib(memory.activations)),
        ("memory: head", _gib(memory.head)),
        ("memory of a rank", f"{_gib(memory.total)} estimated, the engine not included"),
        ("rollout engine", rollout.engine or "sglang, or transformers where it does not start"),
        ("run folder", str(config.run_folder)),
    ]


def _precision_row(config: RunConfig) -> str:
    """Return the precision of the policy and of the logits, which the engine shares."""
    dtype = config.policy.dtype
    logits_dtype = config.model.logits_dtype if dtype == "bfloat16" else dtype
    return f"policy {dtype}, logits {logits_dtype} in trainer and engine"


def _prefix_row(config: RunConfig) -> str:
    """Return what is trained on."""
    prefixes = config.prefixes
    if config.method != "prefixrl":
        return "none: this method trains on the original problems"
    return (
        f"{prefixes.num_per_trace} per trace at {prefixes.min_fraction:.0%}-"
        f"{prefixes.max_fraction:.0%} of its tokens, mixed {prefixes.num_per_trace}:1 with the "
        "original problems"
    )


def _inputs(config: RunConfig) -> list[Path]:
    """Return the files and folders that the run reads."""
    inputs = [config.data.problems, *config.data.held_out.values()]
    if config.method == "prefixrl":
        inputs.append(config.prefixes_folder)
    if config.method != "rl":  # prefixrl too: the store says what the traces cost
        inputs.append(config.traces_folder)
    return inputs


def _gib(num_bytes: float) -> str:
    """Return bytes as GiB."""
    return f"{num_bytes / _GIB:.3f} GiB"
