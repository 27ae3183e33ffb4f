"""Predicted memory of a SGLang server against bytes worked out by hand.

QWEN3_4B has 4 022 468 096 parameters: 36 layers of 100 930 816, one tied embedding of 388 956 160,
one norm of 2560; a token's keys and values are 2 x 36 layers x 8 heads x 128 channels.
"""

from typing import Any

import pytest

from prefixrl_mcore.accounting.server_memory import MEMORY_EFFICIENCY, ServerMemory, estimate_server
from prefixrl_mcore.accounting.step_time import StepWork
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.rollout import SGLangConfig
from tests.support.shapes import QWEN3_4B

P = 36 * 100_930_816 + 388_956_160 + 2560
GPU = 80 * 1024**3


def _server(**sglang: Any) -> ServerMemory:
    return estimate_server(QWEN3_4B, SGLangConfig(**sglang), gpu_memory_bytes=GPU)


def test_weights_and_cache_share_the_static_memory() -> None:
    server = _server(memory_fraction=0.5)
    assert (server.weights, server.static) == (2 * P, 40 * 1024**3)
    assert server.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2
    assert server.kv_tokens == (40 * 1024**3 - 2 * P) // 147_456 == 236_712


def test_tensor_parallelism_cuts_weights_and_heads() -> None:
    server = _server(memory_fraction=0.5, tensor_parallel_size=4)
    assert (server.weights, server.kv_bytes_per_token) == (P / 2, 147_456 / 4)


def test_key_value_heads_are_copied_where_there_are_more_gpus() -> None:
    assert _server(tensor_parallel_size=16).kv_bytes_per_token == 147_456 / 8


def test_float32_takes_twice_as_much() -> None:
    server = _server(dtype="float32")
    assert (server.weights, server.kv_bytes_per_token) == (4 * P, 2 * 147_456)


def test_the_cache_is_bounded_by_its_setting_and_never_negative() -> None:
    assert _server(max_kv_tokens=1000).kv_tokens == 1000
    assert _server(memory_fraction=0.05).kv_tokens == 0


@pytest.mark.parametrize("size", [3, 12])
def test_heads_that_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"{size} does not divide 32 attention heads and 8 key"):
        _server(tensor_parallel_size=size)


def test_what_a_server_keeps_asleep_is_sglangs_own_rule() -> None:
    # MiB: constant, tp / 8 GiB, 2 a sequence of the largest decoding graph, 8 a prefill graph;
    # those come in steps of 4 to 32, 16 to 256, 32 to 512, 64 to 1024, 256 to 4096, 512 to 8192
    # tokens: 8 + 14 + 8 + 8 + 12 + 8 = 58.
    assert _server(tensor_parallel_size=2).asleep == (512 + 256 + 2 * 256 + 8 * 58) * 1024**2
    assert _server(tensor_parallel_size=8).asleep == (512 + 1024 + 2 * 512 + 8 * 58) * 1024**2


def test_an_awake_server_has_activations_besides() -> None:
    server = _server(memory_fraction=0.5, tensor_parallel_size=2)
    assert server.activations == 12 * 1024**3  # 8192 tokens of 1.5 MiB
    assert server.kv_cache == server.kv_tokens * 147_456 / 2
    held = server.awake - server.asleep - server.activations
    assert 40 * 1024**3 - 147_456 / 2 < held <= 40 * 1024**3


HELD = ServerMemory(
    weights=8e9,
    static=18e9,
    kv_bytes_per_token=1e5,
    max_kv_tokens=None,
    asleep=2e9,
    activations=12e9,
)
WORK = StepWork(
    num_rollouts=64, mean_tokens=10_000, mean_completion_tokens=4_000, stream_tokens=10_000
)


def test_decoding_reads_weights_and_caches_once_a_token() -> None:
    # Ten sequences of 10 000 tokens fit; 8 000 tokens of each are cached on the mean.
    read = 8e9 + 10 * 8_000 * 1e5
    steps = 64 * 4_000 / 2 / 10
    seconds = HELD.decode_seconds(WORK, num_servers=2, bytes_per_second=1e12)
    assert seconds == pytest.approx(steps * read / (1e12 * MEMORY_EFFICIENCY))


def test_no_more_sequences_are_decoded_together_than_there_are() -> None:
    read = 8e9 + 4 * 8_000 * 1e5
    seconds = HELD.decode_seconds(WORK, num_servers=16, bytes_per_second=1e12)
    assert seconds == pytest.approx(4_000 * read / (1e12 * MEMORY_EFFICIENCY))
