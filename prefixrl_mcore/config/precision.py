"""Which precisions and which recomputation fit a model.

Training and ``prefixrl check`` both call what is here, so that they refuse the same configs;
nothing here imports torch. What only the machine can answer is in ``policy/layers.py``.
"""

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import FP8_BLOCKS, PolicyConfig, RecomputeModule


def recomputed_modules(policy: PolicyConfig, shape: ModelShape) -> tuple[RecomputeModule, ...]:
    """Return what selective recomputation computes again; empty if it is not selective."""
    if policy.recompute != "selective":
        return ()
    if policy.recompute_modules is not None:
        return policy.recompute_modules
    return ("moe",) if shape.mixture else ("mlp",)


def check_precision(shape: ModelShape, policy: PolicyConfig, stream_tokens: int) -> None:
    """Refuse recomputation and precisions that this model or stream length does not have.

    Raises:
        ConfigError: naming the field, the numbers and the remedy.
    """
    absent, present = ("mlp", "moe") if shape.mixture else ("moe", "mlp")
    if absent in recomputed_modules(policy, shape):
        raise ConfigError(
            f"policy.recompute_modules: {shape.architecture} has no {absent!r} layers; name "
            f"{present!r} instead"
        )
    if policy.fp8 is not None:
        _check_fp8(shape, policy, stream_tokens)


def _check_fp8(shape: ModelShape, policy: PolicyConfig, stream_tokens: int) -> None:
    """Refuse sizes that FP8 matrix products cannot take."""
    if shape.mixture is not None:
        raise ConfigError(
            f"policy.fp8 = {policy.fp8!r} is not implemented for a mixture of experts, got "
            f"{shape.architecture}; leave it out"
        )
    block = FP8_BLOCKS[policy.fp8_recipe]
    tensor = policy.parallel.tensor_model_parallel_size
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    for what, size in (
        ("hidden size", shape.hidden_size),
        ("query, key and value rows", (heads + 2 * groups) * shape.kv_channels // tensor),
        ("query rows", heads * shape.kv_channels // tensor),
        ("feed-forward width", shape.ffn_hidden_size // tensor),
    ):
        if size % block:
            raise ConfigError(
                f"policy.fp8 with recipe {policy.fp8_recipe!r} needs sizes of a multiple of "
                f"{block}, got {what} {size} on a rank (tensor_model_parallel_size {tensor}); "
                "change the layout or the recipe, or leave fp8 out"
            )
    multiple = policy.stream_multiple
    if stream_tokens % multiple:
        above = -(-stream_tokens // multiple) * multiple
        raise ConfigError(
            f"policy.fp8 with recipe {policy.fp8_recipe!r} needs streams of a multiple of "
            f"{multiple} tokens ({block} on each context- and sequence-parallel rank), got "
            f"{stream_tokens}; set batch.stream_tokens to {above}"
        )
