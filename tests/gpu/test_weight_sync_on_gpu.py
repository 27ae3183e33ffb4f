"""Weights from this process's GPU into a SGLang server on GPUs; never run so far.

The servers come from ``.venv-sglang``, or from the interpreter that PREFIXRL_SGLANG_PYTHON names.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from tests.support.hf_logprobs import hf_completion_logprobs
from tests.support.tiny_models import build_tiny_qwen3, write_model_folder

SGLANG_PYTHON = Path(
    os.environ.get(
        "PREFIXRL_SGLANG_PYTHON", str(Path(__file__).parents[2] / ".venv-sglang/bin/python")
    )
)

# Nats; float32 on both sides, other orders of summation (not measured yet).
TOLERANCE = 1e-2


def load_and_compare(engine: SGLangEngine, model: PreTrainedModel, version: int) -> None:
    """Send a model's weights from the GPU, and hold its samples against the model."""
    on_gpu = [(name, w.detach().cuda()) for name, w in model.named_parameters()]
    engine.load_weights(lambda: iter(on_gpu), version)
    request = SampleRequest(request_id="one", context_token_ids=(5, 6, 7, 8), num_samples=4, seed=0)
    params = SamplingParams(
        temperature=1.0, max_completion_tokens=20, max_total_tokens=100, stop_token_ids=()
    )
    for completion in engine.sample([request], params)[0]:
        expected = hf_completion_logprobs(
            model, request.context_token_ids, completion.token_ids, temperature=1.0
        )
        assert completion.policy_version == version
        assert completion.logprobs == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not SGLANG_PYTHON.exists(), reason="SGLang's environment is missing")
def test_colocated_server_gives_its_memory_back_and_samples_from_the_new_weights(
    tmp_path: Path,
) -> None:
    folder = write_model_folder(build_tiny_qwen3(seed=0), tmp_path / "model")
    engine = SGLangEngine(
        folder,
        SGLangConfig(python=SGLANG_PYTHON, dtype="float32", memory_fraction=0.3),
        logits_dtype="float32",
        max_total_tokens=200,
        logs_folder=tmp_path / "logs",
        device="cuda",
        colocated=True,
        num_trainer_ranks=1,
    )
    try:
        for version, seed in enumerate((1, 2)):
            free_awake, total = torch.cuda.mem_get_info()
            engine.sleep()
            free_asleep, _ = torch.cuda.mem_get_info()
            assert free_asleep - free_awake > 0.2 * total
            engine.wake()
            load_and_compare(engine, build_tiny_qwen3(seed=seed), version)
    finally:
        engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(not SGLANG_PYTHON.exists(), reason="SGLang's environment is missing")
@pytest.mark.parametrize(
    "transport",
    [
        None,  # GPU handles, if both sides have the same torch; on the GPU of this process
        "disk",  # the same
        pytest.param(
            "distributed",
            marks=pytest.mark.skipif(
                torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank"
            ),
        ),
    ],
)
def test_server_on_a_gpu_samples_from_the_weights_that_it_was_sent(
    tmp_path: Path, transport: str | None
) -> None:
    """The checksums of the first sync are compared as well: the engine does that itself."""
    folder = write_model_folder(build_tiny_qwen3(seed=0), tmp_path / "model")
    engine = SGLangEngine(
        folder,
        SGLangConfig.model_validate(
            {
                "python": SGLANG_PYTHON,
                "dtype": "float32",
                "memory_fraction": 0.2,
                "sync": {"transport": transport, "bucket_bytes": 50_000},
            }
        ),
        logits_dtype="float32",
        max_total_tokens=200,
        logs_folder=tmp_path / "logs",
        device="cuda",
        colocated=transport != "distributed",  # which puts the server on the next GPU
        num_trainer_ranks=1,
    )
    try:
        for version, seed in enumerate((1, 2)):
            load_and_compare(engine, build_tiny_qwen3(seed=seed), version)
    finally:
        engine.close()
