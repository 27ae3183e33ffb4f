"""``summary.json`` and the README's picture."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig
from prefixrl_mcore.report.figures import plot_headline
from prefixrl_mcore.report.html import build_report
from prefixrl_mcore.report.reader import read_run
from prefixrl_mcore.report.style import LIGHT_COLORS, run_styles
from prefixrl_mcore.report.summary import fallback_lines, write_summary
from prefixrl_mcore.rollout.build import build_engine
from tests.support.fake_run import write_fake_run
from tests.support.tiny_models import write_tiny_qwen3


def test_summary_has_one_aligned_list_per_quantity(tmp_path: Path) -> None:
    folders = [
        write_fake_run(tmp_path / "p", method="prefixrl", num_steps=20),
        write_fake_run(tmp_path / "r", method="rl", num_steps=30),
    ]
    summary = json.loads(write_summary(folders, tmp_path / "summary.json").read_text())
    run = read_run(folders[0])

    def evaluated(name: str) -> list[float]:
        return [line.values[f"eval/{name}"] for line in run.evals]

    mine = summary["methods"]["prefixrl"]
    assert mine["steps"] == [0, 10, 20]
    assert mine["total_flops"] == [line.values["flops/total"] for line in run.evals]
    assert mine["train_accuracy"] == evaluated("train/accuracy")
    assert mine["heldout_accuracy"] == evaluated("heldout/accuracy")
    assert mine["heldout_set"] == "heldout"
    assert mine["all_negative_fraction"] == evaluated("train/all_negative_fraction")
    assert len(summary["methods"]["rl"]["total_flops"]) == 4
    assert summary["unlock_curve"]["step"] == 0
    assert summary["unlock_curve"]["fraction"] == [f / 10 for f in range(10)]
    assert mine["unlock_curve"]["step"] == 20
    assert summary["seconds_per_stage"]["rl"] == {"collect": 57.2, "train": 27.0}


def test_summary_of_an_empty_run_has_empty_lists(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=0)
    summary = json.loads(write_summary([run], tmp_path / "summary.json").read_text())
    method = summary["methods"]["prefixrl"]
    assert method["total_flops"] == method["train_accuracy"] == method["heldout_accuracy"] == []
    assert method["unlock_curve"] is None
    assert summary["unlock_curve"] is None


def _write_engine(run: Path, stage: str, engine: str, reason: str | None) -> None:
    file = run / "logs" / stage / "engine.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"engine": engine, "fallback_reason": reason}))


def test_run_that_fell_back_says_so_in_report_and_summary(tmp_path: Path) -> None:
    fell_back = write_fake_run(tmp_path / "p", method="prefixrl", num_steps=10)
    served = write_fake_run(tmp_path / "r", method="rl", num_steps=10)
    _write_engine(fell_back, "train", "transformers 5.1", "no interpreter\nend of the log")
    _write_engine(served, "train", "sglang 0.5.17", None)

    methods = json.loads(write_summary([fell_back, served], tmp_path / "s.json").read_text())
    page = build_report([fell_back, served], tmp_path / "report.html").read_text()

    assert methods["methods"]["prefixrl"]["fallbacks"] == {"train": "no interpreter"}
    assert methods["methods"]["rl"]["engines"] == {"train": "sglang 0.5.17"}
    assert methods["methods"]["rl"]["fallbacks"] == {}
    assert page.count("transformers 5.1 took the place of SGLang: no interpreter") >= 1
    assert "sglang 0.5.17" in page
    assert fallback_lines([fell_back, served]) == [
        "SGLang was not used in prefixrl train: no interpreter"
    ]


def _has_color(picture: np.ndarray, color: str, *, columns: slice) -> bool:
    """Answer whether a line of this colour crosses some columns of a picture."""
    wanted = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    near = np.abs(picture[:, columns, :3] - wanted).max(axis=2) < 0.02  # exact but for antialiasing
    return int(near.sum()) > 200


def test_picture_draws_every_method_in_all_three_panels(tmp_path: Path) -> None:
    runs = [
        write_fake_run(tmp_path / m, method=m, num_steps=60)
        for m in ("prefixrl", "rl", "sft_then_rl")
    ]
    picture = matplotlib.image.imread(plot_headline(runs, tmp_path / "docs" / "headline.png"))
    height, width, _ = picture.shape
    assert (width, height) == (2160, 688)
    third = width // 3
    for panel in range(3):
        for color in LIGHT_COLORS[:3]:
            columns = slice(panel * third, (panel + 1) * third)
            assert _has_color(picture, color, columns=columns), (panel, color)
    assert not _has_color(picture, LIGHT_COLORS[3], columns=slice(0, width))


def test_picture_of_a_run_without_evaluations_is_drawn(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=0)
    assert plot_headline([run], tmp_path / "headline.png").stat().st_size > 5_000


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_methods_keep_their_colour_and_seeds_differ_in_dash(tmp_path: Path, num_seeds: int) -> None:
    runs = [
        read_run(write_fake_run(tmp_path / f"{method}{seed}", method=method, num_steps=0))
        for method in ("rl", "prefixrl")
        for seed in range(num_seeds)
    ]
    styles = run_styles(runs)
    assert [style.slot for style in styles] == [1] * num_seeds + [0] * num_seeds
    assert len({style.dash for style in styles[:num_seeds]}) == num_seeds


def test_a_run_with_a_bad_interpreter_falls_back_and_its_summary_says_so(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=10)
    config = RolloutConfig(sglang=SGLangConfig(python=Path("nowhere/bin/python")))
    engine = build_engine(
        config,
        write_tiny_qwen3(tmp_path / "model"),
        logits_dtype="float32",
        logs_folder=run / "logs" / "train",
        device="cpu",
    )

    summary = json.loads(write_summary([run], tmp_path / "summary.json").read_text())

    values = summary["methods"]["prefixrl"]
    assert values["engines"] == {"train": engine.name}
    assert engine.name.startswith("transformers ")
    assert "nowhere/bin/python does not exist" in values["fallbacks"]["train"]
    (line,) = fallback_lines([run])
    assert line.startswith("SGLang was not used in prefixrl train: ")
