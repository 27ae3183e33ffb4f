"""``prefixrl checkpoint`` as a user runs it, on folders made without a model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefixrl_mcore.checkpoint.manifest import begin_folder
from prefixrl_mcore.checkpoint.retention import KEEP_ALL
from prefixrl_mcore.checkpoint.run_checkpoints import (
    TrainerState,
    publish,
    step_folder,
    write_trainer_state,
)
from prefixrl_mcore.cli import main


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with checkpoints of steps 10 and 20."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "run" / "checkpoints"
    for step in (10, 20):
        final = step_folder(folder, step)
        temporary = begin_folder(final)
        state = TrainerState(
            step=step,
            policy_version=step - 1,
            has_optimizer=True,
            world_size=4,
            extra_state={"cursor": 7},
            layout={"tp": 2, "pp": 2, "dp": 1},
            metrics={"eval/train/accuracy": 0.25},
        )
        write_trainer_state(temporary, state)
        (temporary / "weights").write_bytes(bytes(2_500_000))
        publish(temporary, final, KEEP_ALL)
    return tmp_path / "run"


def lines_of(output: str, name: str) -> str:
    return next(line for line in output.splitlines() if name in line)


def test_ls_tells_step_version_size_layout_and_completeness(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "checkpoints" / "step-000010" / "weights").write_bytes(b"12")
    begin_folder(step_folder(run_folder / "checkpoints", 30))
    assert main(["checkpoint", "ls", str(run_folder)]) == 0
    output = capsys.readouterr().out
    good = lines_of(output, "step-000020")
    for part in ("(latest)", "20", "19", "2.5 MB", "tp2 pp2 dp1", "yes"):
        assert part in good
    bad = lines_of(output, "step-000010")
    assert "no: weights: got 2 bytes, expected 2500000" in bad
    assert "latest" not in bad
    assert "1 folders of a running or dead save" in output


def test_ls_says_why_a_folder_without_a_manifest_does_not_count(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "checkpoints" / "step-000020" / "manifest.json").unlink()
    assert main(["checkpoint", "ls", str(run_folder / "checkpoints")]) == 0
    output = capsys.readouterr().out
    assert "no: manifest.json: is missing" in lines_of(output, "step-000020")
    assert "(latest)" in lines_of(output, "step-000010")


def test_checkpoints_stand_by_step_however_many_digits_it_has(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder / "checkpoints"
    for step in (999_999, 1_000_000):
        shutil.copytree(folder / "step-000020", step_folder(folder, step))
    assert main(["checkpoint", "ls", str(run_folder)]) == 0
    found = re.findall(r"step-\d+", capsys.readouterr().out)
    assert found == ["step-000010", "step-000020", "step-999999", "step-1000000"]


def test_show_takes_the_latest_and_prints_its_state(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "show", str(run_folder)]) == 0
    output = capsys.readouterr().out
    assert "step-000020" in output
    assert "tp2 pp2 dp1, 4 ranks" in output
    assert '"eval/train/accuracy": 0.25' in output
    assert '"cursor": 7' in output
    one = run_folder / "checkpoints" / "step-000010"
    assert main(["checkpoint", "show", str(one)]) == 0
    assert "step-000010" in capsys.readouterr().out


def test_verify_finds_a_flipped_byte_and_says_so_by_its_exit_code(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "verify", str(run_folder)]) == 0
    assert capsys.readouterr().out.count("right ") == 2
    weights = run_folder / "checkpoints" / "step-000010" / "weights"
    content = bytearray(weights.read_bytes())
    content[1_234_567] ^= 1
    weights.write_bytes(content)
    assert main(["checkpoint", "ls", str(run_folder)]) == 0
    assert "no:" not in capsys.readouterr().out  # sizes alone do not tell
    assert main(["checkpoint", "verify", str(run_folder)]) == 1
    output = capsys.readouterr().out.replace("\n", "")
    assert "content is damaged" in output
    assert output.count("right ") == 1
    assert main(["checkpoint", "verify", str(run_folder / "checkpoints" / "step-000020")]) == 0


def test_a_folder_without_checkpoints_is_bad_input(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("ls", "show", "verify"):
        assert main(["checkpoint", action, str(tmp_path / "nowhere")]) == 2
        assert "no such folder" in capsys.readouterr().err
    shutil.rmtree(run_folder / "checkpoints" / "step-000010")
    shutil.rmtree(run_folder / "checkpoints" / "step-000020")
    assert main(["checkpoint", "ls", str(run_folder)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_checkpoint_saved_before_layouts_were_recorded_is_still_listed(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder / "checkpoints" / "step-000020" / "trainer.json"
    value = json.loads(path.read_text())
    del value["layout"], value["metrics"]
    path.write_text(json.dumps(value))
    assert main(["checkpoint", "show", str(path.parent)]) == 0
    assert "?, 4 ranks" in capsys.readouterr().out


def test_listing_needs_no_torch(run_folder: Path) -> None:
    code = (
        "import sys; from prefixrl_mcore.cli import main; "
        f"code = main(['checkpoint', 'verify', {str(run_folder)!r}]); "
        "sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
