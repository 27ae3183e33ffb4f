"""The run folder: one place for everything that a run writes, tied to one config."""

import json
import logging
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.continuation import flatten, may_change, show_difference
from prefixrl_mcore.config.json_files import read_json_object
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.observability.atomic import write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

_PACKAGES = (
    "prefixrl-mcore",
    "torch",
    "triton",
    "numpy",
    "megatron-core",
    "transformers",
    "tokenizers",
    "safetensors",
    "math-verify",
    "pyarrow",
)


ENGINE_FILE = "engine.json"
"""In the log folder of each stage: the rollout engine, and why it fell back from SGLang if so."""


class RunFolder:
    """Paths of one run, and the check that the folder belongs to the config at hand."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is written before ``claim``."""
        self.path = path
        self.config_file = path / "config.json"
        self.environment_file = path / "environment.json"
        self.metrics_file = path / "metrics.jsonl"
        self.progress_file = path / "progress.json"
        self.stages_file = path / "stages.json"
        self.rollouts = path / "rollouts"
        self.eval = path / "eval"
        self.checkpoints = path / "checkpoints"
        self.latest_file = self.checkpoints / "latest"
        self.lease_file = path / "lease.json"
        self.dumps = path / "dumps"
        self.heartbeats = path / "heartbeats"
        self.profile = path / "profile"
        self.logs = path / "logs"

    def check(self, config: RunConfig) -> None:
        """Refuse a folder of another config without writing anything.

        Raises:
            ConfigError: if the folder is a file, or holds a run of another config.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run_folder {self.path}: is a file; name a folder")
        if self.config_file.exists():
            self._check_same_run(config)

    def claim(self, config: RunConfig) -> None:
        """Write the resolved config, or check that the folder already belongs to it.

        Call it when every input has been read, so that a mistyped path claims nothing.

        Raises:
            ConfigError: if the folder holds a run of another config; nothing is overwritten.
        """
        self.check(config)
        if self.config_file.exists():
            changed = self._check_same_run(config)
            if not changed:
                return
            logger.info("%s: continued with changed settings: %s", self.path, ", ".join(changed))
        self.path.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.config_file, config.model_dump_json(indent=2) + "\n")
        write_json_atomic(self.environment_file, describe_environment())

    def read_config(self) -> RunConfig:
        """Return the config that the folder was made with.

        Raises:
            ConfigError: if the folder holds no run or its config is not readable.
        """
        if not self.config_file.exists():
            raise ConfigError(f"{self.path}: not a run folder (no config.json); check the path")
        values = read_json_object(
            self.config_file, remedy="restore it, or use another --run-folder"
        )
        return validate(RunConfig, values, where=str(self.config_file))

    def add_stage_seconds(self, stage: str, seconds: float) -> None:
        """Add ``seconds`` to the time that ``stage`` has taken in this run, over all starts."""
        stages = json.loads(self.stages_file.read_text()) if self.stages_file.exists() else {}
        stages[stage] = stages.get(stage, 0.0) + seconds
        write_json_atomic(self.stages_file, stages)

    def _check_same_run(self, config: RunConfig) -> list[str]:
        """Return the changed settings that may change; refuse all others."""
        before = flatten(json.loads(self.read_config().model_dump_json()))
        after = flatten(json.loads(config.model_dump_json()))
        keys = sorted(set(before) | set(after))
        changed = [key for key in keys if before.get(key) != after.get(key)]
        refused = [key for key in changed if not may_change(key, config)]
        if refused:
            lines = [f"  {show_difference(k, before.get(k), after.get(k))}" for k in refused]
            raise ConfigError(
                f"run_folder {self.path} holds a run of another config:\n"
                + "\n".join(lines)
                + "\nUse another --run-folder, or restore these values. Nothing was changed."
            )
        return changed


def describe_environment() -> dict[str, Any]:
    """Return git commit, package versions and machine, as saved with each run."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_is_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }


def _git(*arguments: str) -> str | None:
    """Return git's answer about the source tree, or None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
