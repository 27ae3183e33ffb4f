"""The demo itself, as `make demo` starts it, on a smaller task and with fewer steps."""

import json
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from tests.support.sglang_environments import sglang_python
from tests.support.signal_handlers import restored_stop_signals
from tests.support.tiny_run import CONFIG, TASK

METHODS = ("prefixrl", "rl", "sft_then_rl")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small task and a short run."""
    folder = tmp_path_factory.mktemp("configs")
    lines = [f"{key} = {value}" for key, value in TASK.model_dump().items()]
    (folder / "task.toml").write_text("\n".join(lines))
    text = CONFIG.read_text()
    for old, new in (
        ("num_steps = 200\n", "num_steps = 2\n"),
        ("prompts_per_step = 16", "prompts_per_step = 4"),
        ("group_size = 8", "group_size = 4"),
        ("every_steps = 15", "every_steps = 1"),
        ("num_samples = 16", "num_samples = 4"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    (folder / "run.toml").write_text(text)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)  # eight servers start one after the other where cores are shared
@pytest.mark.parametrize("engine", ["transformers", "sglang"])
def test_the_demo_runs_every_stage_once_and_ends_with_report_and_summary(
    engine: str, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine == "sglang":
        sglang_python()
    folder = tmp_path / "demo"
    arguments = ["demo", "--folder", str(folder), "--configs", str(configs)]
    arguments += ["--engine", engine]
    with restored_stop_signals():
        assert main(arguments) == 0
    out = capsys.readouterr().out
    assert str(folder / "report.html") in out
    assert str(folder / "summary.json") in out
    assert str(folder / "demo.png") in out
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "held-out" in (folder / "report.html").read_text()

    summary = json.loads((folder / "summary.json").read_text())
    for method in METHODS:
        values = summary["methods"][method]
        lengths = {
            len(values[key])
            for key in (
                "total_flops",
                "train_accuracy",
                "heldout_accuracy",
                "all_negative_fraction",
            )
        }
        assert lengths == {3}
        assert values["engines"]["train"].startswith(f"{engine} ")
        assert len(set(values["engines"].values())) == 1
        assert values["fallbacks"] == {}
    assert summary["methods"]["rl"]["total_flops"][0] == 0
    collected = summary["methods"]["prefixrl"]["collect_flops"]
    assert summary["methods"]["prefixrl"]["total_flops"][0] == collected > 0
    assert summary["methods"]["sft_then_rl"]["total_flops"][0] > collected
    assert summary["unlock_curve"]

    seconds = (folder / "stages.json").read_text()
    assert main(arguments) == 0
    assert (folder / "stages.json").read_text() == seconds

    task = (configs / "task.toml").read_text()
    (configs / "task.toml").write_text("num_parts = 3\n")
    assert main(arguments) == 2
    (configs / "task.toml").write_text(task)
