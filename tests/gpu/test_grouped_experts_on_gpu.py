"""The grouped matrix product's own kernel, against sequential experts on the same device."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefixrl_mcore.policy import topology
from prefixrl_mcore.policy.experts import GroupedLinear
from tests.support.policies import build_policy, gradients_of, make_batch, max_difference
from tests.support.tiny_models import build_tiny_qwen3_moe, write_model_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
"""Of gradients of up to 0.3; bfloat16 has steps of 2^-10 there, in sums over hundreds of tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    model = build_tiny_qwen3_moe(num_experts=6)
    with torch.no_grad():
        for layer in model.model.layers:  # the last expert gets few tokens or none
            layer.mlp.gate.weight[-1].zero_()
            layer.mlp.gate.weight[-1, 0] = -100.0
    yield write_model_folder(model, tmp_path_factory.mktemp("gpu") / "model")
    topology.shut_down()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_sequential_experts(folder: Path, dtype: str) -> None:
    by_experts: list[dict[str, Tensor]] = []
    for experts in ("sequential", "grouped"):
        policy = build_policy(folder, experts=experts, dtype=dtype)
        policy.dry_run(make_batch())  # what a run on a GPU begins with
        policy.update(make_batch())
        by_experts.append(gradients_of(policy))
    assert max_difference(*by_experts) < TOLERANCES[dtype]


def test_experts_without_rows_get_no_gradient(folder: Path) -> None:
    modules = build_policy(folder, experts="grouped", dtype="bfloat16").model_chunks[0].modules()
    linear = next(module for module in modules if isinstance(module, GroupedLinear))
    for tokens in ([2, 0, 3, 0, 0, 0], [0] * 6):
        rows_NI = torch.randn(sum(tokens), 64, dtype=torch.bfloat16, device="cuda")
        output_NO, _ = linear(rows_NI, tokens)
        (gradient,) = torch.autograd.grad((output_NO**2).sum(), linear.weight)
        assert [bool(expert.any()) for expert in gradient] == [number > 0 for number in tokens]
