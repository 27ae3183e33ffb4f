"""Which rollouts a page carries: whole groups, evenly over steps, within the caps."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prefixrl_mcore.report.rollouts import MAX_TEXT, choose_rollouts
from tests.support.fake_run import write_fake_run


def test_a_small_run_is_shown_completely(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=40, rollouts_every=10)
    choice = choose_rollouts(folder, tokenizer_folder=None)
    assert (choice.num_shown, choice.num_total) == (4 * 8 * 8, 4 * 8 * 8)
    assert (choice.num_tables_shown, choice.num_tables) == (4, 4)
    order = [(group["step"], group["group"]) for group in choice.groups]
    assert order == [(step, group) for step in (0, 10, 20, 30) for group in range(8)]


def test_the_cap_keeps_groups_whole_and_steps_spread(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=90, rollouts_every=10)
    choice = choose_rollouts(folder, tokenizer_folder=None, max_rollouts=9 * 8 + 5)
    assert (choice.num_shown, choice.num_total) == (72, 9 * 64)
    assert {group["step"] for group in choice.groups} == set(range(0, 90, 10))
    assert all(len(group["rollouts"]) == 8 for group in choice.groups)


def test_few_groups_come_from_both_ends_of_the_run(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=90, rollouts_every=10)
    choice = choose_rollouts(folder, tokenizer_folder=None, max_rollouts=3 * 8)
    assert [group["step"] for group in choice.groups] == [0, 40, 80]


def test_the_byte_cap_counts_and_at_least_one_group_is_shown(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=20, rollouts_every=10)
    assert choose_rollouts(folder, tokenizer_folder=None, max_bytes=10).num_shown == 8


def test_at_most_sixteen_tables_are_read(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=40, rollouts_every=1, group_size=2)
    choice = choose_rollouts(folder, tokenizer_folder=None)
    steps = sorted({group["step"] for group in choice.groups})
    assert (choice.num_tables, choice.num_tables_shown, len(steps)) == (40, 16, 16)
    assert (steps[0], steps[-1]) == (0, 39)


def test_long_texts_are_shortened_and_counted(tmp_path: Path) -> None:
    text = "a" * MAX_TEXT + "b" * 1000 + "c" * MAX_TEXT
    folder = write_fake_run(tmp_path / "run", num_steps=1, completion_text=text)
    choice = choose_rollouts(folder, tokenizer_folder=None)
    assert choice.num_shortened == 64
    rollout = choice.groups[0]["rollouts"][0]
    shown = rollout["text"]
    assert shown.startswith("aaa")
    assert shown.endswith("ccc")
    assert "[... 21,000 characters not shown ...]" in shown
    assert "logprobs" not in rollout  # they would not line up with what is left


def test_logprobs_are_hundredths_of_a_nat(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=1)
    path = folder / "rollouts" / "step-000000.parquet"
    rows = pq.read_table(path).to_pylist()[:1]
    rows[0]["rollout_logprobs"] = [-0.123, float("nan"), -12.0]
    pq.write_table(pa.Table.from_pylist(rows), path)
    rollout = choose_rollouts(folder, tokenizer_folder=None).groups[0]["rollouts"][0]
    assert rollout["logprobs"] == [-12, None, -1200]


def test_versions_of_all_tokens_and_groups_that_were_not_trained_on_are_told(
    tmp_path: Path,
) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=1)
    path = folder / "rollouts" / "step-000000.parquet"
    older, *rows = [row | {"policy_version": 7} for row in pq.read_table(path).to_pylist()]
    for row in (older, *rows):
        row["version_spans"] = [{"policy_version": 7, "num_tokens": 2}]
        row["is_dropped"] = row["group_index"] == 7
    older["version_spans"].insert(0, {"policy_version": 5, "num_tokens": 3})
    pq.write_table(pa.Table.from_pylist([older, *rows]), path)

    groups = choose_rollouts(folder, tokenizer_folder=None).groups

    assert [group["versions"] for group in groups] == [[5, 7], *[[7, 7]] * 7]
    assert [group["dropped"] for group in groups] == [False] * 7 + [True]


def test_damaged_and_foreign_tables_are_named(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", num_steps=20, rollouts_every=10)
    (folder / "rollouts" / "step-000030.parquet").write_bytes(b"PAR1 half a file")
    pq.write_table(pa.table({"step": [40]}), folder / "rollouts" / "step-000040.parquet")
    choice = choose_rollouts(folder, tokenizer_folder=None)
    assert choice.num_shown == 128
    assert len(choice.notices) == 2
    assert "step-000030.parquet could not be read" in choice.notices[0]
    assert "step-000040.parquet lacks group_index" in choice.notices[1]


def test_a_run_without_rollouts_has_none(tmp_path: Path) -> None:
    choice = choose_rollouts(tmp_path, tokenizer_folder=None)
    assert (choice.num_shown, choice.num_total, choice.groups) == (0, 0, ())
