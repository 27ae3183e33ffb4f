"""GPU memory of a SGLang server, predicted: its room for sequences, and how fast it reads them.

Symbols are those of ``parameters.py``; ``w`` is bytes of an element, ``tp`` the server's own GPUs.
Nothing here is measured. What a server needs beside its static memory is SGLang's own rule, by
which it chooses ``--mem-fraction-static`` itself (``server_args.py`` of 0.5.17, the heuristics of
``mem_fraction_static`` and ``reserve_for_graph_mb``): 512 MiB, ``tp / 8`` GiB, 2 MiB for each
sequence of the largest graph of decoding, 8 MiB for each graph of prefilling, and 1.5 MiB of
activations for each token that is prefilled together.
"""

from dataclasses import dataclass

from prefixrl_mcore.accounting.parameters import model_size
from prefixrl_mcore.accounting.step_time import StepWork
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.rollout import SGLangConfig

MEMORY_EFFICIENCY = 0.6
"""Share of the GPU's bandwidth that decoding is assumed to reach."""

_MIB = 1024**2

_CONSTANT_MIB = 512
_PARALLEL_MIB = 1024 / 8
_DECODE_GRAPH_MIB = 2
_PREFILL_GRAPH_MIB = 8
_PREFILL_TOKEN_MIB = 1.5

_PREFILL_TOKENS = 8192
"""``--chunked-prefill-size`` that SGLang takes on GPUs of 60 to 160 GB."""

_PREFILL_GRAPHS = 58
"""Sizes up to ``_PREFILL_TOKENS`` that it makes graphs of."""


def _decode_sequences(tensor: int) -> int:
    """Return the sequences of the largest decoding graph that SGLang makes on those GPUs."""
    return 256 if tensor < 4 else 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerMemory:
    """Bytes on each GPU of one server, and what they hold."""

    weights: float
    """``w P / tp``: every matrix is cut, vocabulary and experts too."""

    static: float
    """``memory_fraction`` of what is free when the server starts: weights and KV cache. SGLang
    leaves the other share of it free, whatever else takes from there later."""

    kv_bytes_per_token: float
    """``2 w L K max(1, G / tp)``: a key-value head is copied where there are more GPUs."""

    max_kv_tokens: int | None
    """``rollout.sglang.max_kv_tokens``."""

    asleep: float
    """What stays when weights and KV cache are released: attention's and NCCL's buffers and the
    graphs, which the memory saver leaves alone (``SGLANG_MEMORY_SAVER_CUDA_GRAPH`` is off). The
    CUDA context comes on top, as every process's."""

    activations: float
    """Of the tokens that are prefilled together; a server that goes to sleep gives them back."""

    @property
    def kv_cache(self) -> float:
        """Bytes of the KV cache."""
        return self.kv_tokens * self.kv_bytes_per_token

    @property
    def awake(self) -> float:
        """All that a server holds while it samples."""
        return self.weights + self.kv_cache + self.asleep + self.activations

    @property
    def kv_tokens(self) -> int:
        """Tokens of the KV cache, of all sequences that run at a time; 0 without room."""
        room = max(0, int((self.static - self.weights) // self.kv_bytes_per_token))
        return room if self.max_kv_tokens is None else min(room, self.max_kv_tokens)

    def decode_seconds(self, work: StepWork, *, num_servers: int, bytes_per_second: float) -> float:
        """Return the least time of sampling a step's rollouts on equal servers.

        Each token of the sequences that run together takes one reading of the weights and of the
        caches; as many run as the cache holds at their mean length, and half of a completion is
        cached on the mean while it grows.

        Args:
            work: the step's rollouts.
            num_servers: servers that share them.
            bytes_per_second: bandwidth of one GPU, of which ``MEMORY_EFFICIENCY`` is reached.
        """
        running = min(work.num_rollouts / num_servers, self.kv_tokens / work.mean_tokens)
        running = max(1.0, running)
        cached = work.mean_tokens - work.mean_completion_tokens / 2
        read = self.weights + running * cached * self.kv_bytes_per_token
        rounds = work.num_rollouts * work.mean_completion_tokens / num_servers / running
        return rounds * read / (bytes_per_second * MEMORY_EFFICIENCY)


def estimate_server(
    shape: ModelShape, sglang: SGLangConfig, *, gpu_memory_bytes: float
) -> ServerMemory:
    """Return the memory of a server on a GPU.

    Args:
        shape: the model.
        sglang: dtype, GPUs of a server, memory fraction, bound of the KV cache.
        gpu_memory_bytes: memory of one GPU that is free when the server starts.

    Raises:
        ConfigError: if the model's heads do not divide over the server's GPUs.
    """
    tensor, groups = sglang.tensor_parallel_size, shape.num_query_groups
    if shape.num_attention_heads % tensor or (groups % tensor and tensor % groups):
        raise ConfigError(
            f"rollout.sglang.tensor_parallel_size = {tensor} does not divide "
            f"{shape.num_attention_heads} attention heads and {groups} key-value heads; take a "
            "divisor of both"
        )
    width = sglang.weight_bytes
    heads = max(1, groups // tensor)
    asleep = _CONSTANT_MIB + _PARALLEL_MIB * tensor
    asleep += _DECODE_GRAPH_MIB * _decode_sequences(tensor) + _PREFILL_GRAPH_MIB * _PREFILL_GRAPHS
    return ServerMemory(
        weights=width * model_size(shape).num_parameters / tensor,
        static=sglang.memory_fraction * gpu_memory_bytes,
        kv_bytes_per_token=2 * width * shape.num_layers * shape.kv_channels * heads,
        max_kv_tokens=sglang.max_kv_tokens,
        asleep=asleep * _MIB,
        activations=_PREFILL_TOKENS * _PREFILL_TOKEN_MIB * _MIB,
    )
