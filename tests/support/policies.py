"""Policies and batches for tests of the Megatron boundary, and Hugging Face as their truth."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import PreTrainedModel

from prefixrl_mcore.config.experts import ExpertsConfig
from prefixrl_mcore.config.policy import (
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyConfig,
)
from prefixrl_mcore.data.packing import PackedBatch, Stream, pack
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.records import TrainingSequence

STREAM_TOKENS = 96
NO_CLIPPING = 1e9
TEMPERATURE = 0.7
VOCAB_SIZE = 32


def make_sequences(
    num_sequences: int = 16, *, seed: int = 0, group_size: int = 2
) -> list[TrainingSequence]:
    """Return sequences of 9 to 36 random tokens, some with one-token contexts or completions."""
    generator = np.random.default_rng(seed)
    sequences: list[TrainingSequence] = []
    context: tuple[int, ...] = ()
    for index in range(num_sequences):
        if index % group_size == 0:
            length = 1 if index == 0 else int(generator.integers(4, 16))
            context = _tokens(generator, length)
        completion = _tokens(generator, 1 if index == 3 else int(generator.integers(5, 20)))
        sequences.append(
            TrainingSequence(
                sequence_id=f"rollout-{index}",
                group_index=index // group_size,
                context_token_ids=context,
                completion_token_ids=completion,
                advantage=float(generator.normal()),
                rollout_logprobs=tuple(generator.normal(-3.0, 0.1, len(completion)).tolist()),
            )
        )
    return sequences


def _tokens(generator: np.random.Generator, number: int) -> tuple[int, ...]:
    return tuple(generator.integers(4, VOCAB_SIZE, number).tolist())


def make_batch(
    sequences: Sequence[TrainingSequence] | None = None,
    *,
    stream_tokens: int = STREAM_TOKENS,
    num_ranks: int = 1,
    streams_multiple: int = 1,
    sequence_multiple: int = 1,
) -> PackedBatch:
    """Return ``sequences`` (by default those of ``make_sequences``) packed."""
    return pack(
        make_sequences() if sequences is None else sequences,
        stream_tokens=stream_tokens,
        num_ranks=num_ranks,
        streams_multiple=streams_multiple,
        sequence_multiple=sequence_multiple,
        max_completion_tokens=32,
    )


def build_policy(
    folder: Path,
    *,
    parallel: ParallelConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    loss: LossConfig | None = None,
    stream_tokens: int = STREAM_TOKENS,
    recompute: str = "none",
    dtype: str = "float32",
    num_steps: int = 10,
    head: HeadConfig | None = None,
    experts: ExpertsConfig | str | None = None,
    **settings: Any,
) -> MegatronPolicy:
    """Return a policy with the weights of ``folder``; without clipping unless configured.

    ``experts`` may be the name of their implementation alone; ``settings`` are further keys of
    ``policy``.
    """
    if not isinstance(experts, ExpertsConfig):
        experts = ExpertsConfig.model_validate({"implementation": experts})
    return MegatronPolicy.build(
        model_path=folder,
        policy=PolicyConfig.model_validate(
            {
                "dtype": dtype,
                "parallel": parallel or ParallelConfig(),
                "optimizer": optimizer or OptimizerConfig(lr=1e-3, clip_grad=NO_CLIPPING),
                "experts": experts,
                "recompute": recompute,
                "head": head or HeadConfig(),
                **settings,
            }
        ),
        loss=loss or LossConfig(),
        stream_tokens=stream_tokens,
        temperature=TEMPERATURE,
        num_steps=num_steps,
        seed=0,
    )


def weights_of(policy: MegatronPolicy) -> dict[str, Tensor]:
    """Return a copy of every weight by its Hugging Face name; all ranks must call this.

    All replicas of the model must have the same, since the first one's are returned.
    """
    _check_replicas(policy)
    weights = {name: tensor.detach().clone() for name, tensor in policy.export_weights()}
    if dist.get_world_size() == 1:
        return weights
    shared = [weights]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _check_replicas(policy: MegatronPolicy) -> None:
    """Raise unless this rank's weights are those of its data-parallel group's other ranks."""
    for chunk in policy.model_chunks:
        for name, parameter in chunk.named_parameters():
            group = (
                parallel_state.get_data_parallel_group(with_context_parallel=True)
                if getattr(parameter, "allreduce", True)
                else parallel_state.get_expert_data_parallel_group()
            )
            largest = parameter.detach().clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            if not torch.equal(largest, parameter):
                raise AssertionError(f"{name} differs between replicas of the model")


def gradients_of(policy: MegatronPolicy) -> dict[str, Tensor]:
    """Return the gradients of the last update by Hugging Face names; all ranks must call this."""
    _gather_sharded_gradients(policy)
    parameters = [p for chunk in policy.model_chunks for p in chunk.parameters()]
    kept = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    gradients = weights_of(policy)
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data.copy_(data)
    return gradients


def _gather_sharded_gradients(policy: MegatronPolicy) -> None:
    """Complete the gradient buffers: the distributed optimizer leaves each rank its shard."""
    for chunk in policy.model_chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shards = bucket.grad_data.chunk(ranks.size())
                mine = shards[ranks.rank()].clone()
                dist.all_gather(list(shards), mine, group=ranks)


def count_feed_forward_passes(policy: MegatronPolicy) -> list[str]:
    """Return a list that grows by an entry for every pass through a feed-forward layer, from now.

    Of a mixture it is the router's passes that are counted: recomputation begins inside the layer.
    """
    passes: list[str] = []
    for chunk in policy.model_chunks:
        for name, module in chunk.named_modules():
            if name.endswith(".mlp"):
                inner = getattr(module, "router", module)
                inner.register_forward_hook(lambda *_, name=name: passes.append(name))
    return passes


def by_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names in files, where transformers has experts fused in memory."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.rpartition("experts.")[0] + "experts."
        if name.endswith("experts.gate_up_proj"):
            for index, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                split[f"{layer}{index}.gate_proj.weight"] = gate
                split[f"{layer}{index}.up_proj.weight"] = up
        elif name.endswith("experts.down_proj"):
            split |= {f"{layer}{i}.down_proj.weight": down for i, down in enumerate(tensor)}
        else:
            split[name] = tensor
    return split


def hf_row_statistics(model: PreTrainedModel, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return [R] logprobs and entropies of a stream, one forward pass per sequence."""
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    starts = stream.sequence_starts.tolist()
    for first, last in itertools.pairwise(starts):
        inside = (stream.rows_R >= first) & (stream.rows_R < last)
        if not inside.any():
            continue
        tokens = torch.from_numpy(stream.token_ids_T[None, first:last])
        rows = torch.from_numpy(stream.rows_R[inside] - first)
        targets = torch.from_numpy(stream.targets_R[inside])
        logits_RV = model(tokens).logits[0, rows].float() / TEMPERATURE
        logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
        logprobs.append(logprobs_RV.gather(1, targets[:, None])[:, 0])
        entropies.append(-(logprobs_RV.exp() * logprobs_RV).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def hf_loss(
    model: PreTrainedModel, batch: PackedBatch, *, entropy_coefficient: float = 0.0
) -> Tensor:
    """Return the REINFORCE objective of a whole batch, with gradient."""
    total = torch.zeros(())
    for stream in batch.streams:
        if not stream.num_rows:
            continue
        logprobs_R, entropies_R = hf_row_statistics(model, stream)
        terms_R = torch.from_numpy(stream.advantages_R) * logprobs_R
        terms_R = terms_R + entropy_coefficient * entropies_R
        total = total - (torch.from_numpy(stream.weights_R) * terms_R).sum()
    return total / batch.num_trained_tokens


def max_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest absolute difference over equally named tensors."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    return max(float((ours[name].cpu() - theirs[name].cpu()).abs().max()) for name in ours)
