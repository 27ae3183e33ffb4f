"""``prefixrl train --init``: what a run's weights and tokenizer begin as.

A run has one initial model, the Hugging Face folder ``model.path``; the rollout engine, the
tokenizer and evaluations of the base model read it, too. ``--init`` sets it: to the folder that it
names, or, for a checkpoint, to ``RUN/model``, which is made of the checkpoint's weights once.
"""

import json
import logging
from pathlib import Path

from prefixrl_mcore.checkpoint.convert.checkpoint_weights import checkpoint_facts
from prefixrl_mcore.checkpoint.offline import convert_to_hf
from prefixrl_mcore.checkpoint.run_checkpoints import HF_FOLDER, resolve_checkpoint
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.observability.atomic import write_json_atomic

logger = logging.getLogger(__name__)

_FOLDER = "model"
_ORIGIN = "model.json"


def with_initial_model(config: RunConfig, init: Path | None) -> RunConfig:
    """Return the config whose ``model.path`` is what ``--init`` says; nothing is read or written.

    Args:
        config: the config as loaded.
        init: a Hugging Face folder, a checkpoint, or a folder of checkpoints; None changes nothing.
    """
    if init is None:
        return config
    return _with_path(config, config.run_folder / _FOLDER if _is_checkpoint(init) else init)


def with_shape_of(config: RunConfig, init: Path | None) -> RunConfig:
    """Return the config with a ``model.path`` that has the ``config.json`` already.

    Raises:
        CheckpointError: if ``init`` is no model.
    """
    if init is None:
        return config
    is_checkpoint = _is_checkpoint(init)
    return _with_path(config, resolve_checkpoint(init) / HF_FOLDER if is_checkpoint else init)


def provide_initial_model(config: RunConfig, init: Path | None) -> None:
    """Make ``RUN/model`` if ``init`` is a checkpoint and it is not there yet.

    One process calls this. A killed call is taken up by the next one.

    Raises:
        ConfigError: if ``RUN/model`` was made of another checkpoint.
        CheckpointError: if ``init`` is no model, incomplete or damaged.
        SaveError: if the storage refuses.
    """
    if init is None or not _is_checkpoint(init):
        return
    checkpoint = resolve_checkpoint(init)
    facts = {"checkpoint": str(checkpoint.resolve()), **checkpoint_facts(checkpoint)}
    origin = config.run_folder / _ORIGIN
    before = json.loads(origin.read_text(encoding="utf-8")) if origin.exists() else facts
    if before["manifest"] != facts["manifest"]:
        raise ConfigError(
            f"--init {init}: {config.model.path} was made of {before['checkpoint']}, not of "
            f"{checkpoint}; name that one, or use another --run-folder"
        )
    if config.model.path.is_dir():
        return
    write_json_atomic(origin, facts)
    logger.info("--init %s: only its weights and tokenizer are used", checkpoint)
    convert_to_hf(checkpoint, config.model.path)


def _with_path(config: RunConfig, path: Path) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def _is_checkpoint(init: Path) -> bool:
    return not (init / "config.json").is_file()
