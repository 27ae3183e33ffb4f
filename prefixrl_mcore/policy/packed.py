"""A packed stream as Megatron's layers see it: positions, and which tokens attend to which.

Shape suffixes: ``T`` tokens of a stream, ``P`` slots of the padded layout.

Attention must stay inside each sequence. Kernels that know of sequences (torch's and Transformer
Engine's flash attention) read their cumulative lengths. For torch's scaled dot-product attention,
which does not, sequences of similar length are laid out as one padded batch, so that a plain causal
attention over ``[sequences, length]`` is exact: the padding is behind every real token and
causality hides it. This needs no mask and few calls, on the CPU and on a GPU.
"""

# ruff: noqa: N815 - record fields carry shape suffixes

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from prefixrl_mcore.config.layout import MIN_FILL
from prefixrl_mcore.config.rotary import Llama3Scaling
from prefixrl_mcore.policy.context import ContextShare


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences of similar length, side by side."""

    num_sequences: int
    """Sequences in the bucket."""

    length: int
    """Tokens of the longest of them; the others are padded to it."""


@dataclass
class PackedStream(PackedSeqParams):
    """Megatron's packed-sequence record, extended by what our attention and rotary need.

    ``qkv_format`` is ``sbhd``: Megatron then rotates all tokens in one call with the angles of
    ``PackedRotaryEmbedding``. With ``thd`` it would loop over the sequences, reading each length
    back from the device. All ``cu_seqlens_*`` are one [num_sequences + 1] int32 tensor on the
    model's device: where the sequences of the whole stream begin, and its end.
    """

    position_ids_T: Tensor | None = None
    """[T] int64 position of each token in its sequence; under context parallelism T is the number
    of this rank's tokens."""

    context: ContextShare | None = None
    """This rank's share of the attention under context parallelism, which has no padded layout."""

    buckets: tuple[Bucket, ...] = ()
    """The padded layout, bucket after bucket; P slots in all. Empty when the attention reads
    ``cu_seqlens_q`` instead."""

    slot_tokens_P: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[P] int64 token of each slot; padding slots repeat the first token of their sequence."""

    token_slots_T: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """[T] int64 slot of each token."""


def build_packed_stream(
    *,
    sequence_starts: np.ndarray,
    position_ids_T: Tensor,
    device: torch.device,
    has_padded_layout: bool = True,
) -> PackedStream:
    """Return the packed record of one stream.

    Args:
        sequence_starts: [num_sequences + 1] int, cumulative, from 0 to T.
        position_ids_T: [T] int64 on ``device``.
        device: where the model's activations live.
        has_padded_layout: lay the sequences out as padded batches; otherwise attention has the
            cumulative lengths only.

    Raises:
        ValueError: if the starts do not cover the stream in ascending order.
    """
    starts = np.asarray(sequence_starts, dtype=np.int64)
    lengths = np.diff(starts)
    num_tokens = position_ids_T.numel()
    if starts[0] != 0 or starts[-1] != num_tokens or (lengths < 1).any():
        raise ValueError(
            f"packed stream: sequence starts must ascend from 0 to {num_tokens}, got "
            f"{starts.tolist()}"
        )
    boundaries = _boundaries(starts, device)
    if not has_padded_layout:
        return PackedStream(position_ids_T=position_ids_T, **boundaries)
    buckets, slot_tokens_P, token_slots_T = _lay_out(starts, lengths)
    return PackedStream(
        position_ids_T=position_ids_T,
        **boundaries,
        buckets=buckets,
        slot_tokens_P=torch.from_numpy(slot_tokens_P).to(device),
        token_slots_T=torch.from_numpy(token_slots_T).to(device),
    )


def _boundaries(starts: np.ndarray, device: torch.device) -> dict[str, Any]:
    """Return what Megatron's record says of where sequences begin."""
    cu_seqlens = torch.from_numpy(starts.astype(np.int32)).to(device)
    max_length = int(np.diff(starts).max())
    return {
        "qkv_format": "sbhd",
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        "cu_seqlens_q_padded": cu_seqlens,
        "cu_seqlens_kv_padded": cu_seqlens,
        "max_seqlen_q": max_length,
        "max_seqlen_kv": max_length,
    }


def _lay_out(
    starts: np.ndarray, lengths: np.ndarray
) -> tuple[tuple[Bucket, ...], np.ndarray, np.ndarray]:
    """Return the buckets, the token of each slot and the slot of each token."""
    order = np.argsort(-lengths, kind="stable")
    buckets: list[Bucket] = []
    slot_tokens: list[np.ndarray] = []
    token_slots_T = np.empty(int(starts[-1]), dtype=np.int64)
    first, num_slots = 0, 0
    while first < len(order):
        longest = int(lengths[order[first]])
        last = first
        while last < len(order) and lengths[order[last]] >= MIN_FILL * longest:
            last += 1
        members = order[first:last]
        offsets = np.arange(longest)
        is_real = offsets[None, :] < lengths[members, None]
        tokens = starts[members, None] + np.where(is_real, offsets[None, :], 0)
        slots = num_slots + np.arange(len(members) * longest).reshape(len(members), longest)
        token_slots_T[tokens[is_real]] = slots[is_real]
        slot_tokens.append(tokens.reshape(-1))
        buckets.append(Bucket(len(members), longest))
        num_slots += len(members) * longest
        first = last
    return tuple(buckets), np.concatenate(slot_tokens), token_slots_T


def build_shared_stream(
    *, context: ContextShare, position_ids_S: Tensor, sequence_starts: np.ndarray
) -> PackedStream:
    """Return the packed record of one context-parallel rank's share of a stream.

    Args:
        context: the share.
        position_ids_S: [S] int64 positions of this rank's tokens, on the model's device.
        sequence_starts: [num_sequences + 1] int of the whole stream, cumulative, from 0 to T.
    """
    return PackedStream(
        position_ids_T=position_ids_S,
        context=context,
        **_boundaries(np.asarray(sequence_starts), position_ids_S.device),
    )


class ToSlots(torch.autograd.Function):
    """[T, ...] tokens to [P, ...] slots; padding slots send no gradient back."""

    @staticmethod
    def forward(ctx, values_T: Tensor, packed: PackedStream) -> Tensor:  # noqa: ANN001, D102
        ctx.packed = packed
        return values_T.index_select(0, packed.slot_tokens_P)

    @staticmethod
    def backward(ctx, grad_P: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001, D102  # pyright: ignore[reportIncompatibleMethodOverride]
        # Each token has one real slot, so that a gather does it, deterministically. What a
        # padding slot gets is zero: no real query sees its key, and its own output is dropped.
        return grad_P.index_select(0, ctx.packed.token_slots_T), None


class FromSlots(torch.autograd.Function):
    """[P, ...] slots to [T, ...] tokens; padding slots are dropped and get gradient zero."""

    @staticmethod
    def forward(ctx, values_P: Tensor, packed: PackedStream) -> Tensor:  # noqa: ANN001, D102
        ctx.packed = packed
        return values_P.index_select(0, packed.token_slots_T)

    @staticmethod
    def backward(ctx, grad_T: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001, D102  # pyright: ignore[reportIncompatibleMethodOverride]
        packed = ctx.packed
        grad_P = grad_T.new_zeros((packed.slot_tokens_P.numel(), *grad_T.shape[1:]))
        grad_P.index_copy_(0, packed.token_slots_T, grad_T)
        return grad_P, None


def scale_frequencies(frequencies_K: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Return Llama 3's rotary frequencies [width / 2] from the plain ones, radians per token."""
    positions = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_K = positions * frequencies_K / (2 * math.pi)
    unscaled_K = ((turns_K - low) / (high - low)).clamp(0.0, 1.0)
    return unscaled_K * frequencies_K + (1.0 - unscaled_K) * frequencies_K / scaling.factor


class PackedRotaryEmbedding(RotaryEmbedding):
    """Rotary angles of each token of a packed stream, from the positions that the stream carries.

    Megatron asks ``get_rotary_seq_len`` for a length and hands the answer to ``forward``; here
    the answer is the positions themselves.
    """

    def __init__(self, *, scaling: Llama3Scaling | None = None, **settings: Any) -> None:  # noqa: ANN401  (Megatron's own)
        """Create Megatron's embedding with our frequencies.

        Args:
            scaling: change of the frequencies; None is none. (Megatron's has fixed numbers.)
            settings: arguments of Megatron's class.
        """
        super().__init__(**settings)
        if scaling is not None:
            self.inv_freq = scale_frequencies(self.inv_freq, scaling)

    def get_rotary_seq_len(  # pyright: ignore[reportIncompatibleMethodOverride]  # see above
        self,
        inference_context: object,
        transformer: object,
        transformer_input: object,
        transformer_config: object,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return the [T] positions of the stream.

        Raises:
            ValueError: if the model is called without a ``PackedStream``.
        """
        if not isinstance(packed_seq_params, PackedStream):
            raise ValueError(
                "the model takes packed streams only: pass packed_seq_params=build_packed_stream("
                f"…), got {type(packed_seq_params).__name__}"
            )
        assert packed_seq_params.position_ids_T is not None, "a built stream has positions"
        return packed_seq_params.position_ids_T

    def forward(  # pyright: ignore[reportIncompatibleVariableOverride]  # see the class docstring
        self, position_ids_T: Tensor, packed_seq: bool = False, cp_group: object = None
    ) -> Tensor:
        """Return the [T, 1, 1, kv_channels] float32 angles."""
        if self.inv_freq.device != position_ids_T.device:
            self.inv_freq = self.inv_freq.to(position_ids_T.device)
        half = torch.outer(position_ids_T.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((half, half), dim=-1)[:, None, None, :]
