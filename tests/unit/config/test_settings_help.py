"""Every setting is told with its default: by ``--help-settings`` and in docs/settings.md."""

import re
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.config.continuation import default_settings
from prefixrl_mcore.config.run import RunConfig
from tests.support.settings_page import page

PAGE = Path(__file__).parents[3] / "docs" / "settings.md"
MINIMAL = 'run_folder = "r"\n[model]\npath = "m"\n[data]\nproblems = "p"\n'


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make it anew: its head says how"


def test_the_page_tells_default_values_bounds_and_resuming() -> None:
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page(), re.MULTILINE | re.DOTALL))
    reward = sections["reward"]
    assert "| `timeout_seconds` | `10.0` | number > 0 |  | Wall time per answer;" in reward
    assert "| `num_workers` | `2` | integer >= 1 | free |" in reward
    assert '| `answer_form` | `"final"` | `"final"`, `"sequence"` |  | `final`: the' in reward
    assert "| `problems` | **required** | path |  | JSONL of" in sections["data"]
    assert "| `min_fraction` | `0.4` | number > 0 and < 1 |" in sections["prefixes"]


def test_no_setting_is_left_out() -> None:
    sections = re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page(), re.MULTILINE | re.DOTALL)
    told = {
        name if section == "The run" else f"{section}.{name}"
        for section, text in sections
        for name in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    }
    # Left out by default, so that their tables have no defaults; an empty table has no entries.
    optional = {"checkpoint.keep_best", "metrics.wandb"}
    assert set(default_settings(RunConfig)) - optional <= told
    assert {"run_folder", "model.path", "data.held_out", "metrics.wandb.project"} <= told
    assert all(len(re.findall(rf"^## {name}$", page(), re.MULTILINE)) == 1 for name in optional)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("command", ["check", "train"])
def test_without_a_config_the_program_s_defaults_are_shown(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = told(capsys, command, "--help-settings")
    assert text.startswith(f"usage: prefixrl {command} CONFIG [-h]")
    assert "--data.problems PATH JSONL of training problems. (required)" in text
    assert re.search(r"--policy\.optimizer\.lr FLOAT [^-]*\(default: 1e-06\)", text)


@pytest.mark.parametrize("is_first", [True, False])
def test_with_a_config_its_values_are_shown(
    is_first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.toml"
    config.write_text(MINIMAL + "[policy.optimizer]\nlr = 0.0004\n")
    arguments = [str(config), "--help-settings"]
    text = told(capsys, "train", *(arguments if is_first else reversed(arguments)))
    assert "--data.problems PATH JSONL of training problems. (default: p)" in text
    assert re.search(r"--policy\.optimizer\.lr FLOAT [^-]*\(default: 0\.0004\)", text)


def test_a_config_that_is_wrong_has_no_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path / "none.toml"), "--help-settings"])
    assert ended.value.code == 2
    assert "none.toml: does not exist" in capsys.readouterr().err


def test_a_wrong_flag_names_the_command_whose_help_lists_the_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.toml"
    config.write_text(MINIMAL)
    with pytest.raises(SystemExit):
        main(["check", str(config), "--polcy.x", "3"])
    text = " ".join(re.sub(r"[│╭╰─╮╯]", " ", capsys.readouterr().err).split())
    assert "--polcy.x" in text
    assert "run prefixrl check" in text
