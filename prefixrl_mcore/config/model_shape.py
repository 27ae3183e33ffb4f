"""From a Hugging Face ``config.json`` to the model shape.

Every field of ``config.json`` must be understood: it is mapped, it must have a certain value, or
it is known not to change what the model computes. Anything else is an error that names the field,
because a silently ignored field (a rope scaling, a sliding window) trains a different model.

A model family is one entry of ``FAMILIES``. Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.json_files import read_json_object
from prefixrl_mcore.config.rotary import Llama3Scaling, read_rotary


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureShape:
    """The mixture of experts that replaces the feed-forward layer of every decoder layer."""

    num_experts: int
    """Experts of a layer."""

    num_experts_per_token: int
    """Experts that a token is routed to."""

    is_renormalized: bool
    """The weights of a token's experts sum to 1; otherwise they are their shares of a softmax over
    all experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What must be known of a decoder-only transformer to build it."""

    architecture: str
    """Name in ``config.json``, e.g. ``Qwen3ForCausalLM``."""

    num_layers: int
    """Transformer layers."""

    hidden_size: int
    """Width of the residual stream."""

    ffn_hidden_size: int
    """Width of the gated feed-forward layer, in a mixture of experts of one expert."""

    num_attention_heads: int
    """Query heads."""

    num_query_groups: int
    """Key-value heads."""

    kv_channels: int
    """Width of one head."""

    vocab_size: int
    """Tokens in the vocabulary, without padding."""

    rotary_base: float
    """Base of the rotary position embedding."""

    layernorm_epsilon: float
    """Offset in RMSNorm."""

    max_position_embeddings: int
    """Longest sequence that the model was made for, tokens."""

    init_method_std: float
    """Standard deviation of freshly initialised weights (loaded weights do not depend on it)."""

    tie_word_embeddings: bool
    """Input and output embedding are one matrix."""

    qk_layernorm: bool
    """RMSNorm on each query and key head."""

    add_qkv_bias: bool
    """Bias on the query, key and value projections."""

    mixture: MixtureShape | None = None
    """Experts; None is a dense model."""

    rotary_scaling: Llama3Scaling | None = None
    """Change of the rotary frequencies; None is none."""

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Return the rows of the embedding: ``vocab_size`` rounded up to equal shards."""
        shards = tensor_model_parallel_size
        return -(-self.vocab_size // shards) * shards


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How the ``config.json`` of one architecture is read."""

    qk_layernorm: bool = False
    """The family normalises query and key heads."""

    has_qkv_bias: bool = False
    """The family's query, key and value projections have biases."""

    is_mixture: bool = False
    """Every feed-forward layer is a mixture of experts."""

    rope_types: frozenset[str] = frozenset({"default"})
    """Kinds of rotary embedding that are implemented for the family."""

    required: Mapping[str, Any]
    """Fields that, where present, must have exactly this value."""

    ignored: frozenset[str]
    """Fields that do not change what the model computes in training."""


_MAPPED = frozenset(
    {
        *("architectures", "attention_bias", "head_dim", "hidden_size", "initializer_range"),
        *("intermediate_size", "max_position_embeddings", "num_attention_heads"),
        *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters"),
        *("rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size", "layer_types"),
        *("use_sliding_window", "sliding_window"),
    }
)
"""Fields that ``read_model_shape`` reads of every family."""

_MIXTURE_MAPPED = frozenset(
    {
        *("moe_intermediate_size", "norm_topk_prob", "num_experts", "num_experts_per_tok"),
        "num_local_experts",
    }
)
"""Further fields that it reads of a mixture of experts."""

_NOT_COMPUTED = frozenset(
    {
        *("_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype"),
        *("transformers_version", "use_cache", "max_window_layers", "return_dict"),
        *("output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
        *("is_encoder_decoder", "id2label", "label2id", "problem_type"),
        "_attn_implementation_autoset",
    }
)
"""Bookkeeping, generation and loading fields."""

_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("architectures", "layer_types"), (list,)),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (dict,)),
    **dict.fromkeys(("initializer_range", "rms_norm_eps"), (int, float)),
    **dict.fromkeys(
        ("attention_bias", "norm_topk_prob", "tie_word_embeddings", "use_sliding_window"), (bool,)
    ),
}
"""What a field is if it is not null; ``_integer`` looks at the others that are read."""

_INTEGERS_OR_NULL = ("head_dim", "num_key_value_heads")
"""Fields that have a default, which null stands for."""

_COMMON = {"hidden_act": "silu", "attention_dropout": 0.0, "quantization_config": None}

FAMILIES: Mapping[str, Family] = {
    "Qwen3ForCausalLM": Family(
        qk_layernorm=True,
        required={"model_type": "qwen3", "attention_bias": False, **_COMMON},
        ignored=_NOT_COMPUTED,
    ),
    "Qwen3MoeForCausalLM": Family(
        qk_layernorm=True,
        is_mixture=True,
        required={
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            # Written by some releases, in the only way that transformers computes.
            "use_qk_norm": True,
            "shared_expert_intermediate_size": 0,
            "qkv_bias": False,
            **_COMMON,
        },
        # The auxiliary loss is a choice of the training: policy.experts.
        ignored=_NOT_COMPUTED | {"output_router_logits", "router_aux_loss_coef"},
    ),
    "Qwen2ForCausalLM": Family(
        has_qkv_bias=True,
        required={"model_type": "qwen2", "use_mrope": False, **_COMMON},
        ignored=_NOT_COMPUTED,
    ),
    "LlamaForCausalLM": Family(
        rope_types=frozenset({"default", "llama3"}),
        required={
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            **_COMMON,
        },
        ignored=_NOT_COMPUTED,
    ),
}
"""Supported architectures by the name in ``config.json``."""


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``folder/config.json``.

    Raises:
        ConfigError: if the file is missing or is not a JSON object.
    """
    return read_json_object(folder / "config.json", remedy="name a Hugging Face model folder")


def read_model_shape(hf_config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that a Hugging Face ``config.json`` describes.

    Args:
        hf_config: the parsed file, as written by transformers 4 or 5.

    Raises:
        ConfigError: if the architecture is not supported, a field is missing, unknown, or asks
            for something that is not implemented; the message names the field.
    """
    _refuse_other_kinds(hf_config)
    architecture = _architecture(hf_config)
    family = FAMILIES[architecture]
    _refuse_unknown_fields(hf_config, architecture, family)
    _refuse_sliding_window(hf_config)
    hidden_size = _integer(hf_config, "hidden_size")
    num_heads = _integer(hf_config, "num_attention_heads")
    spread = hf_config.get("initializer_range")
    rotary_base, rotary_scaling = read_rotary(hf_config, family.rope_types)
    ffn_field = "moe_intermediate_size" if family.is_mixture else "intermediate_size"
    return ModelShape(
        architecture=architecture,
        num_layers=_integer(hf_config, "num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=_integer(hf_config, ffn_field),
        num_attention_heads=num_heads,
        num_query_groups=hf_config.get("num_key_value_heads") or num_heads,
        kv_channels=hf_config.get("head_dim") or hidden_size // num_heads,
        vocab_size=_integer(hf_config, "vocab_size"),
        rotary_base=rotary_base,
        layernorm_epsilon=float(_present(hf_config, "rms_norm_eps")),
        max_position_embeddings=_integer(hf_config, "max_position_embeddings"),
        init_method_std=0.02 if spread is None else float(spread),
        tie_word_embeddings=bool(_present(hf_config, "tie_word_embeddings")),
        qk_layernorm=family.qk_layernorm,
        add_qkv_bias=family.has_qkv_bias,
        mixture=_mixture(hf_config) if family.is_mixture else None,
        rotary_scaling=rotary_scaling,
    )


def shape_differences(first: ModelShape, second: ModelShape) -> dict[str, tuple[object, object]]:
    """Return the fields in which two models compute something else, with both values.

    Longest sequence and initialisation are left out: they change no logprob.
    """
    return {
        name: (getattr(first, name), getattr(second, name))
        for name in (field.name for field in fields(ModelShape))
        if name not in {"max_position_embeddings", "init_method_std"}
        and getattr(first, name) != getattr(second, name)
    }


def check_reference(shape: ModelShape, folder: Path) -> None:
    """Refuse a reference whose weights mean something else in the policy's model.

    Args:
        shape: of the policy.
        folder: Hugging Face folder of the reference.

    Raises:
        ConfigError: naming the fields that differ.
    """
    theirs = read_model_shape(read_hf_config(folder))
    different = [
        f"{name} {got!r} (the policy has {expected!r})"
        for name, (got, expected) in shape_differences(theirs, shape).items()
    ]
    if different:
        raise ConfigError(
            f"loss.reference_path = {folder} is not of the policy's shape: it has "
            f"{', '.join(different)}; name a folder of the same model with other weights"
        )


def _refuse_other_kinds(hf_config: Mapping[str, Any]) -> None:
    """Refuse values of a type that their fields cannot have."""
    for name, kinds in _KINDS.items():
        value = hf_config.get(name)
        is_kind = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if value is not None and not is_kind:
            raise ConfigError(
                f"config.json: {name} = {value!r} is of type {type(value).__name__}, expected "
                + " or ".join(kind.__name__ for kind in kinds)
            )
    for name in _INTEGERS_OR_NULL:
        if hf_config.get(name) is not None:
            _integer(hf_config, name)


def _architecture(hf_config: Mapping[str, Any]) -> str:
    """Return the architecture's name, or refuse it."""
    names = hf_config.get("architectures") or []
    if len(names) != 1 or names[0] not in FAMILIES:
        raise ConfigError(
            f"config.json: architectures = {names!r} is not supported; expected one of "
            f"{sorted(FAMILIES)}"
        )
    return names[0]


def _refuse_unknown_fields(hf_config: Mapping[str, Any], architecture: str, family: Family) -> None:
    """Refuse fields that we do not understand, and values that we do not implement."""
    for name, value in family.required.items():
        if name in hf_config and hf_config[name] != value:
            raise ConfigError(
                f"config.json: {name} = {hf_config[name]!r} is not implemented for "
                f"{architecture}, expected {value!r}"
            )
    known = _MAPPED | family.ignored | set(family.required)
    if family.is_mixture:
        known |= _MIXTURE_MAPPED
    unknown = sorted(set(hf_config) - known)
    if unknown:
        listed = ", ".join(f"{name} = {hf_config[name]!r}" for name in unknown)
        raise ConfigError(
            f"config.json: unknown field(s) for {architecture}: {listed}; the model may compute "
            "something that is not implemented here; remove a field of which you know that it "
            "changes nothing"
        )


def _refuse_sliding_window(hf_config: Mapping[str, Any]) -> None:
    """Refuse a model whose attention is not full and causal in every layer."""
    if hf_config.get("use_sliding_window"):
        raise ConfigError(
            "config.json: use_sliding_window = true is not implemented; only full causal "
            "attention is"
        )
    # Without the switch the width is dead: released Qwen3 files carry one, and no family here
    # uses a window that is not announced by the switch or by layer_types.
    layer_types = hf_config.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        raise ConfigError(
            f"config.json: layer_types = {sorted(set(layer_types))!r} is not implemented; only "
            "'full_attention' is"
        )


def _mixture(hf_config: Mapping[str, Any]) -> MixtureShape:
    """Return the experts of a transformers 4 or 5 file."""
    field = "num_experts" if "num_experts" in hf_config else "num_local_experts"
    num_experts = _integer(hf_config, field)
    per_token = _integer(hf_config, "num_experts_per_tok")
    is_renormalized = bool(_present(hf_config, "norm_topk_prob"))
    if per_token > num_experts:
        raise ConfigError(
            f"config.json: num_experts_per_tok = {per_token} exceeds the {num_experts} experts"
        )
    if per_token == 1 and is_renormalized:
        raise ConfigError(
            "config.json: norm_topk_prob = true with num_experts_per_tok = 1 gives every expert "
            "weight 1 and the router no gradient; Megatron refuses it"
        )
    return MixtureShape(
        num_experts=num_experts,
        num_experts_per_token=per_token,
        is_renormalized=is_renormalized,
    )


def _present(hf_config: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401  (JSON value)
    """Return a field that must be there."""
    if hf_config.get(name) is None:
        raise ConfigError(f"config.json: {name} is missing")
    return hf_config[name]


def _integer(hf_config: Mapping[str, Any], name: str) -> int:
    """Return a field that must be a positive integer."""
    value = _present(hf_config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value
