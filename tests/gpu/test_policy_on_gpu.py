"""The policy and the fallback engine on one CUDA device, against transformers on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from prefixrl_mcore.config.policy import OptimizerConfig
from prefixrl_mcore.config.rollout import TransformersConfig
from prefixrl_mcore.policy import topology
from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams
from prefixrl_mcore.rollout.transformers_engine import TransformersEngine
from tests.support.policies import (
    build_policy,
    hf_row_statistics,
    make_batch,
    max_difference,
    weights_of,
)
from tests.support.tiny_models import EOS_ID, build_tiny_qwen3, write_model_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FLOAT32_TOLERANCE = 1e-3
"""Nats; cuBLAS adds up in another order than the CPU does."""

BFLOAT16_TOLERANCE = 0.3
"""Nats; logits of size 10 have steps of 2^-5 in bfloat16."""


@pytest.fixture(scope="module")
def hf_model() -> Qwen3ForCausalLM:
    return build_tiny_qwen3().eval()


@pytest.fixture(scope="module")
def model_folder(
    hf_model: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    yield write_model_folder(hf_model, tmp_path_factory.mktemp("gpu") / "model")
    topology.shut_down()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", FLOAT32_TOLERANCE), ("bfloat16", BFLOAT16_TOLERANCE)]
)
def test_logprobs_equal_transformers(
    model_folder: Path, hf_model: Qwen3ForCausalLM, dtype: str, tolerance: float
) -> None:
    batch = make_batch()
    policy = build_policy(model_folder, dtype=dtype)
    assert policy.topology.device.type == "cuda"
    for stream, (logprobs_R, entropies_R) in zip(
        batch.streams, policy.row_statistics(batch), strict=True
    ):
        with torch.no_grad():
            their_logprobs_R, their_entropies_R = hf_row_statistics(hf_model, stream)
        assert logprobs_R == pytest.approx(their_logprobs_R.numpy(), abs=tolerance)
        assert entropies_R == pytest.approx(their_entropies_R.numpy(), abs=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_change_the_weights_and_stay_finite(model_folder: Path, dtype: str) -> None:
    policy = build_policy(
        model_folder, optimizer=OptimizerConfig(lr=1e-2, clip_grad=1.0), dtype=dtype
    )
    before = weights_of(policy)
    for version in (1, 2, 3):
        result = policy.update(make_batch())
        assert np.isfinite([result.loss, result.gradient_norm]).all()
        assert result.gradient_norm > 0
        assert policy.policy_version == version
    assert max_difference(weights_of(policy), before) > 1e-3


def test_engine_samples_what_the_policy_scores(
    model_folder: Path, hf_model: Qwen3ForCausalLM
) -> None:
    engine = TransformersEngine(
        model_folder, TransformersConfig(), logits_dtype="float32", device="cuda"
    )
    params = SamplingParams(
        temperature=1.0, max_completion_tokens=8, max_total_tokens=32, stop_token_ids=(EOS_ID,)
    )
    request = SampleRequest(request_id="0", context_token_ids=(5, 6, 7), num_samples=4, seed=1)
    (completions,) = engine.sample([request], params)
    for completion in completions:
        tokens = torch.tensor([[5, 6, 7, *completion.token_ids]])
        with torch.no_grad():
            logprobs = hf_model(tokens).logits[0, 2:-1].float().log_softmax(-1)
        theirs = logprobs.gather(1, tokens[0, 3:, None])[:, 0]
        assert np.array(completion.logprobs) == pytest.approx(theirs.numpy(), abs=FLOAT32_TOLERANCE)
