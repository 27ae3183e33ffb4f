"""One reader says what is wrong with a JSON file, for everybody who reads one."""

from pathlib import Path

import pytest

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.json_files import read_json_object


def test_an_object_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"name": "\u00e9", "list": [1]}', encoding="utf-8")
    assert read_json_object(path, remedy="?") == {"name": "\u00e9", "list": [1]}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        pytest.param(b"{", "not valid JSON", id="cut short"),
        pytest.param(b"\xff", "not valid JSON", id="no text"),
        pytest.param(b"[1]", "got list, expected a JSON object", id="a list"),
        pytest.param(None, "does not exist", id="missing"),
    ],
)
def test_the_fault_the_path_and_the_remedy_are_named(
    tmp_path: Path, content: bytes | None, fault: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_json_object(path, remedy="restore it")
    assert str(error.value).startswith(f"{path}: {fault}")
    assert str(error.value).endswith("; restore it")


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); restore it"):
        read_json_object(tmp_path, remedy="restore it")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ConfigError, match="does not exist"):
        read_json_object(tmp_path / "file" / "a.json", remedy="restore it")
