"""``prefixrl check``: what a config would run, worked out without starting anything.

The memory figures are arithmetic from the model's ``config.json``, not measurements; each line
says what it counts, so that a reader can check it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prefixrl_mcore.accounting.flops import sampling_flops, update_flops
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig

_GIB = 1024**3
_OPTIMIZER_BYTES = 12
"""Per parameter: float32 main weight and two float32 moments (bf16 training)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """The sizes of a dense decoder that the estimates need."""

    hidden_size: int
    """H."""

    num_layers: int
    """Transformer layers."""

    vocab_size: int
    """V."""

    num_parameters: int
    """N: tied embedding counted once, norms and biases left out (below one in a thousand)."""

    num_embedding_parameters: int
    """Parameters of embedding and, where untied, output layer; part of N."""

    num_attention_heads: int
    """Query heads."""

    num_key_value_heads: int
    """Key and value heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one trainer rank, the largest pipeline stage."""

    weights: float
    """Model weights in the training precision."""

    gradients: float
    """Float32 gradient buffer."""

    optimizer: float
    """Main weights and moments, sharded over data-parallel ranks where asked."""

    activations: float
    """Saved activations of one stream; with full recomputation one tensor per layer."""

    head: float
    """Logits of one chunk of rows in float32, twice (values and gradient)."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


def print_check(config: RunConfig, console: Console | None = None) -> None:
    """Print layout, batch, memory and FLOPs of a config.

    Raises:
        ConfigError: if the layout does not fit the model.
    """
    console = console or Console()
    size = read_model_size(config.model.path)
    check_layout(config, size)
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
        ConfigError: if the file or one of its fields is missing.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model.path {folder}: has no config.json; check the path") from None
    try:
        hidden, layers, vocab = (
            int(values[name]) for name in ("hidden_size", "num_hidden_layers", "vocab_size")
        )
        heads, ffn = int(values["num_attention_heads"]), int(values["intermediate_size"])
    except KeyError as error:
        raise ConfigError(f"{path}: field {error} is missing") from None
    kv_heads = int(values.get("num_key_value_heads", heads))
    head_dim = int(values.get("head_dim") or hidden // heads)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    num_embeddings = 1 if values.get("tie_word_embeddings", False) else 2
    embedding = num_embeddings * vocab * hidden
    return ModelSize(
        hidden_size=hidden,
        num_layers=layers,
        vocab_size=vocab,
        num_parameters=layers * (attention + 3 * hidden * ffn) + embedding,
        num_embedding_parameters=embedding,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )


def check_layout(config: RunConfig, size: ModelSize) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        ConfigError: with the arithmetic.
    """
    parallel = config.policy.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    stages = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    for name, value, divisor, knob in (
        ("attention heads", size.num_attention_heads, tp, "tensor_model_parallel_size"),
        ("layers", size.num_layers, stages, "pipeline_model_parallel_size x virtual stages"),
    ):
        if value % divisor:
            raise ConfigError(
                f"policy.parallel: {value} {name} cannot be divided by {knob} = {divisor} "
                f"({value} / {divisor} = {value / divisor:.2f}); choose a divisor of {value}"
            )


def estimate_memory(config: RunConfig, size: ModelSize) -> MemoryEstimate:
    """Return the bytes on the trainer rank that needs most."""
    parallel = config.policy.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    width = 2 if config.policy.dtype == "bfloat16" else 4
    layer_parameters = size.num_parameters - size.num_embedding_parameters
    on_rank = (layer_parameters / pp + size.num_embedding_parameters / min(pp, 2)) / tp
    shards = parallel.data_parallel_size if config.policy.optimizer.use_distributed_optimizer else 1
    optimizer_bytes = _OPTIMIZER_BYTES if config.policy.dtype == "bfloat16" else 8
    tokens = config.stream_tokens / parallel.context_parallel_size
    in_flight = min(pp, 8)
    sharded = tp if parallel.sequence_parallel else 1
    per_token_and_layer = (
        size.hidden_size * width * (34 if config.policy.recompute == "none" else 1)
    )
    per_token_and_layer /= tp if config.policy.recompute == "none" else sharded
    rows = min(tokens, 4096)
    return MemoryEstimate(
        weights=on_rank * width,
        gradients=on_rank * 4,
        optimizer=on_rank * optimizer_bytes / shards,
        activations=tokens * per_token_and_layer * size.num_layers / pp * in_flight,
        head=2 * rows * size.vocab_size / tp * 4,
    )


def _rows(config: RunConfig, size: ModelSize) -> list[tuple[str, str]]:
    """Return the lines of the table."""
    parallel, batch, rollout = config.policy.parallel, config.batch, config.rollout
    memory = estimate_memory(config, size)
    num_rollouts = batch.prompts_per_step * batch.group_size
    most_tokens = num_rollouts * rollout.max_total_tokens
    n = size.num_parameters
    most_flops = sampling_flops(n, most_tokens) + update_flops(n, most_tokens)
    layout = (
        f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} x "
        f"CP {parallel.context_parallel_size} x DP {parallel.data_parallel_size} = "
        f"{parallel.world_size} trainer ranks"
    )
    return [
        ("parameters", f"{n:.4g} ({size.num_layers} layers, hidden {size.hidden_size})"),
        ("layout", layout),
        ("precision", config.policy.dtype),
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
    if config.method == "sft_then_rl":
        inputs.append(config.traces_folder)
    return inputs


def _gib(num_bytes: float) -> str:
    """Return bytes as GiB."""
    return f"{num_bytes / _GIB:.3f} GiB"
