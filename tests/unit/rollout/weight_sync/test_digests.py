import hashlib
import json
import subprocess

import pytest
import torch
from torch import Tensor

from prefixrl_mcore.rollout.weight_sync import digests
from prefixrl_mcore.rollout.weight_sync.digests import CpuDigest
from tests.support.digests import gpu_digest
from tests.support.sglang_environments import sglang_python

# SGLang's own kernel, interpreted; the launching code around it asks for a GPU.
KERNEL = """
import importlib.util, json, sys, sysconfig
import torch, triton
path = sysconfig.get_path("purelib") + "/sglang/kernels/ops/memory/gpu_tensor_hash.py"
spec = importlib.util.spec_from_file_location("gpu_tensor_hash", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
values = []
for size in json.loads(sys.argv[1]):
    u32 = torch.arange(size, dtype=torch.int64).mul(2654435761).remainder(2**32)
    u32 = u32.to(torch.uint32)
    seed = 0x243F6A88
    partials = torch.empty(triton.cdiv(size, 8192), dtype=torch.uint64)
    module.hash_tiles32_kernel_blocked[(partials.numel(),)](
        u32, partials, size, seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=module.FMIX32_C1, FM_C2=module.FMIX32_C2, POS_A=module.POS_C1, POS_B=module.POS_C2,
        TILE=8192, BLOCK=256, USE_CG=False)
    total = sum(partials.tolist()) & (2**64 - 1)
    values.append(f"{module._final_splitmix64(total):016x}")
print(json.dumps(values))
"""

SIZES = [1, 255, 8192, 8193, 20_000]


def words(size: int) -> Tensor:
    values = torch.arange(size, dtype=torch.int64).mul(2654435761).remainder(2**32)
    return values.to(torch.uint32).view(torch.float32)


def test_digest_of_a_cpu_server_is_the_beginning_of_sha_256() -> None:
    weight = torch.randn(5, 3)
    digest = CpuDigest()
    digest.update(weight[:2])
    digest.update(weight[2:])

    assert digest.value() == hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("chunk_words", [8192, 1024 * 8192])
def test_digest_of_a_gpu_server_does_not_depend_on_the_pieces(
    chunk_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = words(20_000)
    expected = gpu_digest(whole)
    monkeypatch.setattr(digests, "_CHUNK_WORDS", chunk_words)

    assert gpu_digest(whole[:3], whole[3:9000], whole[9000:]) == expected
    halves = whole.view(torch.bfloat16)
    assert gpu_digest(halves[:7], halves[7:]) == expected
    assert gpu_digest(whole.flip(0)) != expected


def test_last_word_of_a_gpu_servers_tensor_is_filled_with_zeros() -> None:
    odd = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    even = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.bfloat16)

    assert gpu_digest(odd) == gpu_digest(even)
    assert gpu_digest() == "0" * 16


@pytest.mark.slow
def test_digest_of_a_gpu_server_is_what_sglangs_kernel_computes() -> None:
    result = subprocess.run(
        [sglang_python(), "-c", KERNEL, json.dumps(SIZES)],
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr[-2000:]
    expected = json.loads(result.stdout.splitlines()[-1])
    assert [gpu_digest(words(size)) for size in SIZES] == expected
