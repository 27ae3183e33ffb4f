"""What is wrong with the GPUs of a node: asked of the driver, then tried with torch."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_ERRORS, _MIG = "ecc.errors.uncorrected.volatile.total", "mig.mode.current"
_FIELDS = ("index", "uuid", "name", "driver_version", "memory.used", _ERRORS, _MIG)
"""All known to the drivers since 450; one that is not known would fail the whole query."""

_REMAPPED = {
    "remapped_rows.pending": "rows of its memory are replaced only after a reset",
    "remapped_rows.failure": "rows of its memory are broken and cannot be replaced",
}
"""A query of its own, of GPUs that can do so; what Xid 63 and 64 leave behind."""

_NOT_TOLD = frozenset({"[N/A]", "[Not Supported]", "[Insufficient Permissions]"})
"""What nvidia-smi writes for what a GPU does not have or a user may not see; every other value in
brackets is a fault: ``[Unknown Error]``, ``[GPU is lost]``, ``[GPU requires reset]``."""

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
    """Return facts and faults of this job's GPUs on this node.

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
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    said, fault = _output(command, _DRIVER_SECONDS, _first_lines)
    if fault:
        return {}, [f"nvidia-smi {fault}; {_REMEDY}"]
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines() if line]
    if any(len(row) != len(_FIELDS) for row in rows):
        return {}, [f"nvidia-smi answers what it was not asked: {said.strip()[:200]!r}; {_REMEDY}"]
    gpus = _of_this_job([dict(zip(_FIELDS, row, strict=True)) for row in rows])
    faults = []
    if len(gpus) < num_expected:
        faults.append(f"{len(gpus)} GPUs, {num_expected} were asked for")
    remapped = _ask_remapped()
    for gpu in gpus:
        faults += _faults_of_gpu(gpu, num_expected, max_memory_used_gib)
        faults += [f"GPU {gpu['index']}: {what}; {_REMEDY}" for what in remapped[gpu["uuid"]]]
    facts = {
        "gpus": sorted({gpu["name"] for gpu in gpus}),
        "driver": sorted({gpu["driver_version"] for gpu in gpus}),
    }
    return facts, faults


def _ask_remapped() -> defaultdict[str, list[str]]:
    """Return, by the uuid of a GPU, what is wrong with rows of its memory.

    Nothing where the driver does not know the query, as with GPUs before Ampere.
    """
    query = f"--query-remapped-rows=gpu_uuid,{','.join(_REMAPPED)}"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    said, _ = _output(command, _DRIVER_SECONDS, _first_lines)
    faults: defaultdict[str, list[str]] = defaultdict(list)
    for line in said.splitlines():
        uuid, *values = (cell.strip() for cell in line.split(","))
        for value, what in zip(values, _REMAPPED.values(), strict=False):
            if value == "Yes" or (value.isdecimal() and int(value)):
                faults[uuid].append(what)
    return faults


def _of_this_job(gpus: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the GPUs that Slurm gave to the job.

    nvidia-smi does not heed CUDA_VISIBLE_DEVICES: where Slurm does not hide the others' devices, it
    shows them too, with the memory that their jobs rightly use.
    """
    visible = {entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")}
    # What names none of them is an instance of MIG, or another way to count.
    return [gpu for gpu in gpus if visible & {gpu["index"], gpu["uuid"]}] or gpus


def _faults_of_gpu(
    gpu: Mapping[str, str], num_expected: int, max_memory_used_gib: float
) -> list[str]:
    """Return what is wrong with one GPU; what a model of GPU does not count is not wrong."""
    name = f"GPU {gpu['index']}"
    broken = [
        f"{field} ({said})"
        for field, said in gpu.items()
        if said not in _NOT_TOLD and (said.startswith("[") or "ERR!" in said)
    ]
    if broken:
        return [f"{name}: the driver cannot read {', '.join(broken)}; {_REMEDY}"]
    faults = []
    errors = gpu[_ERRORS]
    if errors.isdecimal() and int(errors):
        faults.append(f"{name}: {errors} uncorrected memory errors since the driver was loaded")
    is_split = gpu[_MIG] == "Enabled"
    if is_split and num_expected > 1:
        faults.append(
            f"{name} is split into instances (MIG), of which a process sees one: the trainer takes "
            "whole GPUs"
        )
    used = gpu["memory.used"]  # of all instances, if it is split
    if not is_split and used.isdecimal() and int(used) > max_memory_used_gib * 1024:
        faults.append(
            f"{name}: {int(used) / 1024:.1f} GiB are in use, at most {max_memory_used_gib:g} may "
            "be: a process of another job is left"
        )
    return faults


def _try_torch(
    num_expected: int, seconds: float, probe: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return what torch finds when it computes on each GPU, in a process that may hang or die."""
    said, fault = _output(list(probe), seconds, _last_line)
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


def _output(
    command: list[str], seconds: float, cause: Callable[[list[str]], str]
) -> tuple[str, str]:
    """Return what a command says, and what went wrong, one of them empty."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"does not end within {seconds:g} s"
    except OSError as error:
        return "", f"cannot be run: {error.strerror}"
    if done.returncode or not done.stdout.strip():
        lines = (done.stdout + done.stderr).strip().splitlines() or ["nothing was said"]
        return "", f"fails with exit code {done.returncode}: {cause(lines)[:300]}"
    return done.stdout, ""


def _first_lines(lines: list[str]) -> str:
    """Return what nvidia-smi says, without the GPUs that it could read."""
    return " ".join(line for line in lines if line.count(",") != len(_FIELDS) - 1)


def _last_line(lines: list[str]) -> str:
    """Return the line of a traceback that says why."""
    return lines[-1]
