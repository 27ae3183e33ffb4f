"""The memory that ``prefixrl check`` predicts against the peak that CUDA's allocator reports."""

from pathlib import Path

import pytest
import torch

from tests.support.memory_table import (
    GPU_CASES,
    MemoryCase,
    assert_predicted,
    build_model,
    measure_case,
    predict_case,
)
from tests.support.tiny_models import write_model_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"recompute-{case.recompute}")
def test_prediction_and_measurement_agree(tmp_path: Path, case: MemoryCase) -> None:
    folder = write_model_folder(build_model(case.model, is_large=True), tmp_path / "model")
    (measured,) = measure_case(folder, case)
    (predicted,) = predict_case(folder, case, device="cuda")
    assert_predicted(predicted, measured)
