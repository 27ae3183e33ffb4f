"""``prefixrl doctor``: each finding says what is there or what to do, and --fix runs the script."""

import shutil
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from prefixrl_mcore.cli import main
from prefixrl_mcore.launch import doctor
from prefixrl_mcore.launch.doctor import Finding, examine, find_uv, make_sglang_environment
from prefixrl_mcore.rollout.sglang.environment import installed_version, setup_command
from prefixrl_mcore.rollout.sglang.protocol import OLDEST_VERSION, is_supported
from tests.support.sglang_environments import sglang_python

GIB = 1024**3


def interpreter(folder: Path, script: str) -> Path:
    """An executable that stands for an environment's interpreter."""
    path = folder / "env" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def finding_of(subject: str, python: Path, folder: Path) -> Finding:
    (found,) = (one for one in examine(python, folder) if one.subject == subject)
    return found


@pytest.fixture
def without_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the imports in a child process, which take seconds."""
    monkeypatch.setattr(doctor, "_PROBE", "print('[]')")


@pytest.mark.usefixtures("without_probe")
def test_supported_sglang_is_found_with_its_version(tmp_path: Path) -> None:
    python = interpreter(tmp_path, f"echo {OLDEST_VERSION}")

    found = finding_of("SGLang", python, tmp_path)

    assert found.is_ok
    assert found.detail.startswith(f"{OLDEST_VERSION}, {python}")


@pytest.mark.usefixtures("without_probe")
@pytest.mark.parametrize("script", ["exit 1", "echo 0.5.3", "echo 0.9.0"])
def test_missing_or_unsupported_sglang_has_a_remedy(script: str, tmp_path: Path) -> None:
    found = finding_of("SGLang", interpreter(tmp_path, script), tmp_path)

    assert not found.is_ok
    assert found.remedy.startswith("prefixrl doctor --fix")


@pytest.mark.usefixtures("without_probe")
def test_exit_code_and_table_name_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--sglang-python", str(tmp_path / "none/bin/python")]) == 1

    out = capsys.readouterr().out
    assert "missing SGLang" in out.replace("  ", " ")
    assert "-> prefixrl doctor --fix" in out
    assert "megatron-core" in out


@pytest.mark.usefixtures("without_probe")
def test_the_table_shows_square_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Finding(subject="part", is_ok=True, detail="absent", remedy="pip install '.[te]'")
    monkeypatch.setattr(doctor, "_transformer_engine", lambda: found)
    main(["doctor", "--sglang-python", str(tmp_path / "none/bin/python")])

    assert "-> pip install '.[te]'" in capsys.readouterr().out


def test_too_little_space_is_told_with_the_amount(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(64 * GIB, 63 * GIB, GIB // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage)

    found = doctor._free("shared memory", Path("/dev/shm"), GIB)

    assert not found.is_ok
    assert found.remedy == "free 0.5 GiB, or start the container with a larger --shm-size"


def test_broken_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import sys; sys.exit('no such symbol')")

    found = doctor._imports()

    assert (found.is_ok, found.detail) == (False, "imports fail: no such symbol")


def test_without_transformer_engine_all_is_there_and_it_is_told_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(_name: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", version)
    found = doctor._transformer_engine()

    assert found.is_ok
    assert found.remedy.startswith("on GPUs: make setup-te, or pip install '.[te]'")
    monkeypatch.setattr(metadata, "version", lambda _name: "2.20.2")
    assert doctor._transformer_engine() == Finding(
        subject="transformer-engine", is_ok=True, detail="2.20.2"
    )


@pytest.mark.slow
def test_imports_of_this_environment_work() -> None:
    assert doctor._imports().is_ok


@pytest.mark.usefixtures("without_probe")
def test_fix_runs_the_packaged_script_with_uv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        '#!/bin/bash\necho "$@" >> "$(dirname "$0")/calls"\n'
        'folder="${@: -1}"\n'
        'if [[ $1 == venv ]]; then mkdir -p "$folder/bin";'
        ' ln -s /bin/true "$folder/bin/python"; fi\n'
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}:/usr/bin:/bin")
    python = tmp_path / "made" / "bin" / "python"

    main(["doctor", "--fix", "--sglang-python", str(python)])

    venv, sync = (uv.parent / "calls").read_text().splitlines()
    assert venv == f"venv --quiet --python {sys.executable} {tmp_path / 'made'}"
    assert sync.startswith("pip sync --quiet --require-hashes --no-build --python")
    lock = Path(sync.split()[-1])
    assert lock.name in ("requirements-cpu.lock", "requirements-gpu.lock")
    assert lock.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("without_probe")
def test_fix_of_what_is_there_changes_nothing() -> None:
    python = sglang_python()
    before = installed_version(python, "sglang")

    assert make_sglang_environment(python) == 0

    assert installed_version(python, "sglang") == before


def test_fix_that_fails_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_uv", lambda: Path("/bin/false"))

    assert main(["doctor", "--fix", "--sglang-python", str(tmp_path / "x/bin/python")]) == 1


def test_fix_makes_only_what_the_path_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--fix", "--sglang-python", "/usr/python3"]) == 2
    assert "FOLDER/bin/python" in capsys.readouterr().err


def test_missing_uv_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match="pip install uv"):
        find_uv()


def test_script_of_the_environment_is_part_of_the_package(tmp_path: Path) -> None:
    command = setup_command(Path("uv"), Path("python"), tmp_path)

    script = Path(command[1])
    assert command[0] == "bash"
    assert script.is_relative_to(Path(doctor.__file__).parents[1])
    assert script.exists()


def test_supported_versions_are_a_closed_range() -> None:
    assert [
        v for v in ("0.5.16", "0.5.17", "0.5.20.post1", "0.5.23", "0.5.24") if is_supported(v)
    ] == [
        "0.5.17",
        "0.5.20.post1",
        "0.5.23",
    ]
