"""What lets SGLang's server run on a machine without a GPU; part of ``serve.py``, off on GPUs."""

import gc
import multiprocessing
import os
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MASK = 0xFFFFFFFF


def prepare(*, is_deterministic: bool) -> None:
    """Change this process, and with it those that it forks; call before SGLang is imported.

    Args:
        is_deterministic: the server is started with ``--enable-deterministic-inference``.
    """
    _fork_processes()
    if is_deterministic:
        # The sampler is to be compiled, and the compiler knows no unsigned 64-bit seeds on a CPU.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read when torch is imported
    _name_the_device()
    _wait_for_no_gpu()
    if is_deterministic:
        _allow_deterministic_inference()


def keep_imports_out_of_garbage_collection() -> None:
    """Never look through what is alive now; call when everything is imported.

    On a CPU every flush of the cache is a full garbage collection, and most of what that looks
    through are imported modules: 0.36 s of a weight sync.
    """
    gc.freeze()


def _fork_processes() -> None:
    """Fork the server's processes instead of spawning them.

    A spawned process imports SGLang again, and on two cores those imports are most of the time that
    a start takes. Forking is safe here because nothing has touched a GPU or started
    a thread before.
    """
    multiprocessing.set_start_method("fork")
    # SGLang asks for "spawn" by force, through this attribute.
    multiprocessing.set_start_method = _keep_start_method


def _keep_start_method(method: str | None, force: bool = False) -> None:
    """Do nothing, whatever is asked for."""


def _name_the_device() -> None:
    """Make the CPU torch's device: a build for CUDA takes that, also where there is none (2.14)."""
    import torch

    module_of = torch.get_device_module

    def get_device_module(device: "torch.device | str | None" = None) -> ModuleType:
        return module_of("cpu" if device is None else device)

    torch.get_device_module = get_device_module


def _wait_for_no_gpu() -> None:
    """Let the checksums of weights through, which wait for the GPU before and after."""
    import torch

    torch.cuda.synchronize = _do_nothing


def _allow_deterministic_inference() -> None:
    """Let deterministic inference through on PyTorch's attention, with a PyTorch hash to sample.

    The batch-invariant Triton products are left out. What makes the results independent of the
    batch instead are one request at a time and no prefix cache (``determinism.py``).
    """
    hashes: Any = import_module("sglang.kernels.ops.sampling.murmur_hash")
    hashes.murmur_hash32 = _murmur_hash32
    products: Any = import_module("sglang.srt.batch_invariant_ops")
    products.enable_batch_invariant_mode = _do_nothing
    choices = import_module("sglang.srt.server_args").DETERMINISTIC_ATTENTION_BACKEND_CHOICES
    if "torch_native" not in choices:
        choices.append("torch_native")


def _do_nothing(*_args: object, **_kwargs: object) -> None:
    """Stand for a function that a CPU can do without."""


def _murmur_hash32(
    seed: "torch.Tensor", positions: "torch.Tensor", col_indices: "torch.Tensor"
) -> "torch.Tensor":
    """Return the [n, m] uint32 hashes that SGLang's Triton kernel gives (murmur3, 32 bit).

    Args:
        seed: [n] uint64.
        positions: [n] integers.
        col_indices: [m] integers.
    """
    import torch

    seed = seed.view(torch.int64)
    hashed = _mix(torch.zeros_like(seed), seed & _MASK)
    hashed = _mix(hashed, (seed >> 32) & _MASK)
    hashed = _mix(hashed, positions.to(torch.int64) & _MASK)
    hashed = _mix(hashed[:, None], (col_indices.to(torch.int64) & _MASK)[None, :]) ^ 16
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & _MASK
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & _MASK
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def _mix(hashed: "torch.Tensor", block: "torch.Tensor") -> "torch.Tensor":
    block = _rotate((block * 0xCC9E2D51) & _MASK, 15)
    hashed = hashed ^ ((block * 0x1B873593) & _MASK)
    return (_rotate(hashed, 13) * 5 + 0xE6546B64) & _MASK


def _rotate(values: "torch.Tensor", bits: int) -> "torch.Tensor":
    return ((values << bits) | (values >> (32 - bits))) & _MASK
