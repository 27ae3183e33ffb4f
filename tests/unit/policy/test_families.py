"""Every model family against transformers: logprobs, gradients, weights in and out."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixrl_mcore.checkpoint.convert import live_load
from tests.support.policies import (
    build_policy,
    by_expert,
    gradients_of,
    hf_loss,
    hf_row_statistics,
    make_batch,
    max_difference,
    weights_of,
)
from tests.support.tiny_models import (
    build_tiny_llama,
    build_tiny_qwen2,
    build_tiny_qwen3,
    build_tiny_qwen3_moe,
    write_model_folder,
)

LOGPROB_TOLERANCE = 1e-5
"""Nats; float32."""

GRADIENT_TOLERANCE = 2e-6
"""float32: other orders of summation; the gradients' largest entries are of size 0.1 to 1."""

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3-moe": build_tiny_qwen3_moe,
    "qwen3-moe-tied": lambda: build_tiny_qwen3_moe(tie_word_embeddings=True),
    "qwen3-moe-not-renormalized": lambda: build_tiny_qwen3_moe(is_renormalized=False),
    "qwen2.5-tied": build_tiny_qwen2,
    "qwen2.5": lambda: build_tiny_qwen2(tie_word_embeddings=False),
    "llama-3": build_tiny_llama,
    "llama-3-tied": lambda: build_tiny_llama(tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(MODELS[request.param](), tmp_path_factory.mktemp("model"))


@pytest.fixture
def hf_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_weights_go_in_and_out_bit_for_bit(folder: Path) -> None:
    truth = load_file(folder / "model.safetensors")
    assert max_difference(weights_of(build_policy(folder)), truth) == 0.0


def test_logprobs_and_entropies_equal_transformers(folder: Path, hf_model: PreTrainedModel) -> None:
    batch = make_batch()
    rows = build_policy(folder).row_statistics(batch)
    for stream, (logprobs_R, entropies_R) in zip(batch.streams, rows, strict=True):
        with torch.no_grad():
            their_logprobs_R, their_entropies_R = hf_row_statistics(hf_model, stream)
        assert logprobs_R == pytest.approx(their_logprobs_R.numpy(), abs=LOGPROB_TOLERANCE)
        assert entropies_R == pytest.approx(their_entropies_R.numpy(), abs=LOGPROB_TOLERANCE)
        assert logprobs_R.std() > 0.5  # far from uniform


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_gradient_equals_transformers(
    folder: Path, hf_model: PreTrainedModel, recompute: str
) -> None:
    batch = make_batch()
    policy = build_policy(folder, recompute=recompute)
    result = policy.update(batch)
    expected = hf_loss(hf_model, batch)
    expected.backward()
    theirs = {name: p.grad for name, p in hf_model.named_parameters() if p.grad is not None}
    norm = torch.stack([grad.norm() for grad in theirs.values()]).norm()
    ours = gradients_of(policy)
    assert max_difference(ours, by_expert(theirs)) < GRADIENT_TOLERANCE
    assert result.loss == pytest.approx(expected.item(), abs=1e-5)
    assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-5)
    assert min(float(gradient.abs().max()) for gradient in ours.values()) > 1e-4


def test_weights_that_are_rounded_into_the_model_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model_folder(build_tiny_qwen3().half(), tmp_path / "half")
    build_policy(folder, dtype="float32")
    assert "rounded" not in caplog.text
    build_policy(folder, dtype="bfloat16")
    assert "weights of type torch.float16 are rounded to the model's torch.bfloat16" in caplog.text
    caplog.clear()
    monkeypatch.setattr(live_load, "dist", SimpleNamespace(get_rank=lambda: 1))
    build_policy(folder, dtype="bfloat16")
    assert "rounded" not in caplog.text
