"""What is redirected from CUDA to the CPU; an upgrade of megatron-core must not add to it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.policy import cpu_runtime
from tests.support.policies import build_policy, make_batch
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU runtime does nothing where there is CUDA"
)

KNOWN_REDIRECTIONS = {
    "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
    "megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
    "megatron.core.optimizer.optimizer:FP32Optimizer.__init__",
    "megatron.core.optimizer.optimizer:MegatronOptimizer.has_grad_norm_group",
    "megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.__init__",
    "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
    "megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining",
    "megatron.core.utils:local_multi_tensor_l2_norm",
}
"""megatron's functions that ask for CUDA when one process builds and updates policies."""


def _resolve(name: str) -> object:
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} does not exist")


def test_every_replaced_attribute_is_ours() -> None:
    cpu_runtime.install()
    for name in cpu_runtime.REPLACED_ATTRIBUTES:
        replaced = _resolve(name)
        code = getattr(getattr(replaced, "__wrapped__", replaced), "__code__", None)
        # What is no function is an object of a class of ours.
        made_in = code.co_filename if code else sys.modules[type(replaced).__module__].__file__
        assert made_in == cpu_runtime.__file__, name


def test_an_update_redirects_the_known_functions_and_no_other(tied_folder: Path) -> None:
    # In a process of its own: the functions that other tests needed are counted there, not here.
    (redirected,) = run_on_ranks(redirections_of_two_updates, tied_folder, world_size=1)
    assert redirected == KNOWN_REDIRECTIONS


def redirections_of_two_updates(_rank: int, folder: Path) -> frozenset[str]:
    """Update once in each precision and return what was redirected."""
    cpu_runtime.install()
    for dtype in ("float32", "bfloat16"):
        optimizer = OptimizerConfig(lr=1e-3, clip_grad=0.1)
        policy = build_policy(folder, optimizer=optimizer, dtype=dtype)
        policy.update(make_batch())
    return cpu_runtime.redirected_functions()


def test_only_megatron_code_is_redirected() -> None:
    cpu_runtime.install()
    source = "def ask(torch): return torch.zeros(2, device='cuda')"
    as_megatron: dict[str, object] = {"__name__": "megatron.core.pretended"}
    as_other: dict[str, object] = {"__name__": "somebody.else"}
    exec(source, as_megatron)
    exec(source, as_other)
    with cpu_runtime.megatron_on_cpu():
        assert as_megatron["ask"](torch).device.type == "cpu"
        with pytest.raises((RuntimeError, AssertionError)):
            as_other["ask"](torch)
        assert torch.zeros(1).type() == "torch.FloatTensor"
    with pytest.raises((RuntimeError, AssertionError)):
        as_megatron["ask"](torch)


def test_the_context_nests() -> None:
    cpu_runtime.install()
    source = "def ask(torch): return torch.zeros(2).type(), torch.zeros(2).cuda()"
    as_megatron: dict[str, object] = {"__name__": "megatron.core.pretended"}
    exec(source, as_megatron)
    with cpu_runtime.megatron_on_cpu():
        with cpu_runtime.megatron_on_cpu():
            pass
        kind, tensor = as_megatron["ask"](torch)
    assert kind == "torch.cuda.FloatTensor"
    assert tensor.device.type == "cpu"
