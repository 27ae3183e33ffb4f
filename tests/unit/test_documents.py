"""What the Markdown files show is there: links, anchors, commands, options, configs."""

import contextlib
import io
import re
import subprocess
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.config.base import Config
from prefixrl_mcore.config.load import load_config
from prefixrl_mcore.config.run import RunConfig
from tests.support.released_configs import RELEASED, write_shape

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def _documents() -> list[Path]:
    """Return the Markdown files that git has, or those of a folder that git does not read.

    It does not read another user's, as of a mount in a container, and no unpacked archive.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        found: list[Path] = []
        for folder, folders, files in ROOT.walk():  # without environments, caches and runs
            folders[:] = [one for one in folders if not one.startswith(".") and one != "runs"]
            found += [folder / file for file in files if file.endswith(".md")]
        return sorted(found)
    return [ROOT / name for name in listed.stdout.splitlines()]


def _anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a text."""
    found: list[str] = []
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        earlier = sum(anchor == re.sub(r"-\d+$", "", other) for other in found)
        found.append(f"{anchor}-{earlier}" if earlier else anchor)
    return set(found)


def broken_links(document: Path) -> Iterator[str]:
    """Yield the targets of a document that lead nowhere."""
    text = document.read_text(encoding="utf-8")
    for target in _LINK.findall(_CODE.sub("", _FENCE.sub("", text))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        is_anchored = anchor and file.suffix == ".md"
        if not file.exists() or (is_anchored and anchor not in _anchors(file.read_text("utf-8"))):
            yield target


@pytest.mark.parametrize("document", _documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert list(broken_links(document)) == []


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `b`: *c*?\n\n## Twice\n\n## Twice\n")
    document = tmp_path / "document.md"
    document.write_text(
        "[a](there.md) [b](there.md#a-b-c) [c](there.md#twice-1) [d](https://example.org)\n"
        "[e](gone.md) [f](there.md#twice-2) [g](#nowhere) ![h](gone.png) `[i](code.md)`\n"
        "```\n[j](fenced.md)\n```\n"
    )
    assert list(broken_links(document)) == ["gone.md", "there.md#twice-2", "#nowhere", "gone.png"]


@pytest.mark.parametrize("is_readable", [True, False])
def test_documents_are_found_whether_git_reads_the_folder_or_not(
    monkeypatch: pytest.MonkeyPatch, *, is_readable: bool
) -> None:
    if not is_readable:
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = _documents()
    assert {ROOT / "README.md", ROOT / "docs" / "recipes.md"} <= set(found)
    assert not any(path.relative_to(ROOT).parts[0].startswith(".") for path in found)


_COMMAND = re.compile(r"(?:^ {4}|`)prefixrl ([a-z][^`#\n]*)", re.MULTILINE)
_GROUPS = {"jobs", "traces", "convert", "checkpoint"}


def _commands(document: Path) -> list[list[str]]:
    """Return the words of each command line in a document, without the program."""
    return [words.split() for words in _COMMAND.findall(document.read_text(encoding="utf-8"))]


@cache
def _options(*command: str) -> frozenset[str]:
    """Return the options in the help of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0, command
    return frozenset(re.findall(r"--[a-z][a-z-]*", out.getvalue()))


def _is_setting(dotted: str) -> bool:
    """Return whether a flag or key names a setting of a run."""
    node: object = RunConfig
    for name in dotted.replace("-", "_").split("."):
        if not (isinstance(node, type) and issubclass(node, Config)):
            return False
        if name not in node.model_fields:
            return False
        node = node.model_fields[name].annotation
    return True


def unknown_words(words: list[str]) -> Iterator[str]:
    """Yield the options and settings of a command line that there are not."""
    has_action = words[0] in _GROUPS and re.match(r"[a-z]", "".join(words[1:2]))
    command = words[: 2 if has_action else 1]
    options = _options(*command)
    for word in words[len(command) :]:
        flag = re.match(r"\[?(--[a-z][\w.-]*)", word)
        key = re.match(r"([a-z_]+(?:\.[a-z_]+)*)=", word)
        if flag and flag[1] not in options and not _is_setting(flag[1][2:]):
            yield word
        if key and not _is_setting(key[1]):
            yield word


@pytest.mark.parametrize("document", _documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_docs_are_those_of_the_program(document: Path) -> None:
    found = [(words, list(unknown_words(words))) for words in _commands(document)]
    assert [entry for entry in found if entry[1]] == []


def test_commands_are_found_and_unknown_words_too() -> None:
    assert ["launch", "my.toml", "--site", "my-site.toml", "--dry-run"] in _commands(
        ROOT / "slurm" / "README.md"
    )
    launch = ["launch", "my.toml", "--sites", "x", "--dry-run", "trainer.num_step=3", "seed=1"]
    assert list(unknown_words(launch)) == ["--sites", "trainer.num_step=3"]
    train = ["train", "my.toml", "--policy.optimizer.lr", "1", "--polcy.x", "2"]
    assert list(unknown_words(train)) == ["--polcy.x"]
    assert list(unknown_words(["jobs", "list", "--folder", "x"])) == ["--folder"]


_CONFIG = re.compile(r"^ {4}(?:#.*\n {4})?run_folder = .*\n(?: {4}.*\n)+", re.MULTILINE)


def _shown_config(name: str, folder: Path) -> Path:
    """Write the one run config that a document shows into a file."""
    (block,) = _CONFIG.findall((ROOT / name).read_text(encoding="utf-8"))
    file = folder / "my.toml"
    file.write_text(textwrap.dedent(block), encoding="utf-8")
    return file


def test_the_config_in_the_readme_leaves_the_rest_at_its_defaults(tmp_path: Path) -> None:
    config = load_config(RunConfig, _shown_config("README.md", tmp_path), [])
    assert config.model.path.name in RELEASED
    assert list(config.data.held_out) == ["aime25"]
    named = {"run_folder": config.run_folder, "model": config.model, "data": config.data}
    assert config == RunConfig(**named)


def test_the_config_of_the_first_run_fits_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _shown_config("docs/first_run.md", tmp_path)
    model = write_shape("Qwen3-4B-Instruct-2507", tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    assert main(["check", str(file), "--model.path", str(model)]) == 0
    said = capsys.readouterr().out
    assert "TP 4 x PP 1 x CP 1 x DP 2" in said
    assert re.search(r"4 server\(s\) on GPUs of the trainer: .* of 72.00, .* fits$", said, re.M)
    assert "does not fit" not in said
