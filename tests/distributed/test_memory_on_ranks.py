"""The memory that ``prefixrl check`` predicts against that of real policies."""

from pathlib import Path

import pytest

from tests.support.memory_table import (
    CASES,
    MemoryCase,
    assert_predicted,
    build_model,
    by_stage,
    measure_case,
    predict_case,
)
from tests.support.tiny_models import write_model_folder

QUICK = {("dense", "tp2 sp")}
SLOW = {
    ("wide vocabulary", "tp1"),
    ("dense", "cp2"),
    ("dense", "dp2"),
    ("tied", "pp2"),
    ("dense", "pp2 vpp2"),
    ("mixture", "ep2 tp2 sp"),
}
"""The rest is in the table of ``docs/memory.md`` only."""


def _marked(case: MemoryCase) -> object:
    marks = [] if (case.model, case.name) in QUICK else [pytest.mark.slow]
    return pytest.param(case, id=f"{case.model}-{case.name}".replace(" ", "-"), marks=marks)


@pytest.mark.parametrize(
    "case", [_marked(case) for case in CASES if (case.model, case.name) in QUICK | SLOW]
)
def test_prediction_and_measurement_agree(tmp_path: Path, case: MemoryCase) -> None:
    folder = write_model_folder(build_model(case.model), tmp_path / "model")
    measured = by_stage(case, measure_case(folder, case))
    for predicted, found in zip(predict_case(folder, case), measured, strict=True):
        assert_predicted(predicted, found)
