"""Bytes that the layers keep for the backward pass, and need for a while in it.

Every figure is bytes per token of one rank (``T`` = stream tokens / ``cp``), read off the tensors
that autograd saves for Megatron's local layers with our attention and norm. Symbols are those of
``parameters.py``; ``N``, ``G`` and ``F`` are a rank's share under tensor parallelism. ``w`` is
bytes of a weight's element; ``s`` is ``1 / tp`` with sequence parallelism, otherwise 1.
"""

from dataclasses import dataclass
from typing import Literal

from prefixrl_mcore.accounting.parameters import feed_forward_parts
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import ParallelConfig, RecomputeModule

Device = Literal["cuda", "cpu"]
"""Where the model runs: torch's RMSNorm is one kernel on a GPU and several operations on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """One layer as a rank sees it."""

    shape: ModelShape
    """The model."""

    parallel: ParallelConfig
    """The layout."""

    width: int
    """``w``."""

    device: Device
    """Where it runs."""

    recomputed: tuple[RecomputeModule, ...] = ()
    """What selective recomputation computes again."""

    slots_per_token: float
    """Tokens of the padded layout that attention runs on, for each token: 1 for sequences of equal
    length, at most ``1 / MIN_FILL``; without effect under context parallelism."""

    @property
    def heads(self) -> int:
        """``N``."""
        return self.shape.num_attention_heads // self.parallel.tensor_model_parallel_size

    @property
    def groups(self) -> int:
        """``G``."""
        return self.shape.num_query_groups // self.parallel.tensor_model_parallel_size

    @property
    def share(self) -> float:
        """``s``."""
        parallel = self.parallel
        return 1 / parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1.0

    @property
    def hidden_bytes(self) -> float:
        """``s w H``: hidden states between the blocks."""
        return self.share * self.width * self.shape.hidden_size


def kept_bytes(layer: LayerShape) -> float:
    """Return what one layer keeps, bytes per token.

    Sum of two norms, their outputs (inputs of the first products; sharded along the sequence),
    attention and feed-forward layer. Selective recomputation drops the outputs of the norms
    (``layernorm``), the feed-forward layer (``mlp``, ``moe``), or what attention adds to its
    rotated queries, keys and values (``core_attn``). Full recomputation is not looked at here.
    """
    norms = 2 * layer.share * _norm_bytes(layer, layer.shape.hidden_size)
    outputs = 0 if "layernorm" in layer.recomputed else 2 * layer.hidden_bytes
    has_feed_forward = not {"mlp", "moe"} & set(layer.recomputed)
    feed_forward = _feed_forward_bytes(layer) if has_feed_forward else 0
    return norms + outputs + _attention_bytes(layer) + feed_forward


def final_norm_bytes(layer: LayerShape) -> float:
    """Return what the norm behind the last layer keeps, its output included, bytes per token."""
    return layer.share * _norm_bytes(layer, layer.shape.hidden_size) + layer.hidden_bytes


def backward_bytes(layer: LayerShape) -> float:
    """Return the largest gradients that a layer's backward pass holds at once, bytes per token.

    Dense: the gradient of the residual and of the down projection's input, ``w (2H + F)``; its
    other gradients take the place of what is released. Mixture: the gradients of the routed copies
    before and behind the exchange, and their weighted sum, ``w (2 k s H + 2 s H)``.
    """
    if layer.shape.mixture is None:
        ffn = layer.shape.ffn_hidden_size / feed_forward_parts(layer.shape, layer.parallel)
        return layer.width * (2 * layer.shape.hidden_size + ffn)
    copies = layer.shape.mixture.num_experts_per_token * layer.parallel.expert_tensor_parallel_size
    return (2 * copies + 2) * layer.hidden_bytes


def _norm_bytes(layer: LayerShape, width: float) -> float:
    """Return what an RMSNorm of vectors of ``width`` keeps besides its output.

    A GPU keeps the input (``w`` an element) and the scale, 4. A CPU keeps two float32 copies:
    the input and the normalised input (a float32 input is not copied, but has to be kept as well).
    """
    return (layer.width if layer.device == "cuda" else 8) * width + 4


def _attention_bytes(layer: LayerShape) -> float:
    """Return what attention keeps from the projected heads to the input of its last product.

    ``w 4 K`` cosines and sines of query and key; query, key, value and output in slots,
    ``w (2N + 2G) K``, with ``4N`` for the logarithm of the softmax's sum; the output once more in
    token order, ``w N K``; and the norms of query and key. Under context parallelism keys and
    values are those of all ``cp`` ranks, and the output in the order of the sequences is kept.
    """
    heads, groups, width, head = layer.heads, layer.groups, layer.width, layer.shape.kv_channels
    context = layer.parallel.context_parallel_size
    total = width * (4 + heads) * head
    if layer.shape.qk_layernorm:
        total += _head_norm_bytes(layer)
    if "core_attn" in layer.recomputed:
        return total + width * (heads + 2 * groups) * head
    if context > 1:
        return total + width * (2 * heads + 2 * context * groups) * head + 4 * heads
    return total + layer.slots_per_token * (width * (2 * heads + 2 * groups) * head + 4 * heads)


def _head_norm_bytes(layer: LayerShape) -> float:
    """Return what the norms of query and key heads keep.

    The key is a part of the projection's output, which therefore stays whole,
    ``w (N + 2G) K``; the query is a copy, ``w N K``, unless there is one key-value head.
    """
    heads, groups, head = layer.heads, layer.groups, layer.shape.kv_channels
    scales = 4 * (heads + groups)
    query_copy = heads * head if groups > 1 else 0
    projected = (heads + 2 * groups) * head
    if layer.device == "cuda":
        return layer.width * (projected + query_copy) + scales
    normalised = 4 * (heads + groups) * head
    if layer.width == 4:
        return 4 * (projected + query_copy) + normalised + scales
    return 2 * normalised + scales  # float32 copies; the projection's output is released


def _feed_forward_bytes(layer: LayerShape) -> float:
    """Return what the feed-forward layer or the mixture of experts keeps behind its norm.

    Dense: ``5 w F``: the gate and up projection (2), the activated gate, the other half (which
    Megatron offsets by zero, a copy), and their product, the input of the last projection.

    Mixture, with ``s k etp`` routed copies of a token (balanced over experts and ranks; all ``etp``
    ranks of an expert have each copy): the copies, ``w H``; ``6 w F / etp``, since the product is
    weighted by the router before the last projection; and 40 bytes of indices and weights.
    Besides, ``5 E`` bytes for the router's weights and choices.
    """
    width = layer.width
    ffn = layer.shape.ffn_hidden_size / feed_forward_parts(layer.shape, layer.parallel)
    mixture = layer.shape.mixture
    if mixture is None:
        return 5 * width * ffn
    copies = layer.share * mixture.num_experts_per_token
    copies *= layer.parallel.expert_tensor_parallel_size
    routed = width * (layer.shape.hidden_size + 6 * ffn) + 40
    return copies * routed + layer.share * 5 * mixture.num_experts
