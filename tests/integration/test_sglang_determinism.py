"""A deterministic server makes a training repeatable, token for token; and its key stays unseen."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import SampleRequest, SamplingParams
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_models import write_tiny_qwen3
from tests.support.tiny_run import TinyTask, metrics_of, without_clock

pytestmark = pytest.mark.slow

KEY = "a-key-that-no-file-may-hold-48c1"


def rollouts_of(run: Path) -> list[object]:
    """Every rollout that the run wrote, with its tokens, logprobs and reward."""
    files = sorted((run / "rollouts").glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def test_training_twice_gives_the_same_tokens_and_shows_its_key_to_nobody(
    tiny_task: TinyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXRL_SGLANG_API_KEY", KEY)
    flags = (
        *("--rollout.engine", "sglang", "--rollout.sglang.deterministic"),
        *("--rollout.sglang.python", str(sglang_python()), "--trainer.num-steps", "3"),
    )
    runs = [tmp_path / "first", tmp_path / "second"]
    for run in runs:
        assert tiny_task.run("train", run, *flags) == 0

    first, second = (rollouts_of(run) for run in runs)
    assert len(first) == 3 * 4 * 4
    assert first == second
    for kind in ("train", "eval"):
        lines = [without_clock(metrics_of(run, kind)) for run in runs]
        assert lines[0] == lines[1]
    assert sum(line["policy/was_skipped"] for line in metrics_of(runs[0], "train")) < 3
    assert "POST /generate" in (runs[0] / "logs" / "train" / "sglang-0-1.log").read_text()
    written = [path for run in runs for path in run.rglob("*") if path.is_file()]
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []


def test_seed_decides_a_completion_whatever_else_is_asked_for(tmp_path: Path) -> None:
    model = write_tiny_qwen3(tmp_path / "model")
    engine = SGLangEngine(
        model,
        SGLangConfig(python=sglang_python("sglang-next"), deterministic=True),
        logits_dtype="float32",
        max_total_tokens=100,
        logs_folder=tmp_path / "logs",
    )
    requests = [request_of(name, seed) for name, seed in [("a", 1), ("b", 1), ("c", 2)]]
    params = SamplingParams(
        temperature=1.0, max_completion_tokens=16, max_total_tokens=60, stop_token_ids=()
    )
    try:
        first, again_other_name, other_seed = engine.sample(requests, params)
        (alone,) = engine.sample(requests[:1], params)
    finally:
        engine.close()

    assert engine.is_seeded
    assert first == again_other_name == alone  # logprobs too
    assert len({one.token_ids for one in [*first, *other_seed]}) == 8  # none repeats another


def request_of(name: str, seed: int) -> SampleRequest:
    return SampleRequest(
        request_id=name, context_token_ids=(5, 9, 14, 30), num_samples=4, seed=seed
    )
