"""Metrics: one JSON line per step and kind always, W&B and TensorBoard where configured.

``step`` counts the steps of the run, those without signal too. A ``train`` line of step ``s``
describes step ``s``; an ``eval`` or ``outside`` line of step ``s`` the policy after ``s`` steps. A
resumed run drops the lines that lie beyond its checkpoint, so that each step stands once.
"""

import importlib.util
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import MetricsConfig
from prefixrl_mcore.observability.atomic import write_json_atomic, write_text_atomic
from prefixrl_mcore.observability.run_folder import RunFolder

logger = logging.getLogger(__name__)

Kind = Literal["train", "eval", "sft", "outside"]
"""``outside``: times before the first and after the last step of a start."""


def check_packages(config: MetricsConfig) -> None:
    """Refuse to log where the optional package for it is missing, before a run finds out.

    Raises:
        ConfigError: with the remedy.
    """
    for package, setting, is_wanted in (
        ("wandb", "metrics.wandb", config.wandb is not None),
        ("tensorboard", "metrics.tensorboard", config.tensorboard),
    ):
        if is_wanted and not _is_installed(package):
            raise ConfigError(
                f"{setting} is set, and {package} is not installed in {sys.prefix}; pip install "
                f"{package}, or leave {setting} out (metrics.jsonl is written in any case)"
            )


def _is_installed(package: str) -> bool:
    """Return whether a package can be imported; a folder such as W&B's ``wandb/`` is none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


class MetricsWriter:
    """Appends metrics lines; the only writer of a run's ``metrics.jsonl``."""

    def __init__(
        self, folder: RunFolder, config: MetricsConfig, *, num_steps_done: int | None
    ) -> None:
        """Open the file, dropping what lies beyond ``num_steps_done`` optimizer steps.

        None means that the run begins anew: only finished SFT epochs are kept.
        """
        folder.path.mkdir(parents=True, exist_ok=True)
        truncate_metrics(folder.metrics_file, num_steps_done)
        self._path = folder.metrics_file
        self._file = folder.metrics_file.open("a", encoding="utf-8")
        self._sinks: list[Any] = []
        if config.wandb is not None:
            self._sinks.append(_WandbSink(folder, config))
        if config.tensorboard:
            self._sinks.append(_TensorboardSink(folder))

    def write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Append one line; non-finite numbers are written as null, never as invalid JSON."""
        line: dict[str, Any] = {"step": step, "kind": kind, "time": time.time()}
        line |= {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(kind, step, values)

    def drop_sft_beyond(self, num_epochs_done: int) -> None:
        """Drop the ``sft`` lines of epochs that will be run again."""
        self._file.close()
        _rewrite(self._path, lambda line: line["kind"] != "sft" or line["step"] <= num_epochs_done)
        self._file = self._path.open("a", encoding="utf-8")

    def shows_rollouts(self, step: int) -> bool:
        """Return whether a service shows the rollouts of this step: rows are costly to make."""
        return any(sink.shows_rollouts(step) for sink in self._sinks)

    def write_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand a table of rollouts to the services that show this step's."""
        for sink in self._sinks:
            if sink.shows_rollouts(step):
                sink.write_rollouts(step, rows)

    @property
    def wandb_id(self) -> str | None:
        """Id of the W&B run that these metrics go to; None without W&B."""
        ids = [sink.run_id for sink in self._sinks if isinstance(sink, _WandbSink)]
        return ids[0] if ids else None

    def close(self) -> None:
        """Flush and close everything, once."""
        if self._file.closed:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        for sink in self._sinks:
            sink.close()


def truncate_metrics(path: Path, num_steps_done: int | None) -> None:
    """Drop lines that describe optimizer steps after the first ``num_steps_done``.

    None drops every line of training and evaluation. A half-written last line (a kill in the
    middle of a write) is dropped too. What was dropped is counted and logged.
    """
    last_eval = -1 if num_steps_done is None else num_steps_done
    last_train = -1 if num_steps_done is None else num_steps_done - 1

    def keeps(line: Mapping[str, Any]) -> bool:
        if line["kind"] == "sft":
            return True
        return line["step"] <= (last_train if line["kind"] == "train" else last_eval)

    _rewrite(path, keeps)


def _rewrite(path: Path, keeps: Callable[[Mapping[str, Any]], bool]) -> None:
    """Keep the lines that are whole and that ``keeps`` accepts; log how many were dropped."""
    if not path.exists():
        return
    kept: list[str] = []
    num_dropped = 0
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            is_kept = keeps(json.loads(text))
        except json.JSONDecodeError:
            is_kept = False
        if is_kept:
            kept.append(text)
        else:
            num_dropped += 1
    if num_dropped:
        logger.info("%s: dropped %d lines that will be written again", path, num_dropped)
        write_text_atomic(path, "".join(f"{text}\n" for text in kept))


def _shown_name(kind: Kind, name: str) -> str:
    """Return a metric's name where all kinds share one axis of steps."""
    return f"{kind}_{name}" if kind in ("sft", "outside") else name


class _WandbSink:
    """Weights & Biases; one W&B run per run folder, continued on resume.

    Rows are numbered over all starts (``_step``); curves are drawn over ``step``. Steps that a
    resumed run takes again stand there twice: only W&B's service could drop them.
    """

    def __init__(self, folder: RunFolder, config: MetricsConfig) -> None:
        assert config.wandb is not None, "built only when wandb is configured"
        import wandb  # optional dependency, slow to import

        self._wandb = wandb
        self._every_steps = config.wandb.every_steps_rollouts
        self._file = folder.path / "wandb.json"
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        own_id = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex
        self.run_id: str = known.get("id", own_id)
        """Id under which the service knows this run."""
        self._num_rows: int = known.get("num_rows", 0)
        self._keep()  # before W&B knows the id: whenever the run is killed, it stays one run
        self._run = wandb.init(
            project=config.wandb.project,
            mode=config.wandb.mode,
            dir=str(folder.path),
            id=self.run_id,
            resume="allow",
            name=folder.path.name,
            config=json.loads(folder.config_file.read_text()),
        )
        self._num_rows = max(self._num_rows, self._run.step)  # the service may know of more
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Log one row, with the step that all curves are drawn over."""
        self._log({_shown_name(kind, name): value for name, value in values.items()}, step)

    def shows_rollouts(self, step: int) -> bool:
        """Return whether a table is due: one every so many steps."""
        return step % self._every_steps == 0

    def write_rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Upload a table of rollouts."""
        if not rows:
            return
        columns: list[int | str] = list(rows[0])
        table = self._wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
        self._log({"rollouts": table}, step)

    def close(self) -> None:
        self._run.finish()

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        """Log a row under the next number; offline W&B itself would count from 0 in each start."""
        row, self._num_rows = self._num_rows, self._num_rows + 1
        self._keep()  # before the row is logged: a kill may leave a number out, never use one twice
        self._run.log({**values, "step": step}, step=row, commit=True)

    def _keep(self) -> None:
        """Write what the next start must know."""
        write_json_atomic(self._file, {"id": self.run_id, "num_rows": self._num_rows})


class _TensorboardSink:
    """TensorBoard event files in the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter  # optional dependency

        self._writer = SummaryWriter(str(folder.path / "tensorboard"))

    def write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in values.items():
            self._writer.add_scalar(_shown_name(kind, name), value, step)

    def shows_rollouts(self, step: int) -> bool:
        """Return False: TensorBoard has no tables; the Parquet files hold them."""
        return False

    def close(self) -> None:
        self._writer.close()
