"""The benchmark of servers beside a policy, at its tiny size on this machine."""

import json
from pathlib import Path

import pytest
import torch
from bench import rollout as bench_rollout

from tests.support.sglang_environments import sglang_python

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


def test_without_a_gpu_the_full_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_rollout.main([]) == 1
    assert "--tiny runs a tiny model" in capsys.readouterr().err


@pytest.mark.slow
def test_every_measurement_that_a_cpu_can_make_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_rollout, "TRANSPORTS", ("disk",))  # each starts a server
    entries: list[dict[str, object]] = []
    run = bench_rollout._run
    monkeypatch.setattr(
        bench_rollout, "_run", lambda *arguments: entries.append(run(*arguments)) or entries[-1]
    )

    arguments = ["--tiny", "--sglang-python", str(sglang_python()), "--output", str(tmp_path)]
    assert bench_rollout.main(arguments) == 0

    results = {entry["measurement"]: entry["result"] for entry in entries}
    sync, sampling = results["sync by disk"], results["sampling, float32 head"]
    assert isinstance(sync, dict)
    assert isinstance(sampling, dict)
    # float32: 96 x 32 embedding, two layers of 12384, the last norm; see test_bench_policy.
    assert sync["bytes"] == 4 * (96 * 32 + 2 * 12384 + 32)
    assert sync["gigabytes_per_second"] == pytest.approx(sync["bytes"] / 1e9 / sync["seconds"])
    assert sampling["gap_max_nats"] < 2e-5
    assert sampling["tokens_per_second"] > 0
    json.dumps(entries)  # what a GPU's record is written from
    assert list(tmp_path.iterdir()) == []
    assert "nothing written" in capsys.readouterr().err
