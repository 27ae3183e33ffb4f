"""Rollout servers in ``prefixrl check``: room, speed, and what shares a GPU with them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.table import Table

from prefixrl_mcore.accounting.memory import StageMemory
from prefixrl_mcore.accounting.server_memory import ServerMemory, estimate_server
from prefixrl_mcore.accounting.shared_gpu import (
    SharedGpu,
    left_context_bytes,
    memory_at_start,
    share_gpu,
    shared_ranks,
    shared_stages,
    stage_of,
    sync_export_bytes,
    sync_receive_bytes,
)
from prefixrl_mcore.accounting.step_time import StepWork
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.rollout import RolloutConfig
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.launch.machine import Machine

_GIB = 1024**3


def with_servers_of_all_nodes(config: RunConfig, machine: Machine) -> RunConfig:
    """Return a config with the servers that a job of several nodes starts on the trainer's GPUs.

    Unlike on one node the config's own number does not count: every node is filled.
    """
    servers, num_ranks = config.rollout.sglang, config.policy.parallel.world_size
    are_beside_ranks = config.rollout.starts_servers and config.rollout.colocated
    if not are_beside_ranks or num_ranks <= machine.assumptions.gpus_per_node:
        return config
    rollout = config.rollout.with_num_servers(max(1, num_ranks // servers.tensor_parallel_size))
    return config.model_copy(update={"rollout": rollout})


def predict_server(config: RunConfig, shape: ModelShape, machine: Machine) -> ServerMemory:
    """Return the memory of a SGLang server; beside the trainer, of the one with the least room.

    Raises:
        ConfigError: if the model's heads do not divide over the server's GPUs.
    """
    taken = 0.0
    if machine.own_gpus(config.rollout) is None:
        taken = max(memory_at_start(shape, config.policy, stage) for stage in _stages(config))
    return _server(config, shape, machine, taken)


def share_gpus(
    config: RunConfig, shape: ModelShape, stages: Sequence[StageMemory], machine: Machine
) -> SharedGpu:
    """Return the GPU that needs most of those that trainer and servers share.

    Raises:
        ConfigError: if the model's heads do not divide over the server's GPUs.
    """
    policy, servers = config.policy, config.rollout.sglang

    def share(rank: int) -> SharedGpu:
        stage = stage_of(policy, rank)
        sync_bytes = sync_receive_bytes if rank else sync_export_bytes
        return share_gpu(
            stages[stage],
            _server(config, shape, machine, memory_at_start(shape, policy, stage)),
            sync_bytes=sync_bytes(shape, servers),
            context_bytes=left_context_bytes(
                servers, rank=rank, gpus_per_node=machine.assumptions.gpus_per_node
            ),
        )

    shared = [share(rank) for rank in shared_ranks(policy, _num_server_gpus(config))]
    return max(shared, key=lambda gpu: gpu.peak)


def with_sampling(
    config: RunConfig, shape: ModelShape, work: StepWork, machine: Machine
) -> Machine:
    """Return the machine with the GPUs that sample, and the least time that they take.

    Raises:
        ConfigError: if servers leave GPUs over, or the model does not divide over one.
    """
    rollout, speed = config.rollout, machine.memory_bytes_per_second
    if rollout.engine == "transformers":
        assumptions = replace(machine.assumptions, rollout_gpus=1)
        return replace(machine, assumptions=assumptions)
    size = rollout.sglang.tensor_parallel_size
    gpus = machine.own_gpus(rollout) or rollout.sglang.num_members * size
    seconds = 0.0
    if speed is not None:
        server = predict_server(config, shape, machine)
        seconds = server.decode_seconds(work, num_servers=gpus // size, bytes_per_second=speed)
    assumptions = replace(machine.assumptions, rollout_gpus=gpus, decode_seconds=seconds)
    return replace(machine, assumptions=assumptions)


def own_server_lines(
    server: ServerMemory, rollout: RolloutConfig, own_gpus: int, machine: Machine
) -> Iterator[str]:
    """Yield what a server on GPUs of its own holds, and whether it fits there.

    Args:
        server: its prediction.
        rollout: servers, longest sequence.
        own_gpus: GPUs of all servers.
        machine: whose whole GPU a server may take: what the rest needs is counted.
    """
    yield from _room_lines(server, rollout)
    verdict = "fits" if server.awake <= machine.memory_bytes else "does not fit"
    yield (
        f"  {own_gpus // rollout.sglang.tensor_parallel_size} server(s) on {own_gpus} GPUs of "
        f"their own: with {_gib(server.asleep + server.activations)} GiB of buffers, graphs and "
        f"activations {_gib(server.awake)} of {_gib(machine.memory_bytes)}, {verdict}"
    )
    if server.awake > machine.memory_bytes:
        yield from _fraction_line(server, rollout, machine.memory_bytes - server.awake)


def shared_server_lines(
    server: ServerMemory,
    rollout: RolloutConfig,
    shared: SharedGpu,
    stages: Sequence[StageMemory],
    machine: Machine,
) -> Iterator[str | Table]:
    """Yield what servers on the trainer's GPUs hold, and whether both fit in every phase.

    Args:
        server: the prediction of the one with the least room.
        rollout: servers, longest sequence.
        shared: the GPU that needs most.
        stages: the trainer's memory.
        machine: what trainer and server together may take of a GPU.
    """
    yield from _room_lines(server, rollout)
    yield _phase_table(shared, stages[shared.stage])
    usable = machine.usable_bytes
    yield (
        f"  {rollout.sglang.num_members} server(s) on GPUs of the trainer: at most "
        f"{_gib(shared.peak)} GiB of {_gib(usable)}, in the {shared.peak_phase}, "
        f"{'fits' if shared.peak <= usable else 'does not fit'}"
    )
    if shared.peak <= usable:
        return
    yield "  servers on GPUs of their own: --rollout-gpus N (--shape split when launching)"
    if shared.peak_phase == "sampling":
        yield from _fraction_line(server, rollout, usable - shared.peak)


def _room_lines(server: ServerMemory, rollout: RolloutConfig) -> Iterator[str]:
    """Yield what a server has room for."""
    longest = server.kv_tokens // rollout.max_total_tokens
    yield (
        f"SGLang server on {rollout.sglang.tensor_parallel_size} GPU(s): weights "
        f"{_gib(server.weights)} GiB of each GPU's {_gib(server.static)} "
        f"(rollout.sglang.memory_fraction {rollout.sglang.memory_fraction:g}), a KV cache of "
        f"{server.kv_tokens} tokens: {longest} of the longest sequences at a time"
    )
    if longest == 0:
        yield (
            "  does not fit: not even one; raise rollout.sglang.tensor_parallel_size, "
            "memory_fraction or max_kv_tokens, or lower rollout.max_total_tokens"
        )


def _fraction_line(server: ServerMemory, rollout: RolloutConfig, spare: float) -> Iterator[str]:
    """Yield the ``memory_fraction`` with which a server would fit; ``spare`` is negative."""
    free = server.static / rollout.sglang.memory_fraction
    if not free:
        return
    possible = math.floor(100 * (server.weights + server.kv_cache + spare) / free) / 100
    if possible * free > server.weights:
        yield f"  rollout.sglang.memory_fraction = {possible:g} would fit"


def _phase_table(shared: SharedGpu, stage: StageMemory) -> Table:
    """Return GiB of trainer and server on one GPU, a column for each phase."""
    table = Table(title=f"predicted memory of a shared GPU (stage {stage.stage}), GiB")
    for name in ("", "sampling", "weight sync", "update (server asleep)"):
        table.add_column(name)
    totals = (shared.sampling, shared.sync, shared.update)
    trainer = (stage.resident, stage.resident, stage.total)
    server = (total - own for total, own in zip(totals, trainer, strict=True))
    table.add_row("trainer", *map(_gib, trainer))
    table.add_row("server, and what rank 0 has there", *map(_gib, server))
    table.add_section()
    table.add_row("together", *map(_gib, totals))
    return table


def _stages(config: RunConfig) -> range:
    """Return the pipeline stages whose GPUs have a server."""
    return shared_stages(config.policy, _num_server_gpus(config))


def _num_server_gpus(config: RunConfig) -> int:
    """Return the GPUs of all servers."""
    servers = config.rollout.sglang
    return servers.num_members * servers.tensor_parallel_size


def _server(config: RunConfig, shape: ModelShape, machine: Machine, taken: float) -> ServerMemory:
    """Return the memory of a server that starts on GPUs of which so many bytes are taken."""
    free = max(0.0, machine.memory_bytes - taken)
    return estimate_server(shape, config.rollout.sglang, gpu_memory_bytes=free)


def _gib(num_bytes: float) -> str:
    """Return bytes as GiB."""
    return f"{num_bytes / _GIB:.2f}"
