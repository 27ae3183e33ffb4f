"""Memory of one trainer rank in each pipeline stage, predicted from shapes and layout.

The formulas count what is allocated by Megatron's buffers, its optimizers, our layers and head;
``docs/memory.md`` compares them with measured peaks. ``P`` is parameters of the rank, ``w`` bytes
of a weight (2 in bfloat16, 4 in float32), ``T`` stream tokens of a rank (those of a stream /
``cp``), ``M`` microbatches of a step; other symbols are those of ``parameters.py``.
"""

from dataclasses import dataclass, replace

from prefixrl_kernels.head_plan import CPU_ELEMENTS_AT_ONCE, HeadShape, plan_head, row_stride

from prefixrl_mcore.accounting.activations import (
    Device,
    LayerShape,
    backward_bytes,
    final_norm_bytes,
    kept_bytes,
)
from prefixrl_mcore.accounting.parameters import (
    feed_forward_parts,
    rank_parameters,
    stage_layers,
    stepped_parameters,
)
from prefixrl_mcore.config.layout import MIN_FILL
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import LogitsDtype, PolicyConfig
from prefixrl_mcore.config.precision import recomputed_modules

_CPU_TEMPORARIES = 5
"""Of the head's PyTorch row kernels, float32, over ``CPU_ELEMENTS_AT_ONCE`` logits."""

_TYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8": 1}

_TOKEN_BYTES = 32
"""Of a microbatch on the device: id, position, slot and its way back, int64 each."""

_ROW_BYTES = 28
"""Of a microbatch on the device: place and target, int64; advantage, weight, rollout logprob."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The streams of one step."""

    stream_tokens: int
    """Tokens of a stream."""

    stream_rows: int
    """Rows of a stream that enter the head."""

    num_microbatches: int
    """``M``: streams of each data-parallel rank."""

    slots_per_token: float = 1 / MIN_FILL
    """See ``LayerShape``; the default is the most that streams of any lengths need."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage."""

    stage: int
    """Which stage, from 0."""

    weights: float
    """``w P``; ``P`` has the embedding on the first stage, the output weight on the last one, also
    when the two are tied."""

    gradients: float
    """``4 P``: Megatron's float32 buffer."""

    optimizer: float
    """``12 P`` in bfloat16 (main weight and two moments, 4 each, or what the precision-aware
    optimizer's types take), ``8 P`` in float32. The distributed optimizer divides it by ``dp cp``,
    that of experts by ``tp cp dp / (ep etp)``; what ``cpu_offload`` keeps in host memory is not
    in it."""

    activations: float
    """``T n l c``: ``l`` layers of a model chunk, ``n`` chunks whose backward pass is still to come
    (``in_flight_chunks``), ``c`` bytes of a layer per token (``kept_bytes``; the layer's input
    alone, ``s w H``, with full recomputation)."""

    buffers: float
    """Microbatches on the device, 32 bytes a token and 28 a row, all ``M`` of them; with sequence
    parallelism, Megatron's gathered hidden states, ``w T H``; with stages, an output of ``s w T H``
    for each chunk in flight, and a gradient that arrives."""

    head: float
    """On the last stage: the norm before it, the head's own peak (``plan_head``) and the gradient
    of its input, ``s w T H``; when all activations exist, and before any layer is run back."""

    backward: float
    """Gradients while one layer is run back (``backward_bytes``) and the gradient of its last
    matrix, ``w F H``; with recomputation also what that layer computes again."""

    embedding: float
    """On the first stage, at the end of a backward pass: the gradient of the embedding in the
    weight's type, ``w V H / tp``, and of its output; the last microbatch's activations are gone."""

    optimizer_step: float
    """AdamW's temporaries, after all activations are gone: on a GPU torch's AdamW takes roots of
    all second moments at once, ``4 P / replicas`` (Transformer Engine's, which the precision-aware
    optimizer needs, takes nothing); on a CPU twice the largest tensor."""

    last_activations: float
    """The part of ``activations`` that belongs to the microbatch that is run back."""

    @property
    def resident(self) -> float:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def working(self) -> float:
        """The most that a step needs besides: the largest of its phases."""
        kept = self.activations + self.buffers
        return max(
            kept + self.head,
            kept + self.backward,
            kept - self.last_activations + self.embedding,
            self.buffers + self.optimizer_step,
        )

    @property
    def total(self) -> float:
        """The peak."""
        return self.resident + self.working


def estimate_stages(
    shape: ModelShape,
    policy: PolicyConfig,
    workload: Workload,
    *,
    logits_dtype: LogitsDtype = "float32",
    device: Device = "cuda",
) -> tuple[StageMemory, ...]:
    """Return the memory of a rank of every pipeline stage, first to last.

    The layout must have passed the checks of ``config.layout``. Not counted: the rollout engine,
    the CUDA context, NCCL's buffers, and what the allocator loses to fragmentation.

    Args:
        shape: the model.
        policy: precision, layout, optimizer, recomputation, head.
        workload: streams.
        logits_dtype: of a bfloat16 model's logits.
        device: what the policy runs on.
    """
    stages = policy.parallel.pipeline_model_parallel_size
    return tuple(
        _estimate_stage(shape, policy, workload, stage, logits_dtype=logits_dtype, device=device)
        for stage in range(stages)
    )


def in_flight_chunks(policy: PolicyConfig, stage: int, num_microbatches: int) -> int:
    """Return the chunks that have been run forward and not yet back, at most.

    Megatron's schedules: a stage runs ``pp - stage - 1`` microbatches ahead, interleaved
    ``2 (pp - stage - 1) + (v - 1) pp`` chunks (``v`` chunks a rank), and then one more before
    the first backward pass.
    """
    parallel = policy.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, _num_chunks(policy)
    behind = stages - stage - 1
    ahead = behind if chunks == 1 else 2 * behind + (chunks - 1) * stages
    return min(ahead + 1, num_microbatches * chunks)


def _num_chunks(policy: PolicyConfig) -> int:
    """Return the model chunks of a rank."""
    return policy.parallel.virtual_pipeline_model_parallel_size or 1


def _estimate_stage(
    shape: ModelShape,
    policy: PolicyConfig,
    workload: Workload,
    stage: int,
    *,
    logits_dtype: LogitsDtype,
    device: Device,
) -> StageMemory:
    """Return the memory of a rank of one stage."""
    parallel = policy.parallel
    width = policy.weight_bytes
    parameters = rank_parameters(shape, parallel, stage)
    layer = LayerShape(
        shape=shape,
        parallel=parallel,
        width=width,
        device=device,
        slots_per_token=workload.slots_per_token,
        recomputed=recomputed_modules(policy, shape),
    )
    tokens = workload.stream_tokens / parallel.context_parallel_size
    layers = stage_layers(shape, parallel)[stage] // _num_chunks(policy)
    in_flight = in_flight_chunks(policy, stage, workload.num_microbatches)
    is_full = policy.recompute == "full"
    kept = kept_bytes(layer)
    again = kept if is_full else kept_bytes(replace(layer, recomputed=())) - kept
    chunk = tokens * layers * (layer.hidden_bytes if is_full else kept)
    last_matrix = shape.hidden_size * shape.ffn_hidden_size
    last_matrix //= feed_forward_parts(shape, parallel)
    stepped = stepped_parameters(policy, parameters)
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    vocabulary = shape.padded_vocab_size(parallel.tensor_model_parallel_size)
    vocabulary //= parallel.tensor_model_parallel_size
    largest = min(parameters.largest, stepped)
    return StageMemory(
        stage=stage,
        weights=width * parameters.total,
        gradients=4 * parameters.total,
        optimizer=_state_bytes(policy) * stepped,
        activations=in_flight * chunk,
        last_activations=chunk,
        buffers=_buffer_bytes(layer, workload, tokens, in_flight),
        head=(
            _head_bytes(shape, policy, workload, width, logits_dtype, device)
            + tokens * (final_norm_bytes(layer) + layer.hidden_bytes)
            if is_last
            else 0.0
        ),
        backward=(tokens * (backward_bytes(layer) + again) + width * last_matrix),
        embedding=(
            width * vocabulary * shape.hidden_size + tokens * width * shape.hidden_size
            if stage == 0
            else 0.0
        ),
        optimizer_step=_step_bytes(policy, stepped) if device == "cuda" else 8 * largest,
    )


def _state_bytes(policy: PolicyConfig) -> float:
    """Return the bytes of optimizer state for each parameter that this rank steps."""
    optimizer = policy.optimizer
    if policy.dtype == "float32":
        return 8
    types = (optimizer.main_params_dtype, optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype)
    on_device = 1 - optimizer.cpu_offload_fraction if optimizer.cpu_offload else 1
    return on_device * sum(_TYPE_BYTES[name] for name in types)


def _step_bytes(policy: PolicyConfig, stepped: float) -> float:
    """Return what AdamW needs for a while on a GPU."""
    return 0.0 if policy.optimizer.use_precision_aware_optimizer else 4 * stepped


def _buffer_bytes(layer: LayerShape, workload: Workload, tokens: float, in_flight: int) -> float:
    """Return microbatches and pipeline tensors."""
    rows = workload.stream_rows / layer.parallel.context_parallel_size
    batch = workload.num_microbatches * (_TOKEN_BYTES * tokens + _ROW_BYTES * rows)
    if layer.parallel.sequence_parallel:
        batch += tokens * layer.width * layer.shape.hidden_size
    if layer.parallel.pipeline_model_parallel_size == 1:
        return batch
    return batch + (in_flight + 1) * tokens * layer.hidden_bytes


def _head_bytes(
    shape: ModelShape,
    policy: PolicyConfig,
    workload: Workload,
    width: int,
    logits_dtype: LogitsDtype,
    device: Device,
) -> float:
    """Return the peak of the head, as its own planner chooses it.

    Off a GPU its row kernels are PyTorch operations with temporaries, which Triton's have not.
    """
    parallel = policy.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    columns = row_stride(shape.padded_vocab_size(tensor) // tensor)
    rows = -(-workload.stream_rows // context)
    plan = plan_head(
        HeadShape(
            num_rows=rows,
            num_columns=columns,
            hidden_size=shape.hidden_size,
            operand_bytes=width,
            logit_bytes=2 if logits_dtype == "bfloat16" and width == 2 else 4,
            num_ranks=tensor,
            num_sequence_rows=(
                workload.stream_tokens // context if parallel.sequence_parallel else 0
            ),
        ),
        memory_budget_bytes=round(policy.head.memory_gb * 1e9),
        has_private_weight_grad=False,  # both go to main_grad
        is_weight_grad_summed=False,
    )
    if device == "cuda":
        return plan.peak_bytes
    return plan.peak_bytes + _CPU_TEMPORARIES * 4 * min(rows * columns, CPU_ELEMENTS_AT_ONCE)
