"""Memory of a GPU that a trainer rank and a SGLang server share, phase by phase.

The server starts after the policy is built: it sizes its KV cache by what weights, gradients and
main weights leave free (``memory_at_start``). Moments come with the first update and stay. The
server (``rollout.colocated``) gives weights and KV cache back before each update
(``/release_memory_occupation``), takes memory for its weights again before the sync, and for the KV
cache only after it (``rollout/sglang/pool.py``).
"""

from dataclasses import dataclass

from prefixrl_mcore.accounting.memory import StageMemory
from prefixrl_mcore.accounting.parameters import rank_parameters, stepped_parameters
from prefixrl_mcore.accounting.server_memory import ServerMemory
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.config.rollout import SGLangConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedGpu:
    """Bytes on the GPU of one rank, trainer and server together."""

    stage: int
    """The rank's pipeline stage."""

    sampling: float
    """The trainer's resident memory (weights, gradients, optimizer state) and all of an awake
    server: weights, KV cache, graphs and buffers, activations of a prefill."""

    sync: float
    """Both sides' weights: the trainer's resident memory, what rank 0 exports at a time, and the
    server with its weights but without KV cache."""

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


def share_gpu(stage: StageMemory, server: ServerMemory, *, export_bytes: float) -> SharedGpu:
    """Return what trainer and server need on one GPU.

    Args:
        stage: the trainer rank's.
        server: on the same GPU.
        export_bytes: ``sync_export_bytes`` on rank 0's stage; 0 elsewhere.
    """
    return SharedGpu(
        stage=stage.stage,
        sampling=stage.resident + server.awake,
        sync=stage.resident + export_bytes + server.weights + server.asleep,
        update=stage.total + server.asleep,
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

    The largest of them twice (parts and whole), and two buckets, which are as large as
    ``rollout.sglang.sync.bucket_bytes`` or as the largest weight (gate and up go together).
    """
    width = 2 if sglang.dtype == "bfloat16" else 4
    largest = width * shape.hidden_size * max(shape.vocab_size, 2 * shape.ffn_hidden_size)
    return 2 * largest + 2 * max(sglang.sync.bucket_bytes, largest)


def shared_stages(policy: PolicyConfig, num_server_gpus: int) -> range:
    """Return the pipeline stages of the ranks whose GPUs have a server.

    On one node rank 0 starts the servers on the first GPUs; Megatron's ranks are ordered by stage.
    """
    parallel = policy.parallel
    stage_ranks = parallel.world_size // parallel.pipeline_model_parallel_size
    last = min(num_server_gpus, parallel.world_size) - 1
    return range(last // stage_ranks + 1)
