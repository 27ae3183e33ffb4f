"""What is wrong with the GPUs of a node: asked of the driver, then tried with torch."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_FIELDS = (
    *("index", "name", "driver_version", "memory.used", "ecc.errors.uncorrected.volatile.total"),
)
_DRIVER_SECONDS = 60.0
_PROBE = "prefixrl_mcore.policy.device_probe"
_REMEDY = "the node needs its administrator"


def check_gpus(
    num_expected: int,
    *,
    max_memory_used_gib: float,
    probe_seconds: float,
    probe: Sequence[str] = (sys.executable, "-m", _PROBE),
) -> tuple[dict[str, Any], list[str]]:
    """Return facts and faults of this node's GPUs.

    Args:
        num_expected: GPUs that the job asked for here; 0 checks nothing.
        max_memory_used_gib: GiB in use on a GPU before the job; more is somebody else's process.
        probe_seconds: how long torch may take to compute on all GPUs.
        probe: command that does so, and prints one JSON object.
    """
    if num_expected == 0:
        return {}, []
    facts, faults = _ask_driver(num_expected, max_memory_used_gib)
    more_facts, more_faults = _try_torch(num_expected, probe_seconds, probe)
    return {**facts, **more_facts}, [*faults, *more_faults]


def _ask_driver(num_expected: int, max_memory_used_gib: float) -> tuple[dict[str, Any], list[str]]:
    """Return what nvidia-smi says."""
    query = f"--query-gpu={','.join(_FIELDS)}"
    command = ["nvidia-smi", *_own_gpus(), query, "--format=csv,noheader,nounits"]
    said, fault = _output(command, _DRIVER_SECONDS)
    if fault:
        return {}, [f"nvidia-smi {fault}; {_REMEDY}"]
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line]
    if any(len(row) != len(_FIELDS) for row in rows):
        return {}, [f"nvidia-smi answers what it was not asked: {said.strip()[:200]!r}; {_REMEDY}"]
    faults = []
    if len(rows) < num_expected:
        faults.append(f"{len(rows)} GPUs, {num_expected} were asked for")
    for row in rows:
        faults += _faults_of_gpu(dict(zip(_FIELDS, row, strict=True)), max_memory_used_gib)
    facts = {
        "gpus": sorted({row[1] for row in rows}),
        "driver": sorted({row[2] for row in rows}),
    }
    return facts, faults


def _own_gpus() -> list[str]:
    """Return how nvidia-smi is told which GPUs are the job's; it sees those of others, too.

    Slurm numbers GPUs as the driver does. Parts of GPUs, which have no number, are not told apart.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [f"--id={visible}"] if visible and "MIG-" not in visible else []


def _faults_of_gpu(gpu: Mapping[str, str], max_memory_used_gib: float) -> list[str]:
    """Return what is wrong with one GPU; what a model of GPU does not count is not wrong."""
    name = f"GPU {gpu['index']}"
    broken = [
        field for field, said in gpu.items() if "error" in said.lower() or "ERR!" in said.upper()
    ]
    if broken:
        return [f"{name}: the driver cannot read {', '.join(broken)}; {_REMEDY}"]
    faults = []
    errors = gpu["ecc.errors.uncorrected.volatile.total"]
    if errors.isdecimal() and int(errors):
        faults.append(f"{name}: {errors} uncorrected memory errors since the driver was loaded")
    used = gpu["memory.used"]
    if used.isdecimal() and int(used) > max_memory_used_gib * 1024:
        faults.append(
            f"{name}: {int(used) / 1024:.1f} GiB are in use, at most {max_memory_used_gib:g} may "
            "be: a process of another job is left"
        )
    return faults


def _try_torch(
    num_expected: int, seconds: float, probe: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return what torch finds when it computes on each GPU, in a process that may hang or die."""
    said, fault = _output(list(probe), seconds)
    if fault:
        return {}, [f"computing on the GPUs with torch {fault}"]
    answer = said.strip().splitlines()[-1]
    try:
        found = json.loads(answer)
        facts = {name: found[name] for name in ("torch", "cuda", "nccl")}
        faults = [f"GPU {index}: {what}" for index, what in found["faults"].items()]
        if found["num_gpus"] < num_expected:
            faults.append(f"torch sees {found['num_gpus']} GPUs, {num_expected} were asked for")
    except (ValueError, KeyError, TypeError):
        return {}, [
            f"computing on the GPUs with torch answers what was not asked: {answer[:200]!r}"
        ]
    return facts, faults


def _output(command: list[str], seconds: float) -> tuple[str, str]:
    """Return what a command says, and what went wrong, one of them empty."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"does not end within {seconds:g} s"
    except OSError as error:
        return "", f"cannot be run: {error.strerror}"
    if done.returncode or not done.stdout.strip():
        lines = (done.stdout + done.stderr).strip().splitlines() or ["nothing was said"]
        return "", f"fails with exit code {done.returncode}: {lines[-1][:300]}"
    return done.stdout, ""
