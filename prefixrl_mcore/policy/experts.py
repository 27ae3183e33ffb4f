"""The experts of a mixture-of-experts layer: which implementation, and the grouped one.

Letters: ``E`` experts of this rank, ``N`` rows that the router sent to them, expert after expert,
``I`` inputs and ``O`` outputs of a matrix, on this expert tensor-parallel rank.
"""

import itertools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own alias)
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder, MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from prefixrl_mcore.config.experts import ExpertsImplementation
from prefixrl_mcore.config.layout import can_group
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.policy.router import BalancedRouter

logger = logging.getLogger(__name__)


def choose_experts(
    shape: ModelShape, policy: PolicyConfig, device: torch.device
) -> ExpertsImplementation:
    """Return how this run computes its experts, and log it."""
    chosen = policy.experts.implementation
    if chosen is not None:
        logger.info("experts: %s, as policy.experts.implementation says", chosen)
        return chosen
    if device.type != "cuda" or policy.dtype != "bfloat16":
        chosen, reason = "sequential", f"no fast grouped product for {policy.dtype} on {device}"
    elif not can_group(shape, policy):
        chosen, reason = "sequential", "the grouped product does not take their sizes"
    else:
        chosen, reason = "grouped", f"{policy.dtype} on {device}"
    logger.info("experts: %s (%s)", chosen, reason)
    return chosen


def build_mixture(
    config: TransformerConfig, backend: BackendSpecProvider
) -> Callable[..., MoELayer]:
    """Return the builder of the layer's mixture of experts, with our router.

    Args:
        config: says whether experts are grouped.
        backend: whose matrices; Megatron's local ones have no grouped ones, so that ours are taken.
    """
    if config.moe_grouped_gemm and isinstance(backend, LocalSpecProvider):
        experts: ExpertsBuilder = partial(
            TEGroupedMLP,  # in spite of its name, it computes with the matrices that it is given
            submodules=GroupedMLPSubmodules(
                linear_fc1=partial(GroupedLinear, split_dim=1, is_gated=config.gated_linear_unit),
                linear_fc2=partial(GroupedLinear, split_dim=2, is_gated=False),
            ),
        )
    else:
        experts = backend.grouped_mlp_modules(config.moe_grouped_gemm)
    return partial(MoELayer, submodules=MoESubmodules(experts=experts, router=BalancedRouter))


class GroupedLinear(torch.nn.Module):
    """One matrix of every expert of this rank, as a single stacked weight.

    The product is torch's grouped matrix product: one kernel for bfloat16 on a GPU, a loop over the
    experts inside torch on a CPU and for float32. Interface and names in a checkpoint are those
    of Megatron's grouped matrices, whose only implementation needs Transformer Engine.
    """

    def __init__(
        self,
        num_local_experts: int,
        input_size: int,
        output_size: int,
        /,
        *,
        split_dim: int,
        is_gated: bool,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None,
        pg_collection: ProcessGroupCollection | None,
        name: str | None = None,
    ) -> None:
        """Create the weight with random numbers.

        Args:
            num_local_experts: E.
            input_size: inputs of the whole matrix.
            output_size: outputs of the whole matrix.
            split_dim: dimension of [E, O, I] that expert tensor-parallel ranks share.
            is_gated: outputs are a gate over as many rows that it gates.
            config: Megatron's.
            init_method: fills the weight.
            bias: must be False.
            skip_bias_add: of no meaning without a bias.
            is_expert: of no meaning here.
            tp_comm_buffer_name: of no meaning here.
            pg_collection: process groups of the experts.
            name: of no meaning here.
        """
        super().__init__()
        assert not bias, "the families here have no biases in their experts"
        assert pg_collection is not None, "Megatron's layer hands them on"
        self._split_dim, self._is_gated, self._groups = split_dim, is_gated, pg_collection
        sizes = [num_local_experts, output_size, input_size]
        sizes[split_dim] //= pg_collection.expt_tp.size()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.empty(sizes, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)
        set_tensor_model_parallel_attributes(self.weight, True, split_dim, 2 if is_gated else 1)
        # As Megatron's own matrices: whose gradients the ranks of the dense layers must not add up.
        has_own_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        setattr(self.weight, "allreduce", not has_own_groups)  # noqa: B010  (read by Megatron)
        if config.perform_initialization:
            with cast(Any, get_cuda_rng_tracker()).fork(get_expert_parallel_rng_tracker_name()):
                init_method(self.weight)

    def forward(self, rows_NI: Tensor, tokens_per_expert: list[int], /) -> tuple[Tensor, None]:
        """Return [N, O] and no bias.

        Args:
            rows_NI: [N, I], expert after expert.
            tokens_per_expert: [E] rows of each expert; they add up to N.
        """
        if not rows_NI.size(0):  # the grouped product takes no empty matrix
            return rows_NI @ self.weight[0].t(), None
        ends = torch.tensor(list(itertools.accumulate(tokens_per_expert)), dtype=torch.int32)
        weight_EIO = self.weight.transpose(1, 2)
        return F.grouped_mm(rows_NI, weight_EIO, offs=ends.to(rows_NI.device)), None

    def backward_dw(self) -> None:
        """Compute no delayed gradient: there is none."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: object = None
    ) -> ShardedStateDict:
        """Return the weight as a part of the layer's stack of all experts."""
        key, replica_id = f"{prefix}weight", (0, 0, self._groups.expt_dp.rank())
        build = partial(self._shard, sharded_offsets)
        if not self._is_gated:
            return {key: build(key, self.weight, replica_id, first=0, parts=1)}

        # Gate and rest are cut each for itself, so that a rank has its share of either.
        def build_both(key: str, whole: Tensor, replica_id: Any, _: object) -> ShardedStateDict:  # noqa: ANN401  (untyped upstream)
            gate, rest = whole.chunk(2, dim=1)
            return {
                "gate": build(key, gate, replica_id, first=0, parts=2),
                "rest": build(key, rest, replica_id, first=1, parts=2),
            }

        def merge(both: dict[str, Any]) -> Tensor:
            return torch.cat((both["gate"], both["rest"]), dim=1)

        return {key: ShardedTensorFactory(key, self.weight, build_both, merge, replica_id)}

    def _shard(
        self,
        sharded_offsets: tuple[Any, ...],
        key: str,
        tensor: Tensor,
        replica_id: Any,  # noqa: ANN401  (untyped upstream)
        *,
        first: int,
        parts: int,
    ) -> ShardedTensor:
        """Return one of ``parts`` tensors that follow each other along the dimension that is cut.

        Args:
            sharded_offsets: places along dimensions that the layers above have added in front.
            key: name in the checkpoint.
            tensor: [E, O, I] this rank's part of it.
            replica_id: which of several equal copies this is.
            first: which of the tensors it is.
            parts: tensors that make the whole.
        """
        groups, ahead = self._groups, len(sharded_offsets)
        tp_rank, tp_size = groups.expt_tp.rank(), groups.expt_tp.size()
        return ShardedTensor.from_rank_offsets(
            key,
            tensor,
            *sharded_offsets,
            (ahead, groups.ep.rank(), groups.ep.size()),
            (ahead + self._split_dim, first * tp_size + tp_rank, parts * tp_size),
            replica_id=replica_id,
            prepend_axis_num=ahead,
        )
