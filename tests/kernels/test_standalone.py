"""The kernels without the trainer: what they import, and the example of their README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_models import write_tiny_qwen3

ROOT = Path(__file__).parents[2]

_IMPORT = """
import sys
for name in ("megatron", "prefixrl_mcore", "transformers"):
    sys.modules[name] = None  # importing it fails
import prefixrl_kernels
print(sorted(prefixrl_kernels.__all__))
"""


def _run(code: str) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT / "kernels",
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_it_imports_without_megatron_and_without_the_trainer() -> None:
    printed = _run(_IMPORT)
    for name in ("reinforce_head", "head_logprobs", "linear_logprob_forward"):
        assert f"'{name}'" in printed


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    readme = (ROOT / "kernels" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    folder = write_tiny_qwen3(tmp_path / "model")
    assert code.count('"Qwen/Qwen3-0.6B"') == 1
    printed = _run(code.replace('"Qwen/Qwen3-0.6B"', repr(str(folder))))
    # REINFORCE with one advantage: the loss is minus that times the mean logprob.
    loss, *rows = re.findall(r"-?\d+\.\d+", printed)
    logprobs = [float(value) for value in rows[:8]]
    assert float(loss) == pytest.approx(-0.5 * sum(logprobs) / 8, abs=1e-3)
    assert len(code.strip().splitlines()) <= 22
