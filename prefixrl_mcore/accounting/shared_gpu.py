"""Memory of a GPU that a trainer rank and a SGLang server share, phase by phase.

The server starts after the policy is built: it sizes its KV cache by what weights, gradients and
main weights leave free (``memory_at_start``). Moments come with the first update and stay. The
server (``rollout.colocated``) gives weights and KV cache back before each update
(``/release_memory_occupation``), takes memory for its weights again before the sync, and for the KV
cache only after it (``rollout/sglang/pool.py``). Rank 0 copies the weights that it sends to each of
its machine's GPUs that has a server, which leaves a CUDA context of its own there.
"""

from dataclasses import dataclass

from prefixrl_mcore.accounting.memory import StageMemory
from prefixrl_mcore.accounting.parameters import rank_parameters, stepped_parameters
from prefixrl_mcore.accounting.server_memory import ServerMemory
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.config.rollout import SGLangConfig

_CONTEXT_BYTES = 512 * 1024**2
"""Of a CUDA context; assumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedGpu:
    """Bytes on the GPU of one rank, trainer and server together.

    In all phases with the context that rank 0 has there, if the GPU is another rank's.
    """

    stage: int
    """The rank's pipeline stage."""

    sampling: float
    """The trainer's resident memory (weights, gradients, optimizer state) and all of an awake
    server: weights, KV cache, graphs and buffers, activations of a prefill."""

    sync: float
    """Both sides' weights: the trainer's resident memory, the weights that are on their way, and
    the server with its weights but without KV cache."""

    update: float
    """The trainer's peak, and what stays of a server that sleeps."""

    @property
    def peak(self) -> float:
        """The most of the three."""
        return max(self.sampling, self.sync, self.update)

    @property
    def peak_phase(self) -> str:
        """Which one that is."""
        phases = {"sampling": self.sampling, "sync": self.sync, "update": self.update}
        return max(phases, key=lambda name: phases[name])


def share_gpu(
    stage: StageMemory, server: ServerMemory, *, sync_bytes: float, context_bytes: float = 0.0
) -> SharedGpu:
    """Return what trainer and server need on one GPU.

    Args:
        stage: the trainer rank's.
        server: on the same GPU.
        sync_bytes: weights on their way there.
        context_bytes: of rank 0's context there, if the GPU is another rank's.
    """
    trainer = stage.resident + context_bytes
    return SharedGpu(
        stage=stage.stage,
        sampling=trainer + server.awake,
        sync=trainer + sync_bytes + server.weights + server.asleep,
        update=stage.total + context_bytes + server.asleep,
    )


def memory_at_start(shape: ModelShape, policy: PolicyConfig, stage: int) -> float:
    """Return the bytes that a trainer rank holds when the server starts.

    ``w P`` weights, ``4 P`` gradients, and the main weights that Megatron's optimizer clones when
    it is built: of the parameters that this rank steps, none in float32.
    """
    parameters = rank_parameters(shape, policy.parallel, stage)
    if policy.dtype == "float32":
        return 8.0 * parameters.total
    main = 2 if policy.optimizer.main_params_dtype == "float16" else 4
    on_device = 1.0
    if policy.optimizer.cpu_offload:
        on_device -= policy.optimizer.cpu_offload_fraction
    return 6.0 * parameters.total + on_device * main * stepped_parameters(policy, parameters)


def sync_export_bytes(shape: ModelShape, sglang: SGLangConfig) -> float:
    """Return what rank 0 holds at most of the weights that it exports.

    The largest of them twice (parts and whole), and two buckets.
    """
    return 2 * _largest_bytes(shape, sglang) + _two_buckets(shape, sglang)


def sync_receive_bytes(shape: ModelShape, sglang: SGLangConfig) -> float:
    """Return what another GPU of a server holds at most of the weights that it gets.

    Two buckets, rank 0's copies or the server's own: one may come before the last one is free. A
    server that reads files has none.
    """
    return 0.0 if sglang.sync.transport == "disk" else _two_buckets(shape, sglang)


def left_context_bytes(sglang: SGLangConfig, *, rank: int, gpus_per_node: int) -> float:
    """Return what the context takes that rank 0 leaves on a rank's GPU; none on other machines."""
    is_sent_to = 0 < rank < gpus_per_node and sglang.sync.transport != "disk"
    return float(_CONTEXT_BYTES) if is_sent_to else 0.0


def _two_buckets(shape: ModelShape, sglang: SGLangConfig) -> float:
    """Return the bytes of two buckets, each as large as it may be or as the largest weight."""
    return 2 * max(sglang.sync.bucket_bytes, _largest_bytes(shape, sglang))


def _largest_bytes(shape: ModelShape, sglang: SGLangConfig) -> int:
    """Return the bytes of the largest weight that is sent (gate and up go together)."""
    width = sglang.weight_bytes
    return width * shape.hidden_size * max(shape.vocab_size, 2 * shape.ffn_hidden_size)


def shared_stages(policy: PolicyConfig, num_server_gpus: int) -> range:
    """Return the pipeline stages of the ranks whose GPUs have a server.

    On one node rank 0 starts the servers on the first GPUs; Megatron's ranks are ordered by stage.
    """
    last = min(num_server_gpus, policy.parallel.world_size) - 1
    return range(stage_of(policy, last) + 1)


def shared_ranks(policy: PolicyConfig, num_server_gpus: int) -> list[int]:
    """Return rank 0 and, of each stage's other ranks whose GPUs have a server, the first.

    The others of a stage need no more: a rank that shares rank 0's machine comes first.
    """
    parallel = policy.parallel
    stage_ranks = parallel.world_size // parallel.pipeline_model_parallel_size
    firsts = {max(1, stage * stage_ranks) for stage in shared_stages(policy, num_server_gpus)}
    last = min(num_server_gpus, parallel.world_size) - 1
    return [0, *sorted(rank for rank in firsts if rank <= last)]


def stage_of(policy: PolicyConfig, rank: int) -> int:
    """Return the pipeline stage of a rank."""
    parallel = policy.parallel
    return rank // (parallel.world_size // parallel.pipeline_model_parallel_size)
