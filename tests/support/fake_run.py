"""Run folders with made-up numbers, in the formats that a real run writes.

Nothing here is a measurement: the curves are logistic functions with noise, shaped like the
micro experiment's. The model path and data names say "fake test data", and so does each report.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefixrl_mcore.config.run import Method, RunConfig
from prefixrl_mcore.data.trace_schema import AttemptRecord
from prefixrl_mcore.data.traces import TraceStore

NUM_PARAMETERS = 331_776
COLLECT_FLOPS = 5.2e11
SFT_FLOPS = 2.6e10
SFT_EPOCHS = 8
TOKENS_PER_STEP = 6_000
BINS = ((0.0, 0.0), (0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
START_TIME = 1_760_000_000.0

_MIDPOINTS = {"prefixrl": 38.0, "sft_then_rl": 95.0, "rl": 110.0}
_CEILINGS = {"prefixrl": 0.58, "sft_then_rl": 0.36, "rl": 0.34}


def write_fake_run(
    folder: Path,
    *,
    method: Method = "prefixrl",
    num_steps: int = 90,
    eval_every: int = 10,
    rollouts_every: int = 15,
    seed: int = 0,
    group_size: int = 8,
    completion_text: str | None = None,
    stage_seconds: bool = True,
) -> Path:
    """Write a run folder of ``num_steps`` made-up optimizer steps and return it.

    Args:
        folder: written to; made when missing.
        method: shapes the curves.
        num_steps: optimizer steps; 0 leaves only config and environment.
        eval_every: steps between evaluations; 0 makes none.
        rollouts_every: steps between rollout tables; 0 writes none.
        seed: of the noise.
        group_size: rollouts per group in the tables.
        completion_text: replaces each completion's text, to test what model text can do.
        stage_seconds: write ``stages.json``.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", json.loads(_config(folder, method).model_dump_json()))
    _write_json(folder / "environment.json", _environment())
    if num_steps == 0:
        return folder
    lines = _metric_lines(method, num_steps, eval_every, rng)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    _write_json(folder / "progress.json", _progress(num_steps))
    if stage_seconds:
        _write_json(folder / "stages.json", {"collect": 57.2, "train": 0.9 * num_steps})
    if method != "rl":
        _write_trace_store(folder / "traces", rng)
    if eval_every:
        for step in sorted({0, num_steps}):
            _write_json(folder / "eval" / f"step-{step:06d}.json", _eval_file(method, step, rng))
    if rollouts_every:
        for step in range(0, num_steps, rollouts_every):
            rows = _rollout_rows(method, step, rng, group_size, completion_text)
            path = folder / "rollouts" / f"step-{step:06d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
    return folder


def accuracy(method: str, step: float, *, fraction: float = 0.0) -> float:
    """Return the made-up true accuracy of a policy version at a prefix fraction."""
    own = _CEILINGS[method] / (1.0 + math.exp(-(step - _MIDPOINTS[method]) / 11.0))
    return min(0.97, own + (1.0 - own) * 0.9 * fraction**3)


def _config(folder: Path, method: Method) -> RunConfig:
    """Return a config as a micro run has it."""
    return RunConfig.model_validate(
        {
            "run_folder": folder,
            "method": method,
            "model": {"path": "models/fake-test-data-332k"},
            "data": {
                "problems": "data/fake-test-data.jsonl",
                "held_out": {"heldout": "data/fake-test-data-heldout.jsonl"},
                "prompt": {"style": "text", "template": "{problem} :"},
            },
            "rollout": {
                "engine": "transformers",
                "max_completion_tokens": 44,
                "max_total_tokens": 96,
            },
            "policy": {"dtype": "float32", "optimizer": {"lr": 5e-4}},
            "loss": {"entropy_coefficient": 0.03 if method == "prefixrl" else 0.02},
            "batch": {"prompts_per_step": 16, "group_size": 8},
            "trainer": {"num_steps": 90 if method == "prefixrl" else 120},
        }
    )


def _environment() -> dict[str, Any]:
    """Return what a run saves about the machine and the source tree."""
    return {
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_is_dirty": False,
        "python": "3.12.11",
        "platform": "Linux-fake-test-data",
        "packages": {"prefixrl-mcore": "0.1.0", "torch": "2.11.0", "megatron-core": "0.19.2"},
    }


def _progress(num_steps: int) -> dict[str, Any]:
    """Return the state of a finished stage."""
    return {
        "stage": "train",
        "completed": num_steps,
        "total": num_steps,
        "eta_seconds": 0.0,
        "elapsed_seconds": 0.9 * num_steps,
        "values": {"reward": 0.4},
        "waiting_for": "done",
        "time": START_TIME + 0.9 * num_steps,
    }


def _metric_lines(
    method: Method, num_steps: int, eval_every: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl`` in the order of a real run."""
    lines = [_sft_line(i, rng) for i in range(SFT_EPOCHS)] if method == "sft_then_rl" else []
    for step in range(num_steps + 1):
        if eval_every and (step % eval_every == 0 or step == num_steps):
            lines.append(_eval_line(method, step, rng))
        if step < num_steps:
            lines.append(_train_line(method, step, rng))
    return lines


def _flops(method: str, step: int) -> dict[str, float]:
    """Return the charges after ``step`` optimizer steps; prefixed prompts are longer."""
    tokens = TOKENS_PER_STEP * (1.25 if method == "prefixrl" else 1.0) * step
    parts = {
        "flops/collect": 0.0 if method == "rl" else COLLECT_FLOPS,
        "flops/sft": SFT_FLOPS if method == "sft_then_rl" else 0.0,
        "flops/sampling": 2 * NUM_PARAMETERS * tokens,
        "flops/update": 6 * NUM_PARAMETERS * tokens,
    }
    return parts | {"flops/total": sum(parts.values())}


def _sft_line(step: int, rng: random.Random) -> dict[str, Any]:
    """Return one epoch of the supervised warm-up."""
    return {
        "step": step,
        "kind": "sft",
        "time": START_TIME - 20 + step,
        "loss/validation_nats": 0.55 * math.exp(-step / 3) + 0.39 + rng.gauss(0, 0.01),
        "flops/sft": SFT_FLOPS * (step + 1) / SFT_EPOCHS,
    }


def _train_line(method: str, step: int, rng: random.Random) -> dict[str, Any]:
    """Return the metrics of one optimizer step."""
    plain = accuracy(method, step)
    hinted = accuracy(method, step, fraction=0.62) if method == "prefixrl" else None
    noisy = [max(0.0, rng.gauss(p, 0.03)) for p in (plain, hinted or 0.0)]
    no_prefix, prefixed = noisy
    mean = no_prefix if hinted is None else 0.25 * no_prefix + 0.75 * prefixed
    line: dict[str, Any] = {"step": step, "kind": "train", "time": START_TIME + 0.9 * step}
    line |= {
        "rollout/reward_mean": mean,
        "rollout/reward_no_prefix_mean": no_prefix,
        "rollout/all_negative_fraction": (1 - mean) ** 6,
        "rollout/all_negative_no_prefix_fraction": (1 - no_prefix) ** 6,
        "rollout/all_positive_fraction": mean**8,
        "rollout/completion_tokens_mean": (22 if hinted else 32) + rng.gauss(0, 0.4),
        "rollout/stopped_fraction": 0.99,
        "rollout/tokens_per_second": 9_000 + rng.gauss(0, 500),
        "rollout/cached_context_fraction": 0.8,
        "loss/policy_gradient": rng.gauss(0, 0.01),
        "loss/entropy_nats": 0.42 * math.exp(-step / 70) + 0.08 + rng.gauss(0, 0.005),
        "loss/logprob_gap_mean_nats": 2e-6 * (1 + rng.random()),
        "loss/logprob_gap_max_nats": 4e-5 * (1 + rng.random()),
        "loss/k1_nats": rng.gauss(0, 1e-6),
        "loss/k3_nats": 1e-11 * (1 + rng.random()),
        "policy/gradient_norm": None if step == 7 else 0.1 + 0.5 * mean * (1 + rng.random()),
        "policy/learning_rate": 5e-4,
        "policy/version": step + 1,
        "tokens/charged": TOKENS_PER_STEP * (step + 1),
        "tokens/computed": 0.6 * TOKENS_PER_STEP * (step + 1),
        "time/step_seconds": 0.9 + 0.1 * rng.random(),
        "time/sync_seconds": 0.06,
        "time/rollout_seconds": 0.35 + 0.05 * rng.random(),
        "time/verify_seconds": 0.08,
        "time/pack_seconds": 0.01,
        "time/forward_backward_seconds": 0.24,
        "time/optimizer_seconds": 0.05,
        "time/save_seconds": 0.4 if step % 25 == 24 else 0.0,
    }
    if hinted is not None:
        line["rollout/reward_prefix_mean"] = prefixed
        line["rollout/all_negative_prefix_fraction"] = (1 - prefixed) ** 6
    return line | _flops(method, step + 1)


def _eval_line(method: str, step: int, rng: random.Random) -> dict[str, Any]:
    """Return one evaluation inside training."""
    plain = accuracy(method, step)
    line: dict[str, Any] = {"step": step, "kind": "eval", "time": START_TIME + 0.9 * step}
    line |= {
        "flops/total": _flops(method, step)["flops/total"],
        "eval/train/accuracy": max(0.0, rng.gauss(plain, 0.015)),
        "eval/train/accuracy_stderr": 0.022,
        "eval/train/all_negative_fraction": (1 - plain) ** 4,
        "eval/heldout/accuracy": max(0.0, rng.gauss(0.66 * plain + 0.008, 0.012)),
        "eval/heldout/accuracy_stderr": 0.016,
    }
    for low, high in BINS:
        middle = (low + high) / 2
        value = accuracy(method, step, fraction=middle)
        line[f"eval/bins/{low:.2f}-{high:.2f}/accuracy"] = min(
            1.0, max(0.0, rng.gauss(value, 0.02))
        )
    return line


def _write_trace_store(folder: Path, rng: random.Random) -> None:
    """Write what 64 problems cost; four of them were given up."""
    store = TraceStore.create(
        folder, tokenizer_hash="fake", chat_template_hash="fake", model="fake-test-data"
    )
    tries = [2500 if i % 16 == 15 else 1 + int(rng.expovariate(1 / 200)) for i in range(64)]
    store.append(
        [],
        [
            AttemptRecord(
                problem_id=f"fake-{i:03d}",
                num_tries=count,
                num_tokens=52 * count,
                flops=COLLECT_FLOPS * count / sum(tries),
                seconds=57.2 / 64,
                is_solved=count < 2500,
            )
            for i, count in enumerate(tries)
        ],
    )


def _interval(value: float, width: float = 0.05) -> dict[str, float]:
    """Return a value with an interval around it."""
    return {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width)}


def _eval_file(method: str, step: int, rng: random.Random) -> dict[str, Any]:
    """Return what ``prefixrl eval`` writes for one checkpoint."""
    sets = {}
    for name, scale in (("train", 1.0), ("heldout", 0.66)):
        value = scale * accuracy(method, step) + 0.004
        sets[name] = {
            "num_problems": 64,
            "num_samples": 64,
            "accuracy": value,
            "accuracy_stderr": 0.02,
            "pass_at_k": {
                str(k): _interval(1 - (1 - value) ** (k**0.8)) for k in (1, 8, 16, 32, 64)
            },
        }
    bins = [
        {
            "low": low,
            "high": high,
            "accuracy": (value := accuracy(method, step, fraction=(low + high) / 2)),
            "ci_low": max(0.0, value - 0.04),
            "ci_high": min(1.0, value + 0.04),
            "num_rollouts": 256,
        }
        for low, high in BINS
    ]
    unlock = [
        {
            "fraction": f / 10,
            "accuracy": (
                value := max(0.0, accuracy(method, step, fraction=f / 10) + rng.gauss(0, 0.01))
            ),
            "ci_low": max(0.0, value - 0.04),
            "ci_high": min(1.0, value + 0.04),
            "num_rollouts": 512,
        }
        for f in range(10)
    ]
    checkpoint = f"checkpoints/step-{step:06d}"
    return {
        "step": step,
        "checkpoint": checkpoint,
        "temperature": 0.7,
        "sets": sets,
        "bins": bins,
        "unlock": unlock,
    }


def _solution(digits: list[int], rng: random.Random) -> list[str]:
    """Return the tokens of one made-up solution, one step per pair of digits."""
    tokens = []
    for part, op in enumerate("abcdef"):
        x0, x1 = digits[2 * part : 2 * part + 2]
        tokens += [op, str(x0), str(x1), "METHOD_1", str((x0 + 3) % 10), str((x1 + 7) % 10)]
        tokens.append(f"\\boxed{{{rng.randrange(3)}}}")
    return tokens


def _rollout_rows(
    method: str, step: int, rng: random.Random, group_size: int, completion_text: str | None
) -> list[dict[str, Any]]:
    """Return the rows of one rollout table: eight groups of which half have a prefix."""
    rows = []
    for group in range(8):
        digits = [rng.randrange(10) for _ in range(12)]
        solution = _solution(digits, rng)
        fraction = rng.uniform(0.4, 0.8) if method == "prefixrl" and group % 4 else 0.0
        cut = int(fraction * len(solution))
        share = accuracy(method, step, fraction=fraction)
        solved = [rng.random() < share for _ in range(group_size)]
        baseline = sum(solved) / group_size
        answer = ",".join(t[7:-1] for t in solution if t.startswith("\\boxed"))
        problem_id = f"fake-{group:03d}"
        for index in range(group_size):
            completion = solution[cut:] if solved[index] else [*solution[cut:-1], "\\boxed{0}"]
            has_stopped = rng.random() < 0.97
            rows.append(
                {
                    "step": step,
                    "group_index": group,
                    "rollout_index": index,
                    "problem_id": problem_id,
                    "prefixed_problem_id": f"{problem_id}#t0@{cut}" if cut else problem_id,
                    "trace_id": "t0" if cut else "",
                    "fraction": cut / len(solution),
                    "answer": answer,
                    "prompt_text": " ".join(["<bos>", *map(str, digits), ":"]),
                    "prefix_text": " ".join(solution[:cut]),
                    "completion_text": completion_text or " ".join(completion),
                    "prompt_token_ids": list(range(14)),
                    "prefix_token_ids": list(range(cut)),
                    "completion_token_ids": list(range(len(completion) + has_stopped)),
                    "rollout_logprobs": [
                        -rng.expovariate(3.0) for _ in range(len(completion) + has_stopped)
                    ],
                    "reward": float(solved[index]),
                    "advantage": solved[index] - baseline,
                    "reason": "correct" if solved[index] else "wrong",
                    "extracted": answer if solved[index] else answer[:-1] + "0",
                    "finish_reason": "stop" if has_stopped else "length",
                    "policy_version": step,
                    "version_spans": [
                        {"policy_version": step, "num_tokens": len(completion) + has_stopped}
                    ],
                    "is_dropped": False,
                }
            )
    return rows


def _write_json(path: Path, value: object) -> None:
    """Write indented JSON, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
