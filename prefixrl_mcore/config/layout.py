"""Which layouts can run a model and a batch.

Training and ``prefixrl check`` both call what is here, so that they refuse the same configs;
nothing here imports torch.
"""

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.experts import ExpertsConfig
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig, PolicyConfig

_GROUPED_BYTES = 16
"""torch's grouped matrix product takes matrices whose rows are multiples of this."""

MIN_FILL = 0.75
"""The padded layout of attention puts sequences of similar length side by side: one shorter than
this part of the longest beside it starts anew, which bounds the attention work at
``1 / 0.75**2 = 1.8`` times the least possible."""


def check_supported(parallel: ParallelConfig) -> None:
    """Refuse sizes that do not go together, whatever the model.

    Raises:
        ConfigError: if a size is not supported; the message names the field.
    """
    experts, cuts = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    stage_ranks = parallel.world_size // parallel.pipeline_model_parallel_size
    if stage_ranks % (experts * cuts):
        size = f"expert_model_parallel_size = {experts}"
        if cuts > 1:
            size += f" x expert_tensor_parallel_size = {cuts} = {experts * cuts}"
        raise ConfigError(
            f"policy.parallel.{size} does not divide the {stage_ranks} ranks of a pipeline stage "
            f"(tensor {parallel.tensor_model_parallel_size} x context "
            f"{parallel.context_parallel_size} x data {parallel.data_parallel_size}), over which "
            "the experts are spread"
        )
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None and parallel.pipeline_model_parallel_size == 1:
        raise ConfigError(
            f"policy.parallel.virtual_pipeline_model_parallel_size = {virtual} needs "
            "pipeline_model_parallel_size > 1, got 1; leave it out or raise "
            "pipeline_model_parallel_size"
        )


def check_divisible(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse a layout that cannot split the model evenly.

    Raises:
        ConfigError: if heads, feed-forward width, layers or experts do not divide, or a mixture of
            experts lacks what it needs.
    """
    _check_mixture(shape, parallel)
    tensor = parallel.tensor_model_parallel_size
    num_layers, chunks = _layers_to_share(shape, parallel)
    ffn_parts, ffn_field = tensor, "tensor_model_parallel_size"
    if shape.mixture:
        ffn_parts = parallel.expert_tensor_parallel_size
        ffn_field = "expert_tensor_parallel_size"
    for what, number, parts, field in (
        ("attention heads", shape.num_attention_heads, tensor, "tensor_model_parallel_size"),
        ("key-value heads", shape.num_query_groups, tensor, "tensor_model_parallel_size"),
        ("feed-forward width", shape.ffn_hidden_size, ffn_parts, ffn_field),
        ("layers", num_layers, chunks, "pipeline_model_parallel_size"),
    ):
        if number % parts:
            raise ConfigError(
                f"policy.parallel.{field}: {number} {what} do not divide into {parts} equal parts"
            )


def _layers_to_share(shape: ModelShape, parallel: ParallelConfig) -> tuple[int, int]:
    """Return the layers that are shared equally, and the chunks of the model that share them.

    Raises:
        ConfigError: if stages with a number of layers of their own leave nothing, or too much.
    """
    stages = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    own = [
        number
        for number in (
            parallel.num_layers_in_first_pipeline_stage,
            parallel.num_layers_in_last_pipeline_stage,
        )
        if number is not None
    ]
    left, sharing = shape.num_layers - sum(own), stages - len(own)
    if own and (sharing < 0 or stages == 1 or (left > 0) != (sharing > 0) or left < 0):
        raise ConfigError(
            "policy.parallel.num_layers_in_first_pipeline_stage and ..._last_...: "
            f"{' + '.join(map(str, own))} of {shape.num_layers} layers leave {left} for {sharing} "
            f"of {stages} pipeline stages; change the numbers or pipeline_model_parallel_size"
        )
    if any(number % virtual for number in own):
        raise ConfigError(
            f"policy.parallel.virtual_pipeline_model_parallel_size: {own} layers of the first and "
            f"last stage do not divide into {virtual} chunks each"
        )
    return left, max(sharing, 1) * virtual


def _check_mixture(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse experts that cannot be spread, and what Megatron cannot run with experts."""
    size = parallel.expert_model_parallel_size
    if shape.mixture is None:
        for field in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(parallel, field) > 1:
                raise ConfigError(
                    f"policy.parallel.{field} = {getattr(parallel, field)} needs a "
                    f"mixture-of-experts model, got {shape.architecture}; set it to 1"
                )
        return
    if shape.mixture.num_experts % size:
        raise ConfigError(
            f"policy.parallel.expert_model_parallel_size: {shape.mixture.num_experts} experts do "
            f"not divide into {size} equal parts"
        )
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            "policy.parallel.sequence_parallel must be true for a mixture of experts with "
            f"tensor_model_parallel_size = {parallel.tensor_model_parallel_size}: each rank routes "
            "its own share of the tokens"
        )


def check_experts(shape: ModelShape, policy: PolicyConfig) -> None:
    """Refuse settings of experts that the model cannot have.

    Raises:
        ConfigError: if the model has no experts, or grouped ones are asked for that cannot be.
    """
    if shape.mixture is None and policy.experts != ExpertsConfig():
        raise ConfigError(
            f"policy.experts needs a mixture-of-experts model, got {shape.architecture}; leave "
            "the section out"
        )
    if policy.experts.implementation == "grouped" and not can_group(shape, policy):
        cuts = policy.parallel.expert_tensor_parallel_size
        raise ConfigError(
            "policy.experts.implementation = 'grouped' needs rows of whole "
            f"{_GROUPED_BYTES} bytes: multiples of {_GROUPED_BYTES // policy.weight_bytes} in "
            f"{policy.dtype}, got hidden_size {shape.hidden_size} and moe_intermediate_size "
            f"{shape.ffn_hidden_size} / expert_tensor_parallel_size {cuts} = "
            f"{shape.ffn_hidden_size // cuts}; use 'sequential'"
        )


def can_group(shape: ModelShape, policy: PolicyConfig) -> bool:
    """Return whether the grouped matrix product takes the model's experts, cut as they are."""
    multiple = _GROUPED_BYTES // policy.weight_bytes
    width = shape.ffn_hidden_size // policy.parallel.expert_tensor_parallel_size
    return shape.hidden_size % multiple == 0 and width % multiple == 0


def check_stream(parallel: ParallelConfig, stream_tokens: int) -> None:
    """Refuse a stream length that context or sequence parallelism cannot split.

    Pipeline stages send each other whole streams, so that every stream has this length, and
    context parallelism cuts whole streams; otherwise the padding is cut off, and only the streams
    themselves can tell.

    Raises:
        ConfigError: if the length does not divide.
    """
    multiple = parallel.stream_multiple
    is_whole = parallel.pipeline_model_parallel_size > 1 or parallel.context_parallel_size > 1
    if is_whole and stream_tokens % multiple:
        below = stream_tokens // multiple * multiple
        raise ConfigError(
            f"stream of {stream_tokens} tokens does not divide into {multiple} equal parts "
            f"({_explain_stream_multiple(parallel)}); set batch.stream_tokens to "
            f"{below + multiple}" + (f" or {below}" if below else "")
        )


def _explain_stream_multiple(parallel: ParallelConfig) -> str:
    """Return the arithmetic of ``ParallelConfig.stream_multiple``."""
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if context == 1:
        return f"tensor {tensor} with sequence parallelism"
    if not parallel.sequence_parallel:
        return f"2 chunks x context {context}"
    return f"context {context} x least common multiple of 2 chunks and tensor {tensor}"


def check_positions(shape: ModelShape, max_total_tokens: int) -> None:
    """Refuse sequences that run past the model's last position.

    Args:
        shape: the model.
        max_total_tokens: longest context and completion together, tokens.

    Raises:
        ConfigError: if the model has fewer positions.
    """
    if max_total_tokens > shape.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_total_tokens = {max_total_tokens} is above the model's "
            f"max_position_embeddings = {shape.max_position_embeddings} (config.json); lower "
            f"rollout.max_total_tokens to {shape.max_position_embeddings}"
        )
