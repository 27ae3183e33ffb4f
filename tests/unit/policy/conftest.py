from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from prefixrl_mcore.policy import topology
from tests.support.tiny_models import write_tiny_qwen3


@pytest.fixture(scope="package", autouse=True)
def _leave_the_process_group() -> Iterator[None]:
    yield
    topology.shut_down()


@pytest.fixture(scope="package", params=[True, False], ids=["tied", "untied"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_qwen3(folder, tie_word_embeddings=request.param)


@pytest.fixture(scope="package")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="package")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def load_hf(folder: Path) -> Qwen3ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def hf_model(model_folder: Path) -> Qwen3ForCausalLM:
    return load_hf(model_folder)
