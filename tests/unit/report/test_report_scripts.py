"""The page's JavaScript: axes and numbers by hand-worked values, and drawing without a browser."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models

from prefixrl_mcore.report.html import build_report
from tests.support.fake_run import write_fake_run
from tests.support.scripts import draw, evaluate

BASE = ("base.js",)


def test_linear_ticks_are_round_and_inside() -> None:
    assert evaluate("linearTicks(0, 1, 5)", assets=BASE) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert evaluate("linearTicks(0.13, 0.61, 5)", assets=BASE) == [0.2, 0.3, 0.4, 0.5, 0.6]
    assert evaluate("linearTicks(3, 3, 5)", assets=BASE) == [3]


def test_log_ticks_are_powers_of_ten_or_finer_when_the_range_is_small() -> None:
    assert evaluate("logTicks(1e-6, 1e-3, 5)", assets=BASE) == [1e-6, 1e-5, 1e-4, 1e-3]
    assert evaluate("logTicks(1.5, 6, 5)", assets=BASE) == [2, 5]


def test_numbers_have_three_digits() -> None:
    written = evaluate(
        "[0, 0.12345, 12.345, 12345.6, 2.3456e12, 4e-4, null, NaN].map(formatNumber)", assets=BASE
    )
    assert written == ["0", "0.123", "12.3", "12,346", "2.35×10¹²", "4×10⁻⁴", "–", "–"]  # noqa: RUF001


def test_flops_axis_shares_one_power_of_ten() -> None:
    axis = "(() => { const a = makeAxis([0, 2.4e12], {min: 0, shared: true}); "
    axis += "return [a.unit, a.ticks.map(a.write), a.place(1.2e12)]; })()"
    unit, ticks, middle = evaluate(axis, assets=BASE)
    assert unit == " (×10¹²)"  # noqa: RUF001
    assert ticks == ["0", "0.5", "1", "1.5", "2"]
    assert middle == 0.5


def test_axis_of_nothing_and_of_one_value_are_drawable() -> None:
    places = "[makeAxis([], {}), makeAxis([5], {}), makeAxis([0], {min: 0}), "
    places += "makeAxis([-1, 0], {log: true})].map((a) => [a.place(a.low), a.place(a.high)])"
    assert evaluate(places, assets=BASE) == [[0, 1]] * 4


def test_smoothing_is_a_mean_from_the_first_value_on_and_keeps_gaps() -> None:
    # Weight 1/2: second value (0.5*0.5*1 + 0.5*3) / 0.75 = 7/3.
    smoothed = evaluate("smooth([1, null, 3], 0.5)", assets=BASE)
    assert smoothed[0] == 1
    assert smoothed[1] is None
    assert abs(smoothed[2] - 7 / 3) < 1e-12


def test_buckets_average_neighbouring_steps() -> None:
    bars = evaluate("bucket([0, 1, 2, 3, 4], {a: [1, 3, 5, null, 7]}, 3)", assets=BASE)
    assert [(bar["first"], bar["last"], bar["values"]["a"]) for bar in bars] == [
        (0, 1, 2),
        (2, 3, 5),
        (4, 4, 7),
    ]


def test_tries_fall_into_bins_that_double() -> None:
    bins = evaluate("doublingBins([1, 2, 3, 4, 5, 8], [9])", assets=(*BASE, "panels.js"))
    assert bins["names"] == ["1", "2", "3–4", "5–8", "9–16"]  # noqa: RUF001
    assert bins["solved"] == [1, 1, 2, 2, 0]
    assert bins["unsolved"] == [0, 0, 0, 0, 1]


def test_page_draws_every_chart_and_every_handler_runs(tmp_path: Path) -> None:
    runs = [
        write_fake_run(tmp_path / method, method=method, num_steps=20)
        for method in ("prefixrl", "rl", "sft_then_rl")
    ]
    drawn = draw(build_report(runs, tmp_path / "report.html"))
    assert drawn["broken"] == []
    assert drawn["fired"] > 100
    charts = [label for label in drawn["labels"] if "Line chart" in label]
    for title in (
        "Accuracy without a prefix, training problems",
        "Accuracy without a prefix, held-out problems",
        "Unlock curve",
        "pass@k without a prefix, held-out problems",
        "Reward",
        "All-negative groups",
        "Gradient norm",
        "Entropy",
        "Completion length",
        "Logprob gap, engine against policy",
        "Throughput",
        "SFT warm-up",
    ):
        assert any(label.startswith(title) for label in charts), title
    assert sum("Heat map" in label for label in drawn["labels"]) == 3
    assert sum("Histogram of tries" in label for label in drawn["labels"]) == 2
    assert sum("wall time per phase" in label for label in drawn["labels"]) == 3
    assert "PrefixRL: collection" in drawn["texts"]
    assert "SFT + RL: collection + SFT" in drawn["texts"]


def test_page_of_a_run_without_anything_draws_and_says_what_is_missing(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=0)
    drawn = draw(build_report([run], tmp_path / "report.html"))
    assert drawn["broken"] == []
    texts = drawn["texts"]
    assert "No evaluation of this set has been recorded yet." in texts
    assert "No rollouts have been written yet." in texts
    assert "No unlock curve has been measured yet: run prefixrl eval." in texts
    assert "No times have been recorded for this run." in texts
    assert any("memorising cannot be told from learning" in text for text in texts)


def test_reader_shows_one_group_in_full_with_model_text_as_text(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=20, completion_text="<b>bold</b> & done")
    drawn = draw(build_report([run], tmp_path / "report.html"))
    assert drawn["texts"].count("<b>bold</b> & done") == 8
    assert "b" in drawn["counts"]  # badges and titles, none of them made from model text
    assert "bold" not in drawn["texts"]
    assert any(text.startswith("advantage ") for text in drawn["texts"])
    assert any(text.startswith("ended by: ") for text in drawn["texts"])


def test_the_reader_tells_older_versions_and_what_was_not_trained_on(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=1)
    table = run / "rollouts" / "step-000000.parquet"
    rows = [row for row in pq.read_table(table).to_pylist() if row["group_index"] == 0]
    spans = [{"policy_version": version, "num_tokens": 1} for version in (2, 3)]
    rows = [row | {"version_spans": spans, "is_dropped": True} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), table)
    texts = draw(build_report([run], tmp_path / "report.html"))["texts"]
    assert any("policy versions 2 to 3, not trained on" in text for text in texts)
    assert any(text.endswith(" · not trained on") for text in texts)


def test_with_a_tokenizer_each_token_of_a_completion_stands_alone(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=1)
    table = run / "rollouts" / "step-000000.parquet"
    rows = pq.read_table(table).to_pylist()[:1]
    rows[0] |= {"completion_text": "alpha beta", "completion_token_ids": [1, 2]}
    rows[0] |= {"rollout_logprobs": [-0.5, -2.0]}
    pq.write_table(pa.Table.from_pylist(rows), table)
    model = tmp_path / "model"
    model.mkdir()
    words = Tokenizer(models.WordLevel({"<eos>": 0, "alpha": 1, "beta": 2}, "<eos>"))
    words.save(str(model / "tokenizer.json"))
    config = json.loads((run / "config.json").read_text())
    config["model"]["path"] = str(model)
    (run / "config.json").write_text(json.dumps(config))
    texts = draw(build_report([run], tmp_path / "report.html"))["texts"]
    assert "alpha" in texts
    assert " beta" in texts
    assert "alpha beta" not in texts
