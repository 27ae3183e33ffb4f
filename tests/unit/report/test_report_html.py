"""The page's tables and texts, its escaping, and that it needs nothing from outside."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.report.html import build_report
from prefixrl_mcore.report.reader import read_run
from prefixrl_mcore.report.sections import run_status
from tests.support.fake_run import write_fake_run

EVIL = "</script><script>alert(1)</script><!-- <b>&amp;\u2028 {{ 7*7 }}"


class _Text(HTMLParser):
    """Collects the visible text and the tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.parts.append(data)


def _parse(page: str) -> _Text:
    """Return the parsed page with white space collapsed."""
    parser = _Text()
    parser.feed(page)
    return parser


def _visible(page: str) -> str:
    """Return the page's text without scripts and styles."""
    return re.sub(r"\s+", " ", " ".join(_parse(page).parts))


def _report(folder: Path, *runs: Path) -> str:
    """Return the page about some runs."""
    return build_report(runs, folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page that compares three runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_fake_run(folder / "prefixrl", method="prefixrl", num_steps=90, seed=1),
        write_fake_run(folder / "rl", method="rl", num_steps=120, seed=2),
        write_fake_run(folder / "sft_then_rl", method="sft_then_rl", num_steps=120, seed=3),
    ]
    return _report(folder, *runs)


def test_page_needs_nothing_from_outside(comparison: str) -> None:
    links = set(re.findall(r"https?://[^\s\"'<)]+", comparison))
    assert links <= {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    assert not re.search(r"<(link|img|iframe|object|embed)\b|@import|url\(|\bsrc=", comparison)
    assert "default-src &#39;none&#39;" in comparison or "default-src 'none'" in comparison


def test_headline_names_all_runs_with_both_accuracies(comparison: str) -> None:
    text = _visible(comparison)
    for part in ("PrefixRL", "SFT + RL", "Training problems", "Held-out problems", "collection"):
        assert part in text
    assert "PrefixRL vs RL vs SFT + RL" in text
    assert "Ratios are relative to PrefixRL" in text


def test_unreached_accuracies_are_said_plainly(comparison: str) -> None:
    text = _visible(comparison)
    assert re.search(r"never reached · more than \d\.\d× within", text)  # noqa: RUF001
    assert "never reached it" in text


def test_differing_settings_are_highlighted(comparison: str) -> None:
    rows = re.findall(r'<tr class="differs">.*?</tr>', comparison, re.S)
    keys = {match[1] for row in rows if (match := re.search(r"<code>(.*?)</code>", row))}
    assert "method" in keys
    assert "loss.entropy_coefficient" in keys
    assert "batch.group_size" not in keys
    assert "Commit, versions, machine" in comparison
    assert "0123456789abcdef0123456789abcdef01234567" in comparison


def _embedded_rollouts(page: str) -> list[Any]:
    """Return the rollouts that a page carries, by run."""
    start = page.index('<script type="application/json" id="rollouts">')
    text = page[page.index(">", start) + 1 : page.index("</script>", start)]
    return json.loads(text)


def test_the_cap_on_rollouts_is_stated(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=30)
    page = build_report([run], tmp_path / "r.html", max_rollouts=16).read_text(encoding="utf-8")
    assert "Showing 16 of 128 written rollouts, from 2 of 2 tables" in _visible(page)
    assert [len(groups) for groups in _embedded_rollouts(page)] == [2]


def test_model_text_cannot_leave_its_place(tmp_path: Path) -> None:
    harmless = _parse(_report(tmp_path, write_fake_run(tmp_path / "a", num_steps=2)))
    run = write_fake_run(tmp_path / "b", num_steps=2, completion_text=EVIL)
    page = _report(tmp_path, run)
    assert "<script>alert" not in page
    assert _parse(page).tags == harmless.tags
    groups = _embedded_rollouts(page)[0]
    assert {rollout["text"] for group in groups for rollout in group["rollouts"]} == {EVIL}


def test_text_of_config_files_is_escaped(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=2)
    config = json.loads((run / "config.json").read_text())
    config["method"] = EVIL
    config["model"]["path"] = EVIL
    config["data"]["held_out"] = {"<script>x": EVIL}
    (run / "config.json").write_text(json.dumps(config))
    lines = (run / "metrics.jsonl").read_text().replace("eval/heldout", "eval/<script>x")
    (run / "metrics.jsonl").write_text(lines)
    page = _report(tmp_path, run)
    assert "<script>alert" not in page
    assert "<script>x" not in page
    assert "{{ 7*7 }}" in _visible(page)
    assert page.count("<script>\n(() =>") == 1


def test_missing_parts_are_said_in_place(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=0)
    text = _visible(_report(tmp_path, run))
    for part in (
        "No evaluation has been recorded yet",
        "Rollout tables appear here once training has written some.",
        "no progress recorded",
        "nothing was collected for this run",
    ):
        assert part in text


def test_a_run_without_held_out_sets_is_marked(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if "heldout" not in k} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert "cannot tell learning from memorising" in _visible(_report(tmp_path, run))


def test_metrics_alone_make_a_report(tmp_path: Path) -> None:
    run = tmp_path / "only-metrics"
    run.mkdir()
    line = {"step": 0, "kind": "eval", "eval/train/accuracy": 0.25, "flops/total": 1e12}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = _visible(_report(tmp_path, run))
    assert "only-metrics run" in text
    assert "0.250" in text
    assert "its settings are unknown" in text


def test_a_charge_without_its_store_is_said(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", num_steps=2)
    (run / "traces").rename(tmp_path / "moved")
    text = _visible(_report(tmp_path, run))
    assert "5.20×10¹¹ FLOPs were charged, but the trace store is not" in text  # noqa: RUF001


def test_no_run_folder_no_report(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(ConfigError, match="not a run folder"):
        build_report([tmp_path / "missing"], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("waiting_for", "age", "kind"),
    [
        ("done", 1e6, "finished"),
        ("failed: <class 'ValueError'>", 1.0, "failed"),
        ("engine", 10.0, "running"),
        ("engine", 10_000.0, "stopped"),
    ],
)
def test_status_tells_running_from_dead(
    tmp_path: Path, waiting_for: str, age: float, kind: str
) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=2)
    now = time.time()
    progress = {"stage": "train", "completed": 2, "total": 90, "time": now - age}
    progress["waiting_for"] = waiting_for
    (folder / "progress.json").write_text(json.dumps(progress))
    status = run_status(read_run(folder), now)
    assert status["kind"] == kind
    assert "train 2/90" in status["text"]
