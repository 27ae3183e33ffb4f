"""The KV cache of a batch that decodes in step: one contiguous slot per new token.

Slots ``0 .. context_slots - 1`` hold the contexts, padded on the right; every decoding step
writes the next slot of all rows at once, so that a step needs no scatter and no growing copy.

Shapes: B rows, P contexts, N key-value heads, S slots, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

_GROW_SLOTS = 256
"""Slots that are added when the cache is full: one copy every so many steps."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, in buffers with room to spare."""

    is_sliding = False

    def __init__(self, *, num_rows: int, context_slots: int, capacity: int) -> None:
        """Make an empty layer; ``fill`` must follow for all rows."""
        super().__init__()
        self.num_slots = context_slots
        self._num_rows = num_rows
        self._capacity = capacity

    def fill(self, rows: slice, keys_PNSD: Tensor, values_PNSD: Tensor, context_B: Tensor) -> None:
        """Copy contexts' keys and values into ``rows``; row b takes context ``context_B[b]``."""
        if not self.is_initialized:
            self.lazy_initialization(keys_PNSD, values_PNSD)
        num_slots = keys_PNSD.shape[2]
        _filled(self.keys)[rows, :, :num_slots] = keys_PNSD.index_select(0, context_B)
        _filled(self.values)[rows, :, :num_slots] = values_PNSD.index_select(0, context_B)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers; zeros, since a masked slot must not be NaN."""
        self.keys = self._empty_like(key_states)
        self.values = self._empty_like(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new token's slot; return views of the slots that are filled."""
        if self.num_slots == self._capacity:
            self._capacity += _GROW_SLOTS
            self.keys = self._grown(_filled(self.keys))
            self.values = self._grown(_filled(self.values))
        keys_BNSD, values_BNSD = _filled(self.keys), _filled(self.values)
        keys_BNSD[:, :, self.num_slots] = key_states[:, :, 0]
        values_BNSD[:, :, self.num_slots] = value_states[:, :, 0]
        self.num_slots += 1
        return keys_BNSD[:, :, : self.num_slots], values_BNSD[:, :, : self.num_slots]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but ``rows``."""
        self.keys = _filled(self.keys).index_select(0, rows)
        self.values = _filled(self.values).index_select(0, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys that a step sees, and the offset of the first."""
        return self.num_slots + query_length, 0

    def get_seq_length(self) -> int:
        """Return the filled slots."""
        return self.num_slots

    def get_max_length(self) -> int:
        """Return -1: the cache grows."""
        return -1

    def _empty_like(self, states_PNSD: Tensor) -> Tensor:
        _, heads, _, size = states_PNSD.shape
        return states_PNSD.new_zeros((self._num_rows, heads, self._capacity, size))

    def _grown(self, buffer_BNSD: Tensor) -> Tensor:
        rows, heads, num_slots, size = buffer_BNSD.shape
        grown_BNSD = buffer_BNSD.new_zeros((rows, heads, self._capacity, size))
        grown_BNSD[:, :, :num_slots] = buffer_BNSD
        return grown_BNSD


class SlotCache(Cache):
    """The KV cache of all layers, and the mask that hides the padding of the contexts."""

    def __init__(self, *, num_layers: int, context_lengths_B: Tensor, max_new_tokens: int) -> None:
        """Make room for contexts of ``context_lengths_B`` tokens and, at first, some new ones."""
        context_slots = int(context_lengths_B.max())
        capacity = context_slots + min(max_new_tokens, _GROW_SLOTS)
        self._slot_layers = [
            SlotLayer(
                num_rows=len(context_lengths_B), context_slots=context_slots, capacity=capacity
            )
            for _ in range(num_layers)
        ]
        super().__init__(layers=list(self._slot_layers))
        slots_S = torch.arange(context_slots, device=context_lengths_B.device)
        self._context_mask_BS = slots_S[None, :] < context_lengths_B[:, None]
        self._mask_B11S = self._mask_of(capacity)

    def fill(self, rows: slice, contexts: DynamicCache, context_B: Tensor) -> None:
        """Copy computed contexts into ``rows``; row b takes context ``context_B[b]``."""
        for layer, computed in zip(self._slot_layers, contexts.layers, strict=True):
            assert isinstance(computed, DynamicLayer), "every layer has full attention"
            layer.fill(rows, _filled(computed.keys), _filled(computed.values), context_B)

    def mask_of_next_step(self) -> Tensor:
        """Return [B, 1, 1, S] bool: the slots that the next token attends to, its own included."""
        num_slots = self._slot_layers[0].num_slots + 1
        if num_slots > self._mask_B11S.shape[3]:
            self._mask_B11S = self._mask_of(num_slots + _GROW_SLOTS)
        return self._mask_B11S[..., :num_slots]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but ``rows`` ([num_kept] int64)."""
        for layer in self._slot_layers:
            layer.keep_rows(rows)
        self._context_mask_BS = self._context_mask_BS.index_select(0, rows)
        self._mask_B11S = self._mask_B11S.index_select(0, rows)

    def _mask_of(self, num_slots: int) -> Tensor:
        num_rows, context_slots = self._context_mask_BS.shape
        mask_BS = self._context_mask_BS.new_ones((num_rows, num_slots))
        mask_BS[:, :context_slots] = self._context_mask_BS
        return mask_BS[:, None, None, :]


def _filled(states: Tensor | None) -> Tensor:
    assert states is not None, "the cache is filled before it is used"
    return states


def compute_contexts(
    model: PreTrainedModel, contexts: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[DynamicCache, Tensor]:
    """Return the keys and values of ``contexts``, padded on the right, and their last logits.

    Padding on the right is invisible to causal attention, so that no mask is needed and every
    token has its own position.

    Args:
        model: a causal language model of ``transformers``.
        contexts: [P] token ids, not empty.
        device: where the model is.

    Returns:
        The cache, and [P, V] logits after the last token of each context.
    """
    longest = max(len(context) for context in contexts)
    ids_PS = torch.zeros((len(contexts), longest), dtype=torch.int64)
    for index, context in enumerate(contexts):
        ids_PS[index, : len(context)] = torch.tensor(context)
    last_P1 = torch.tensor([[len(context) - 1] for context in contexts])
    cache = DynamicCache()
    output = model(
        input_ids=ids_PS.to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_P1.to(device),
    )
    return cache, output.logits[:, 0]
