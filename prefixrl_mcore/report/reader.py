"""A run folder as frozen records: what is there is read, what is missing is said.

A report is often asked for while a run is still going, or after a kill. So an absent file is an
ordinary case (an empty field), and a damaged one is skipped and named in ``RunRecord.notices``;
only a folder that holds no run at all is an error.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.continuation import flatten
from prefixrl_mcore.observability.run_folder import ENGINE_FILE, RunFolder
from prefixrl_mcore.report.collection import CollectionRecord, read_collection

_SET_ACCURACY = re.compile(r"eval/([^/]+)/accuracy")
TRAIN_SET = "train"
"""Name of the training problems among the evaluated sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricLine:
    """One line of ``metrics.jsonl``."""

    step: int
    """Optimizer step; see ``observability.metrics`` for what it counts in each kind."""

    time: float
    """Unix seconds at which the line was written; NaN when the line does not say."""

    values: Mapping[str, float]
    """``area/quantity_unit`` to value; quantities written as null are absent."""

    def get(self, key: str) -> float | None:
        """Return one value, or None where the line has none."""
        return self.values.get(key)


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """Accuracy at a prefix fraction (unlock curve) or in a bin of them."""

    low: float
    """Lower edge of the bin; the fraction itself on an unlock curve."""

    high: float
    """Upper edge of the bin; the fraction itself on an unlock curve."""

    accuracy: float | None
    """Share of correct rollouts; None when there were none."""

    ci_low: float | None
    """Lower end of the confidence interval, if given."""

    ci_high: float | None
    """Upper end of the confidence interval, if given."""

    num_rollouts: int | None
    """Rollouts behind the point, if given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetRecord:
    """Evaluation of one problem set without prefixes."""

    num_problems: int | None
    """Problems in the set."""

    num_samples: int | None
    """Samples per problem."""

    accuracy: float | None
    """Mean over problems."""

    accuracy_stderr: float | None
    """Standard error over problems."""

    pass_at_k: Mapping[int, tuple[float | None, float | None, float | None]]
    """k to (value, low, high)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRecord:
    """One file of ``eval/``: a checkpoint measured by ``prefixrl eval``."""

    step: int
    """Optimizer steps applied to the checkpoint."""

    temperature: float | None
    """Sampling temperature."""

    sets: Mapping[str, SetRecord]
    """Problem sets by name; ``train`` is the training problems."""

    bins: tuple[CurvePoint, ...]
    """Accuracy by prefix bin."""

    unlock: tuple[CurvePoint, ...]
    """The unlock curve, by rising fraction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """Everything of one run folder that the report shows, rollouts excepted."""

    folder: Path
    """The run folder."""

    label: str
    """Unique among the runs of a report: the method, with the folder's name where two share it."""

    method: str
    """``method`` of the config; the folder's name when there is no config."""

    config: Mapping[str, Any]
    """The resolved config with dotted keys; empty when there is none."""

    environment: Mapping[str, Any]
    """Git commit, versions and machine with dotted keys; empty when unknown."""

    progress: Mapping[str, Any]
    """Last state of the run's progress file; empty when there is none."""

    stage_seconds: Mapping[str, float]
    """Wall time by stage; empty when unknown."""

    engines: Mapping[str, str]
    """Name of the rollout engine by stage (``train``, ``collect``, ``eval-...``); empty when
    unknown."""

    fallbacks: Mapping[str, str]
    """Stage to the reason why SGLang was to be used, and was not; empty where that did not
    happen."""

    train: tuple[MetricLine, ...]
    """Training lines by rising step, one per step."""

    evals: tuple[MetricLine, ...]
    """Evaluations inside training by rising step, one per step."""

    sft: tuple[MetricLine, ...]
    """Lines of the supervised warm-up by rising step, which counts epochs here."""

    evaluations: tuple[EvaluationRecord, ...]
    """Files of ``eval/`` by rising step."""

    collection: CollectionRecord | None
    """Rejection sampling, if the run's trace store can be read."""

    held_out: tuple[str, ...]
    """Names of the held-out sets that were evaluated, in the order of the config."""

    notices: tuple[str, ...]
    """What could not be read, or looks unusual; shown with the run."""

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a training quantity is known, and its values."""
        return _series(self.train, key)

    def charged(self, part: str) -> float:
        """Return the FLOPs charged so far to ``total``, ``collect``, ``sft``, ..."""
        known = [
            line.values[f"flops/{part}"]
            for line in (*self.train, *self.evals, *self.sft)
            if f"flops/{part}" in line.values
        ]
        return max(known, default=0.0)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Return the runs in the given order, with labels that tell them apart.

    Raises:
        ConfigError: if no folder is given, one is given twice, or one holds no run.
    """
    if not folders:
        raise ConfigError("report: expected at least one run folder, got none; name one or more")
    repeated = [str(f) for f, n in Counter(f.resolve() for f in folders).items() if n > 1]
    if repeated:
        raise ConfigError(f"report: run folder given twice: {', '.join(repeated)}; name it once")
    runs = [read_run(folder) for folder in folders]
    methods = Counter(run.method for run in runs)
    named = [
        run if methods[run.method] == 1 else replace(run, label=f"{run.method} ({run.folder.name})")
        for run in runs
    ]
    labels = Counter(run.label for run in named)
    return [
        run if labels[run.label] == 1 else replace(run, label=f"{run.method} ({run.folder})")
        for run in named
    ]


def read_run(folder: Path) -> RunRecord:
    """Return everything that is known about one run.

    Raises:
        ConfigError: if the folder does not exist or has neither a config nor metrics.
    """
    paths = RunFolder(folder)
    if not paths.config_file.exists() and not paths.metrics_file.exists():
        raise ConfigError(
            f"{folder}: not a run folder (neither config.json nor metrics.jsonl); check the path"
        )
    notices: list[str] = []
    config = flatten(_read_object(paths.config_file, notices))
    lines = _read_metrics(paths.metrics_file, notices)
    method = str(config.get("method") or folder.resolve().name)
    engines, fallbacks = _read_engines(paths.logs, notices)
    return RunRecord(
        folder=folder,
        label=method,
        method=method,
        config=config,
        environment=flatten(_read_object(paths.environment_file, notices)),
        progress=_read_object(paths.progress_file, notices),
        stage_seconds=_numbers(_read_object(paths.stages_file, notices)),
        engines=engines,
        fallbacks=fallbacks,
        train=lines["train"],
        evals=lines["eval"],
        sft=lines["sft"],
        evaluations=_read_evaluations(paths.eval, notices),
        collection=_read_collection(folder, config, notices),
        held_out=_held_out_names(config, lines["eval"]),
        notices=tuple(notices),
    )


def _read_collection(
    folder: Path, config: Mapping[str, Any], notices: list[str]
) -> CollectionRecord | None:
    """Return what the run's traces cost; None for plain RL, which is charged for none."""
    if config.get("method") == "rl":
        return None
    return read_collection(_traces_folder(folder, config), notices)


def _traces_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Return where the run's traces are, as ``RunConfig.traces_folder`` says."""
    configured = config.get("data.traces")
    return Path(configured) if configured else folder / "traces"


def _held_out_names(config: Mapping[str, Any], evals: Sequence[MetricLine]) -> tuple[str, ...]:
    """Return the evaluated sets other than the training problems, configured ones first."""
    start = "data.held_out."
    configured = [key.removeprefix(start) for key in config if key.startswith(start)]
    keys = {key: None for line in evals for key in line.values}
    matches = [match[1] for key in keys if (match := _SET_ACCURACY.fullmatch(key))]
    found = [name for name in matches if name not in (TRAIN_SET, "bins")]
    return tuple(dict.fromkeys([name for name in configured if name in found] + found))


def _read_engines(logs: Path, notices: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the engine by stage, and the reason of those that fell back, with a notice each."""
    engines, fallbacks = {}, {}
    for path in sorted(logs.glob(f"*/{ENGINE_FILE}")):
        stage, record = path.parent.name, _read_object(path, notices)
        engines[stage] = str(record.get("engine", "unknown"))
        if record.get("fallback_reason"):
            reason = str(record["fallback_reason"]).splitlines()[0]
            fallbacks[stage] = reason
            notices.append(f"{stage}: {engines[stage]} took the place of SGLang: {reason}")
    return engines, fallbacks


def _read_object(path: Path, notices: list[str]) -> dict[str, Any]:
    """Return a JSON object; empty, with a notice, when the file is damaged."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notices.append(f"{path.name} could not be read: {error}")
        return {}
    if isinstance(value, dict):
        return value
    notices.append(f"{path.name} should hold a JSON object, got {type(value).__name__}")
    return {}


def _number(value: object) -> float | None:
    """Return a finite number as float; None for null, NaN, infinity and everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the entries that are finite numbers."""
    pairs = ((key, _number(value)) for key, value in values.items())
    return {key: number for key, number in pairs if number is not None}


def _read_metrics(path: Path, notices: list[str]) -> dict[str, tuple[MetricLine, ...]]:
    """Return the lines by kind and rising step; the last line of a repeated step counts."""
    kinds: dict[str, dict[int, MetricLine]] = {"train": {}, "eval": {}, "sft": {}}
    num_unreadable = num_repeated = num_unknown = 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for row in text.splitlines():
        try:
            fields = json.loads(row)
            step, kind = int(fields["step"]), fields["kind"]
        except (ValueError, KeyError, TypeError):
            num_unreadable += 1
            continue
        if kind == "outside":  # times besides the steps, which no figure shows
            continue
        if kind not in kinds:
            num_unknown += 1
            continue
        num_repeated += step in kinds[kind]
        time = _number(fields.get("time"))
        values = _numbers({key: value for key, value in fields.items() if "/" in key})
        kinds[kind][step] = MetricLine(
            step=step, time=math.nan if time is None else time, values=values
        )
    for count, what in (
        (num_unreadable, "unreadable line(s) left out (a line may be half-written)"),
        (num_unknown, "line(s) of an unknown kind left out"),
        (num_repeated, "repeated step(s); the last line of each step is shown"),
    ):
        if count:
            notices.append(f"{path.name}: {count} {what}")
    return {kind: tuple(lines[step] for step in sorted(lines)) for kind, lines in kinds.items()}


def _read_evaluations(folder: Path, notices: list[str]) -> tuple[EvaluationRecord, ...]:
    """Return the files of ``eval/`` by rising step."""
    evaluations = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        fields = _read_object(path, notices)
        if not fields:
            continue
        if fields.get("is_complete") is False:
            notices.append(f"eval/{path.name}: this evaluation is not finished")
            continue
        try:
            evaluations.append(_evaluation(fields))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            notices.append(f"eval/{path.name} is not an evaluation: {type(error).__name__} {error}")
    return tuple(sorted(evaluations, key=lambda evaluation: evaluation.step))


def _evaluation(fields: Mapping[str, Any]) -> EvaluationRecord:
    """Return one evaluation file as a record."""
    unlock = [
        _point(point, point["fraction"], point["fraction"]) for point in fields.get("unlock") or ()
    ]
    return EvaluationRecord(
        step=int(fields["step"]),
        temperature=_number(fields.get("temperature")),
        sets={name: _set_record(one) for name, one in (fields.get("sets") or {}).items()},
        bins=tuple(_point(one, one["low"], one["high"]) for one in fields.get("bins") or ()),
        unlock=tuple(sorted(unlock, key=lambda point: point.low)),
    )


def _point(fields: Mapping[str, Any], low: float, high: float) -> CurvePoint:
    """Return one point of an unlock curve or one bin."""
    num_rollouts = _number(fields.get("num_rollouts"))
    return CurvePoint(
        low=float(low),
        high=float(high),
        accuracy=_number(fields.get("accuracy")),
        ci_low=_number(fields.get("ci_low")),
        ci_high=_number(fields.get("ci_high")),
        num_rollouts=None if num_rollouts is None else int(num_rollouts),
    )


def _set_record(fields: Mapping[str, Any]) -> SetRecord:
    """Return the evaluation of one problem set."""
    num_problems = _number(fields.get("num_problems"))
    num_samples = _number(fields.get("num_samples"))
    return SetRecord(
        num_problems=None if num_problems is None else int(num_problems),
        num_samples=None if num_samples is None else int(num_samples),
        accuracy=_number(fields.get("accuracy")),
        accuracy_stderr=_number(fields.get("accuracy_stderr")),
        pass_at_k={
            int(k): (_number(e.get("value")), _number(e.get("low")), _number(e.get("high")))
            for k, e in (fields.get("pass_at_k") or {}).items()
        },
    )


def _series(lines: Sequence[MetricLine], key: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of the lines that have ``key``."""
    having = [line for line in lines if key in line.values]
    return [line.step for line in having], [line.values[key] for line in having]
