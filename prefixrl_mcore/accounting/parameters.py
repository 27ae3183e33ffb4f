"""Parameters of a model, and of each rank of a layout.

Symbols, here and in the other files of this package: ``H`` hidden size, ``F`` feed-forward width
(of one expert in a mixture), ``N`` query heads, ``G`` key-value heads, ``K`` width of a head, ``V``
vocabulary padded to equal shards, ``L`` layers, ``E`` experts, ``k`` experts that a token is routed
to; ``tp``, ``pp``, ``cp``, ``ep``, ``etp`` (expert tensor), ``dp`` the parallel sizes.
"""

from dataclasses import dataclass
from pathlib import Path

from prefixrl_mcore.config.model_shape import ModelShape, read_hf_config, read_model_shape
from prefixrl_mcore.config.policy import ParallelConfig, PolicyConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """Parameters of a whole model, every one counted once."""

    num_layer_parameters: int
    """Of all layers without experts: ``L ((2N + 2G) K H + 2H)``, with ``3FH`` in a dense layer or
    a router of ``E H``, ``2K`` for norms of query and key, ``(N + 2G) K`` for their biases."""

    num_expert_parameters: int
    """Of all experts: ``L E 3FH``; 0 in a dense model."""

    num_embedding_parameters: int
    """``V H``, twice unless the embeddings are tied; ``V`` without padding."""

    num_norm_parameters: int
    """``H``: the norm behind the last layer."""

    num_active_expert_parameters: int
    """Of the experts that a token is routed to, in all layers."""

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return (
            self.num_layer_parameters
            + self.num_expert_parameters
            + self.num_embedding_parameters
            + self.num_norm_parameters
        )

    @property
    def num_active_parameters(self) -> int:
        """Parameters that a token meets; the FLOPs of sampling and updates are charged by it."""
        return self.num_parameters - self.num_expert_parameters + self.num_active_expert_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class RankParameters:
    """Parameters that one rank of a pipeline stage holds."""

    shared: int
    """All that are no expert's: sharded by ``tp``, the gradient summed over ``dp cp`` ranks."""

    experts: int
    """Of the experts on this rank; the gradient is summed over ``tp cp dp / (ep etp)`` ranks."""

    largest: int
    """Of the largest single tensor."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.shared + self.experts


def model_size(shape: ModelShape) -> ModelSize:
    """Return the parameter counts of a model."""
    one_rank = ParallelConfig()
    mixture = shape.mixture
    experts = shape.num_layers * mixture.num_experts * _expert(shape) if mixture else 0
    return ModelSize(
        num_layer_parameters=shape.num_layers * _layer_without_experts(shape, one_rank),
        num_expert_parameters=experts,
        num_embedding_parameters=(
            (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size
        ),
        num_norm_parameters=shape.hidden_size,
        num_active_expert_parameters=(
            experts * mixture.num_experts_per_token // mixture.num_experts if mixture else 0
        ),
    )


def count_parameters(model_folder: Path) -> int:
    """Return N of a Hugging Face folder: the parameters by which its FLOPs are charged.

    Raises:
        ConfigError: if its ``config.json`` is not of a supported model.
    """
    return model_size(read_model_shape(read_hf_config(model_folder))).num_active_parameters


def stage_layers(shape: ModelShape, parallel: ParallelConfig) -> tuple[int, ...]:
    """Return the number of layers of each pipeline stage, first to last.

    The layout must have passed ``check_divisible``.
    """
    stages = parallel.pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    sharing = stages - (first is not None) - (last is not None)
    equal = (shape.num_layers - (first or 0) - (last or 0)) // max(sharing, 1)
    layers = [equal] * stages
    if first is not None:
        layers[0] = first
    if last is not None:
        layers[-1] = last
    return tuple(layers)


def rank_parameters(shape: ModelShape, parallel: ParallelConfig, stage: int) -> RankParameters:
    """Return what a rank of a stage holds.

    The first stage has the embedding and the last one the final norm and the output weight. Tied
    embeddings are one matrix on a single stage; with several, the last stage has a copy.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    hidden = shape.hidden_size
    layers = stage_layers(shape, parallel)[stage]
    vocabulary = shape.padded_vocab_size(tensor) // tensor * hidden
    is_first, is_last = stage == 0, stage == stages - 1
    has_output = is_last and not (shape.tie_word_embeddings and is_first)
    shared = layers * _layer_without_experts(shape, parallel)
    shared += vocabulary * (is_first + has_output) + hidden * is_last
    experts = 0
    largest = max(
        (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels // tensor,
        2 * shape.ffn_hidden_size // feed_forward_parts(shape, parallel),
    )
    if shape.mixture:
        on_rank = shape.mixture.num_experts // parallel.expert_model_parallel_size
        experts = layers * on_rank * _expert(shape) // parallel.expert_tensor_parallel_size
    return RankParameters(
        shared=shared,
        experts=experts,
        largest=max(largest * hidden, vocabulary * (is_first or has_output)),
    )


def replicas(parallel: ParallelConfig) -> tuple[int, int]:
    """Return over how many ranks the optimizer of shared parameters and of experts is sharded."""
    shared = parallel.data_parallel_size * parallel.context_parallel_size
    parts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    experts = parallel.tensor_model_parallel_size * shared // parts
    return shared, experts


def stepped_parameters(policy: PolicyConfig, parameters: RankParameters) -> float:
    """Return the parameters whose optimizer state is on this rank."""
    if not policy.optimizer.use_distributed_optimizer:
        return parameters.total
    shared, experts = replicas(policy.parallel)
    return parameters.shared / shared + parameters.experts / experts


def feed_forward_parts(shape: ModelShape, parallel: ParallelConfig) -> int:
    """Return over how many ranks the width of a feed-forward layer, or of an expert, is cut."""
    if shape.mixture:
        return parallel.expert_tensor_parallel_size
    return parallel.tensor_model_parallel_size


def _layer_without_experts(shape: ModelShape, parallel: ParallelConfig) -> int:
    """Return a rank's parameters of one layer, experts left out."""
    tensor = parallel.tensor_model_parallel_size
    hidden, width = shape.hidden_size, shape.kv_channels
    heads, groups = shape.num_attention_heads // tensor, shape.num_query_groups // tensor
    attention = (2 * heads + 2 * groups) * width * hidden
    biases = (heads + 2 * groups) * width if shape.add_qkv_bias else 0
    norms = 2 * hidden + (2 * width if shape.qk_layernorm else 0)
    if shape.mixture:  # every rank has the router
        return attention + biases + norms + shape.mixture.num_experts * hidden
    return attention + biases + norms + 3 * (shape.ffn_hidden_size // tensor) * hidden


def _expert(shape: ModelShape) -> int:
    """Return the parameters of one expert: gate, up and down."""
    return 3 * shape.ffn_hidden_size * shape.hidden_size
