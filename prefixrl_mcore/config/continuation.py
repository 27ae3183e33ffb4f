"""Which settings a run may change when it goes on, and how two sets of settings are compared."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python

from prefixrl_mcore.config.base import Config, ConfigError
from prefixrl_mcore.config.run import RunConfig

MAY_CHANGE = (
    "trainer.",
    "checkpoint.",
    "evaluation.",
    "collect.keep_seconds",
    "metrics.",
    "profile.",
    "rollout.engine",
    "rollout.colocated",
    "rollout.max_logprob_gap",
    "rollout.on_logprob_gap",
    "rollout.sglang.python",
    "rollout.sglang.deterministic",
    "rollout.sglang.host",
    "rollout.sglang.api_key_file",
    "rollout.sglang.num_servers",
    "rollout.sglang.urls",
    "rollout.sglang.router_url",
    "rollout.sglang.min_servers",
    "rollout.sglang.max_restarts",
    "rollout.sglang.restart_window_seconds",
    "rollout.sglang.max_samples_per_server",
    "rollout.sglang.health_",
    "rollout.sglang.max_failures",
    "rollout.sglang.tensor_parallel_size",
    "rollout.sglang.memory_fraction",
    "rollout.sglang.max_kv_tokens",
    "rollout.sglang.start_timeout_seconds",
    "rollout.sglang.request_timeout_seconds",
    "rollout.sglang.max_retries",
    "rollout.sglang.sync.",
    "rollout.transformers.max_batch_size",
    "reward.num_workers",
    "batch.stream_tokens",
    "policy.parallel.",
    "policy.recompute",
    "policy.layer_spec",
    "policy.gradient_accumulation_fusion",
    "policy.head.",
    "policy.experts.implementation",
    "policy.optimizer.use_distributed_optimizer",
    "model.path",
    "data.held_out",
    "run_folder",
)
"""Settings that a continued run may change: they decide how long, where and with how much memory,
not what is computed. Exception: ``trainer.num_steps`` under a schedule that falls over the run."""


def may_change(key: str, config: RunConfig) -> bool:
    """Return whether a continued run may change the setting of a dotted key."""
    if key == "trainer.num_steps":
        return config.policy.optimizer.schedule == "constant"
    return key.startswith(MAY_CHANGE)


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a continued run may not change, as JSON values by dotted key."""
    settings = flatten(json.loads(config.model_dump_json()))
    return {key: value for key, value in settings.items() if not may_change(key, config)}


def settings_hash(config: RunConfig) -> str:
    """Return a SHA-256 of the fixed settings that differ from their defaults.

    A setting that a later version adds therefore leaves the hash as it is, until it is used.
    """
    defaults = default_settings(RunConfig)
    chosen = {
        key: value
        for key, value in fixed_settings(config).items()
        if key not in defaults or defaults[key] != value
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def describe_settings(config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint keeps of the settings: for ``check_saved_settings``, and a hash."""
    return {"settings": fixed_settings(config), "config_hash": settings_hash(config)}


def check_saved_settings(state: Mapping[str, Any], config: RunConfig, *, where: str) -> None:
    """Refuse to go on from a checkpoint under settings that may not change.

    Args:
        state: the trainer's state in the checkpoint, with what ``describe_settings`` returned.
        config: the settings at hand.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: naming every setting that differs, or that the checkpoint has none.
    """
    if "settings" not in state:
        raise ConfigError(
            f"{where}: was not saved by this version of prefixrl train; resume it with the "
            "version that saved it"
        )
    lines = differing_settings(state["settings"], config)
    if lines:
        raise ConfigError(
            f"{where}: was saved under other settings:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nRestore these values (config.json in the folder of the run has them), or start "
            f"another run. What may change: {', '.join(MAY_CHANGE)}"
        )


def check_same_inputs(saved: Mapping[str, str], now: Mapping[str, str], *, where: str) -> None:
    """Refuse to go on with another tokenizer or reference, whatever the paths say.

    Args:
        saved: digest of each input in the checkpoint, by name.
        now: digests of the inputs at hand.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: naming the inputs that differ.
    """
    names = sorted(name for name in saved.keys() & now.keys() if saved[name] != now[name])
    if names:
        lines = [f"  {name}: {saved[name][:12]} there, {now[name][:12]} now" for name in names]
        raise ConfigError(
            f"{where}: was saved with other content (SHA-256) of:\n"
            + "\n".join(lines)
            + "\nPoint model.path and loss.reference_path at the files that the run began with"
        )


def differing_settings(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Return one line for each fixed setting that is not what it was; empty if none differs.

    A setting that is not among the saved ones, because an earlier version saved them, was what its
    default is now.

    Args:
        saved: ``fixed_settings`` of the run that is continued.
        config: the settings at hand.
    """
    defaults, now = default_settings(RunConfig), fixed_settings(config)
    lines: list[str] = []
    for key in sorted(saved.keys() | now.keys()):
        if may_change(key, config):
            continue  # an earlier version may have been stricter, or laxer
        if key not in now:
            lines.append(f"{key}: {saved[key]!r} there, no such setting now")
        elif key not in saved and (key not in defaults or defaults[key] != now[key]):
            lines.append(f"{key}: not set there, {now[key]!r} now")
        elif key in saved and saved[key] != now[key]:
            lines.append(show_difference(key, saved[key], now[key]))
    return lines


def show_difference(key: str, before: object, now: object) -> str:
    """Return the line that tells of a setting that may not change."""
    line = f"{key}: {before!r} there, {now!r} now"
    if key == "trainer.num_steps":
        line += " (the learning rate falls over the run: it would jump)"
    return line


def default_settings(config_cls: type[Config]) -> dict[str, Any]:
    """Return the default of every setting that has one, as JSON values by dotted key."""
    tree: dict[str, Any] = {}
    for name, field in config_cls.model_fields.items():
        if not field.is_required():
            tree[name] = to_jsonable_python(field.get_default(call_default_factory=True))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            tree[name] = default_settings(field.annotation)
    return flatten(tree)


def flatten(tree: dict[str, Any], parent: str = "") -> dict[str, Any]:
    """Return ``tree`` with dotted keys; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{parent}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat
