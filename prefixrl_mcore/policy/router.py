"""The router of a mixture of experts: how evenly it loads them, and losses that make it even.

Megatron's router, with its balance losses under the project's loss contract. Megatron scales them
for batches in which every token is trained on and none is padding, by each rank's own number of
tokens; here the balance of all real tokens (context and completion) counts, each once, in any
layout, and the gradient of the whole is divided by the number of trained tokens at the end.

Letters: ``T`` tokens of a stream on this rank, ``E`` experts of the whole layer.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

LOAD_RATIO_MAX = "experts/load_ratio_max"
LOAD_RATIO_MEAN = "experts/load_ratio_mean"
IDLE = "experts/idle_fraction"
BALANCE_LOSS = "experts/balance_loss"
METRIC_NAMES = (LOAD_RATIO_MAX, LOAD_RATIO_MEAN, IDLE, BALANCE_LOSS)
"""What ``balance_metrics`` can return."""


class BalancedRouter(TopKRouter):
    """Counts the tokens that it sends to each expert, and adds the losses of the config."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        """Create Megatron's router with nothing counted."""
        super().__init__(config, pg_collection, is_mtp_layer)
        self.tokens_per_expert_E: Tensor = torch.zeros(0)
        """[E] float64 real tokens of this rank that were sent to each expert in this update."""
        self.summed_balance_loss: Tensor = torch.zeros(())
        """[] float64 this rank's share of the balance loss, times real tokens; no coefficient."""
        self._loss_scale = 0.0
        self._group_tokens_E: Tensor = torch.zeros(0)
        self.begin_update(loss_scale=0.0)

    def begin_update(self, *, loss_scale: float) -> None:
        """Forget what was counted.

        Args:
            loss_scale: trained tokens over real tokens of the batch: what is divided by the former
                in the end is meant to be a mean over the latter.
        """
        assert self.num_experts is not None, "a router has experts"
        zeros = torch.zeros(self.num_experts, dtype=torch.float64, device=self.weight.device)
        self.tokens_per_expert_E, self._group_tokens_E = zeros, zeros.clone()
        self.summed_balance_loss = zeros.new_zeros(())
        self._loss_scale = loss_scale

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return Megatron's [T, E] weights and choices, and count the choices of real tokens.

        Args:
            logits: [T, 1, E] of this rank's tokens.
            padding_mask: [T, 1] bool, True on padding; None has no padding.
        """
        probs_TE, chosen_TE = super().routing(logits, padding_mask=padding_mask)
        if torch.is_grad_enabled():  # a pass that is recomputed counts once
            is_real = chosen_TE
            if padding_mask is not None:
                is_real = chosen_TE & ~padding_mask.reshape(-1, 1)
            self.tokens_per_expert_E += is_real.sum(0)
        return probs_TE, chosen_TE

    def apply_z_loss(self, logits: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return ``logits`` [T, E] that carry the squared log-sum-exp of real tokens as a loss."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares_T = torch.logsumexp(logits.float(), dim=-1).square()
        if padding_mask is not None:
            squares_T = squares_T * ~padding_mask
        loss = coefficient * self._loss_scale * squares_T.sum()
        return MoEAuxLossAutoScaler.apply(logits, loss)

    def _apply_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Return ``probs`` that carry the balance loss of the stream."""
        if not self.get_aux_loss_coeff("aux_loss"):
            return probs
        tokens_E = _sum_over(self.tp_cp_group, routing_map.sum(0))
        return self._add_balance_loss(probs, scores_for_aux_loss, tokens_E)

    def _apply_global_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Return ``probs`` that carry the balance loss over all streams of the update so far."""
        if not self.get_aux_loss_coeff("global_aux_loss"):
            return probs
        self._group_tokens_E += _sum_over(self.tp_dp_cp_group, routing_map.sum(0))
        return self._add_balance_loss(probs, scores_for_aux_loss, self._group_tokens_E)

    def _add_balance_loss(self, probs: Tensor, scores_TE: Tensor, tokens_E: Tensor) -> Tensor:
        """Return ``probs`` that carry ``E * sum_e share_e * score_e`` (arXiv:2101.03961).

        Summed over the real tokens of this rank; ``begin_update`` has the factor that makes the
        sum over ranks and streams a mean.

        Args:
            probs: [T, E] what the loss is attached to.
            scores_TE: [T, E] float32 shares of the router's softmax, 0 on padding; with gradient.
            tokens_E: [E] real tokens sent to each expert, over the tokens that are to be balanced.
        """
        share_E = (tokens_E / tokens_E.sum().clamp(min=1)).float()
        loss = len(share_E) * (share_E * scores_TE.sum(0)).sum()
        self.summed_balance_loss += loss.detach()
        coefficient = self.config.moe_aux_loss_coeff
        assert isinstance(coefficient, float), "one kind of loss"
        return MoEAuxLossAutoScaler.apply(probs, coefficient * self._loss_scale * loss)


def begin_update(chunks: Sequence[nn.Module], *, loss_scale: float) -> None:
    """Let every router of this rank forget the last update; see ``BalancedRouter.begin_update``."""
    for router in _routers(chunks):
        router.begin_update(loss_scale=loss_scale)


def balance_metrics(
    chunks: Sequence[nn.Module], *, num_layers: int, num_experts: int, num_real_tokens: int
) -> dict[str, float]:
    """Return how evenly the experts were loaded since ``begin_update``; all ranks must call this.

    ``experts/load_ratio_max`` and ``experts/load_ratio_mean``: tokens of a layer's busiest expert
    over the mean of its experts, of the worst layer and on average; 1 is even.
    ``experts/idle_fraction``: experts, over all layers, that no token was sent to.
    ``experts/balance_loss``: mean over tokens and layers, without coefficient; only with one.
    Only real tokens count. Nothing is returned when nothing was counted (an update without a
    gradient).

    Args:
        chunks: this rank's.
        num_layers: of the whole model.
        num_experts: of a layer.
        num_real_tokens: context and completion tokens of the batch.
    """
    counts_LE = torch.zeros(num_layers, num_experts + 1, dtype=torch.float64)
    has_loss = False
    for router in _routers(chunks):
        layer = cast(int, router.layer_number) - 1
        counts_LE[layer, :num_experts] = router.tokens_per_expert_E.cpu()
        counts_LE[layer, num_experts] = router.summed_balance_loss.cpu()
        has_loss = router.is_aux_loss_enabled()
    if dist.get_world_size() > 1:
        dist.all_reduce(counts_LE)  # every rank routes its own share of the tokens
    losses_L, counts_LE = counts_LE[:, num_experts], counts_LE[:, :num_experts]
    if not counts_LE.any():
        return {}
    ratios_L = counts_LE.amax(1) / counts_LE.mean(1)
    metrics = {
        LOAD_RATIO_MAX: float(ratios_L.max()),
        LOAD_RATIO_MEAN: float(ratios_L.mean()),
        IDLE: float((counts_LE == 0).double().mean()),
    }
    if has_loss:
        metrics[BALANCE_LOSS] = float(losses_L.mean()) / num_real_tokens
    return metrics


def _routers(chunks: Sequence[nn.Module]) -> Iterator[BalancedRouter]:
    """Yield the routers of this rank's layers."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, BalancedRouter):
                yield module


def _sum_over(group: dist.ProcessGroup, tokens_E: Tensor) -> Tensor:
    """Return counts added up over a group, as float64; all its ranks must call this."""
    total_E = tokens_E.double()
    if group.size() > 1:
        dist.all_reduce(total_E, group=group)
    return total_E
