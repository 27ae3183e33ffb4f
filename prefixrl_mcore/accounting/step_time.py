"""Time of one training step, predicted from FLOPs, assumed efficiencies and assumed bandwidths.

Nothing here is measured: two layouts can be compared by it, and a run planned roughly. Symbols are
those of ``parameters.py``; ``S`` is the mean length of a sequence, ``T`` the tokens of a microbatch
on one rank, ``R`` its rows, ``M`` microbatches of a data-parallel rank, ``v`` chunks of a stage.

FLOPs are those of ``model_flops.py``: matrix products of ``T`` tokens, causal attention over
``T S / 2`` pairs, and the output layer on ``R`` rows, shared by the tensor-parallel ranks (routed
tokens are taken as balanced). The backward pass costs twice the forward pass; full recomputation
runs the layers once more, selective recomputation its modules.
"""

from dataclasses import dataclass

from prefixrl_mcore.accounting.model_flops import ModelFlops
from prefixrl_mcore.accounting.parameters import rank_parameters, replicas, stage_layers
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig, PolicyConfig
from prefixrl_mcore.config.precision import recomputed_modules


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What is taken for granted about GPUs and network."""

    peak_flops: float
    """FLOPs per second of one GPU in the policy's precision, dense."""

    update_efficiency: float = 0.4
    """Share of the peak that forward and backward passes reach, bubbles and communication apart."""

    rollout_efficiency: float = 0.1
    """Share of the peak that sampling reaches; decoding waits for memory most of the time."""

    rollout_gpus: int | None = None
    """GPUs that sample; None is as many as the trainer has."""

    decode_seconds: float = 0.0
    """Least time of sampling one step's rollouts: reading weights and caches
    (``server_memory.py``)."""

    gpus_per_node: int = 8
    """Consecutive ranks that are joined by the fast network."""

    fast_bytes_per_second: float = 300e9
    """What a GPU sends in a collective within a node."""

    slow_bytes_per_second: float = 40e9
    """What a GPU sends in a collective between nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """The rollouts of one step."""

    num_rollouts: int
    """Sequences."""

    mean_tokens: float
    """``S``: prompt, prefix and completion."""

    mean_completion_tokens: float
    """Rows of a sequence."""

    stream_tokens: int
    """Length of a stream."""

    group_size: int = 1
    """Rollouts that stay together in one stream if they fit."""

    has_reference: bool = False
    """A frozen reference scores the sequences before the update (``loss.kl``)."""

    @property
    def num_tokens(self) -> float:
        """Tokens of all sequences."""
        return self.num_rollouts * self.mean_tokens

    @property
    def num_units(self) -> int:
        """Groups, or sequences where a group does not fit into a stream; they are not cut."""
        return -(-self.num_rollouts // self._unit_sequences)

    def num_microbatches(self, parallel: ParallelConfig) -> int:
        """Return ``M``: full streams, shared by the data-parallel ranks, as they are packed."""
        streams = -(-self.num_units // self._units_per_stream)
        number = -(-streams // parallel.data_parallel_size)
        multiple = parallel.microbatch_multiple
        return -(-number // multiple) * multiple

    def busiest_tokens(self, parallel: ParallelConfig) -> float:
        """Return the tokens of the data-parallel rank that has most of the sequences."""
        units = -(-self.num_units // parallel.data_parallel_size)
        return min(self.num_rollouts, units * self._unit_sequences) * self.mean_tokens

    @property
    def _unit_sequences(self) -> int:
        """Sequences that are placed together."""
        return self.group_size if self.group_size * self.mean_tokens <= self.stream_tokens else 1

    @property
    def _units_per_stream(self) -> int:
        """Units that fit into a stream."""
        return max(1, int(self.stream_tokens // (self._unit_sequences * self.mean_tokens)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of one step."""

    rollout: float
    """Sampling: one forward pass over every token on ``rollout_gpus``, nothing taken from a cache;
    at least ``decode_seconds``."""

    compute: float
    """``M`` microbatches through the slowest pipeline stage."""

    bubble: float
    """``(pp - 1) / v`` microbatches more, in which stages wait for each other."""

    communication: float
    """Collectives, none of them hidden behind computation: tensor parallel, context parallel,
    exchange of routed tokens, gradients."""

    reference: float
    """The reference's forward passes; 0 without one. Its weights' way to the GPU is left out."""

    @property
    def update(self) -> float:
        """Forward, backward and gradients."""
        return self.compute + self.bubble + self.communication

    @property
    def total(self) -> float:
        """The whole step; verification, weight sync, optimizer and saving are left out."""
        return self.rollout + self.reference + self.update


def estimate_step_time(
    shape: ModelShape, policy: PolicyConfig, work: StepWork, assumptions: Assumptions
) -> StepTime:
    """Return the time of one step in a layout that has passed the checks of ``config.layout``."""
    parallel = policy.parallel
    num_microbatches = work.num_microbatches(parallel)
    tokens = _microbatch_tokens(work, parallel, num_microbatches)
    rate = assumptions.peak_flops * assumptions.update_efficiency
    sampling_gpus = assumptions.rollout_gpus or parallel.world_size
    stages = range(parallel.pipeline_model_parallel_size)
    slowest = max(_stage_flops(shape, policy, work, stage, tokens) for stage in stages)
    idle = (len(stages) - 1) / (parallel.virtual_pipeline_model_parallel_size or 1)
    forward = _forward_seconds(shape, policy, tokens, assumptions)
    communication = (2 + (policy.recompute == "full")) * forward
    communication += _gathered_again_seconds(shape, policy, tokens, assumptions)
    reference = 0.0
    if work.has_reference:
        flops = max(_forward_flops(shape, policy, work, stage, tokens) for stage in stages)
        reference = (num_microbatches + idle) * (flops / rate + forward)
    return StepTime(
        rollout=max(
            _sampling_flops(shape, work)
            / (sampling_gpus * assumptions.peak_flops * assumptions.rollout_efficiency),
            assumptions.decode_seconds,
        ),
        compute=num_microbatches * slowest / rate,
        bubble=idle * slowest / rate,
        communication=(num_microbatches + idle) * communication
        + _gradient_seconds(shape, policy, assumptions),
        reference=reference,
    )


def _sampling_flops(shape: ModelShape, work: StepWork) -> float:
    """Return the FLOPs of sampling one step's rollouts."""
    flops = ModelFlops.of(shape)
    per_token = flops.per_token + flops.per_pair * work.mean_tokens / 2
    rows = work.num_rollouts * work.mean_completion_tokens
    return work.num_tokens * per_token + rows * flops.per_row


def _microbatch_tokens(work: StepWork, parallel: ParallelConfig, num_microbatches: int) -> float:
    """Return ``T``: whole streams under pipeline parallelism, elsewhere without the padding.

    Of the data-parallel rank with most sequences, which the others wait for.
    """
    if parallel.pipeline_model_parallel_size > 1:
        return work.stream_tokens / parallel.context_parallel_size
    return work.busiest_tokens(parallel) / (num_microbatches * parallel.context_parallel_size)


def _forward_flops(
    shape: ModelShape, policy: PolicyConfig, work: StepWork, stage: int, tokens: float
) -> float:
    """Return the FLOPs of one microbatch's forward pass on a rank of a stage."""
    parallel = policy.parallel
    flops = ModelFlops.of(shape)
    share = stage_layers(shape, parallel)[stage] / shape.num_layers
    total = share * tokens * (flops.per_token + flops.per_pair * work.mean_tokens / 2)
    if stage == parallel.pipeline_model_parallel_size - 1:
        total += tokens * work.mean_completion_tokens / work.mean_tokens * flops.per_row
    return total / parallel.tensor_model_parallel_size


def _stage_flops(
    shape: ModelShape, policy: PolicyConfig, work: StepWork, stage: int, tokens: float
) -> float:
    """Return the FLOPs of one microbatch on a rank of a stage, forward and backward."""
    parallel = policy.parallel
    flops = ModelFlops.of(shape)
    share = stage_layers(shape, parallel)[stage] / shape.num_layers
    attention = flops.per_pair * work.mean_tokens / 2
    again = flops.per_token + attention if policy.recompute == "full" else 0.0
    modules = recomputed_modules(policy, shape)
    if {"mlp", "moe"} & set(modules):
        copies = shape.mixture.num_experts_per_token if shape.mixture else 1
        again += 6 * shape.num_layers * copies * shape.ffn_hidden_size * shape.hidden_size
    if "core_attn" in modules:
        again += attention
    recomputed = share * tokens * again / parallel.tensor_model_parallel_size
    return 3 * _forward_flops(shape, policy, work, stage, tokens) + recomputed


def _forward_seconds(
    shape: ModelShape, policy: PolicyConfig, tokens: float, assumptions: Assumptions
) -> float:
    """Return the seconds of a forward pass's collectives on the stage with most layers.

    Per layer, with ``w T H`` bytes of hidden states: two all-reduces (each sends
    ``2 (tp - 1) / tp`` of it); keys and values of the other ``cp - 1`` ranks; routed copies there
    and back. A backward pass takes as long, and so does recomputing the layer.
    """
    parallel = policy.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    width = policy.weight_bytes
    seconds = 2 * _all_reduce_seconds(shape, policy, tokens, assumptions)
    heads = 2 * shape.num_query_groups // tensor * shape.kv_channels
    gathered = (context - 1) * width * tokens * heads
    seconds += gathered / _bandwidth(assumptions, tensor * context)
    if shape.mixture:
        ranks = parallel.expert_model_parallel_size
        copies = shape.mixture.num_experts_per_token * width * tokens * shape.hidden_size / tensor
        seconds += 2 * copies * (ranks - 1) / ranks / _bandwidth(assumptions, ranks)
    return seconds * max(stage_layers(shape, parallel))


def _gathered_again_seconds(
    shape: ModelShape, policy: PolicyConfig, tokens: float, assumptions: Assumptions
) -> float:
    """Return the seconds in which backward gathers the inputs that sequence parallelism cut.

    Two all-gathers a layer, of attention and feed-forward: what one all-reduce sends.
    """
    parallel = policy.parallel
    if not parallel.sequence_parallel:
        return 0.0
    layers = max(stage_layers(shape, parallel))
    return layers * _all_reduce_seconds(shape, policy, tokens, assumptions)


def _all_reduce_seconds(
    shape: ModelShape, policy: PolicyConfig, tokens: float, assumptions: Assumptions
) -> float:
    """Return the seconds of summing hidden states over the tensor-parallel ranks."""
    tensor = policy.parallel.tensor_model_parallel_size
    hidden = policy.weight_bytes * tokens * shape.hidden_size
    return 2 * (tensor - 1) / tensor * hidden / _bandwidth(assumptions, tensor)


def _gradient_seconds(shape: ModelShape, policy: PolicyConfig, assumptions: Assumptions) -> float:
    """Return the seconds in which replicas sum float32 gradients, once a step.

    An all-reduce sends ``2 (n - 1) / n`` of ``4 P`` bytes; the distributed optimizer sends half of
    that, and then the weights, ``w P (n - 1) / n``.
    """
    parallel = policy.parallel
    width = policy.weight_bytes
    is_sharded = policy.optimizer.use_distributed_optimizer
    per_parameter = 4 + width if is_sharded else 8
    stage_ranks = parallel.world_size // parallel.pipeline_model_parallel_size
    bandwidth = _bandwidth(assumptions, stage_ranks)
    slowest = 0.0
    for stage in range(parallel.pipeline_model_parallel_size):
        parameters = rank_parameters(shape, parallel, stage)
        shared, experts = replicas(parallel)
        sent = parameters.shared * (shared - 1) / shared
        sent += parameters.experts * (experts - 1) / experts
        slowest = max(slowest, per_parameter * sent / bandwidth)
    return slowest


def _bandwidth(assumptions: Assumptions, span: int) -> float:
    """Return bytes per second of a collective over ranks that are at most ``span`` apart."""
    if span <= assumptions.gpus_per_node:
        return assumptions.fast_bytes_per_second
    return assumptions.slow_bytes_per_second
