"""``--init``: what a run's weights and tokenizer begin as.

A run has one initial model, the Hugging Face folder ``model.path``; the rollout engine, the
tokenizer and evaluations of the base model read it, too. ``--init`` sets it: to the folder that it
names, or, for a checkpoint, to ``RUN/model``, which is made of the checkpoint's weights once.
"""

import json
import logging
from pathlib import Path

from prefixrl_mcore.checkpoint.convert.checkpoint_weights import checkpoint_facts
from prefixrl_mcore.checkpoint.convert.offline import convert_to_hf
from prefixrl_mcore.checkpoint.run_checkpoints import (
    HF_FOLDER,
    is_model_folder,
    resolve_checkpoint,
)
from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.json_files import read_json_object
from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.observability.run_folder import RunFolder

logger = logging.getLogger(__name__)

_FOLDER = "model"
_ORIGIN = ".made-of.json"  # in the folder, hidden so that checkpoints do not copy it


def with_initial_model(config: RunConfig, init: Path | None) -> RunConfig:
    """Return the config whose ``model.path`` is what ``--init`` says; nothing is read or written.

    Args:
        config: the config as loaded.
        init: a Hugging Face folder, a checkpoint, a folder of checkpoints, or a run; None changes
            nothing.
    """
    if init is None:
        return config
    return _with_path(config, init if is_model_folder(init) else config.run_folder / _FOLDER)


def with_shape_of(config: RunConfig, init: Path | None) -> RunConfig:
    """Return the config with a ``model.path`` that has the ``config.json`` already.

    Raises:
        CheckpointError: if ``init`` is no model.
    """
    if init is None:
        return config
    if is_model_folder(init):
        return _with_path(config, init)
    made = config.run_folder / _FOLDER
    is_gone = not init.exists() and made.is_dir()
    return _with_path(config, made if is_gone else resolve_checkpoint(init) / HF_FOLDER)


def take_initial_model(config: RunConfig, init: Path) -> RunConfig:
    """Return the config with the model that ``--init`` says, made if it is needed; one process.

    Raises:
        ValueError: as ``provide_initial_model``, or if the run folder holds another run.
        SaveError: if the storage refuses.
    """
    config = with_initial_model(config, init)
    RunFolder(config.run_folder).check(config)
    provide_initial_model(config, init)
    return config


def provide_initial_model(config: RunConfig, init: Path | None) -> None:
    """Make ``RUN/model`` if ``init`` is a checkpoint and it is not there yet.

    One process calls this. A killed call is taken up by the next one. Once ``RUN/model`` is there,
    the checkpoint may be gone.

    Raises:
        ConfigError: if ``RUN/model`` was made of another checkpoint, or does not say of which.
        CheckpointError: if ``init`` is no model, incomplete or damaged.
        SaveError: if the storage refuses.
    """
    if init is None or is_model_folder(init):
        return
    folder = config.model.path
    if folder.is_dir() and any(folder.iterdir()):
        _check_origin(folder, init)
        return
    checkpoint = resolve_checkpoint(init)
    origin = {"checkpoint": str(checkpoint.resolve()), **checkpoint_facts(checkpoint)}
    logger.info("--init %s: only its weights and tokenizer are used", checkpoint)
    convert_to_hf(checkpoint, folder, more_files={_ORIGIN: json.dumps(origin, indent=2) + "\n"})


def _check_origin(folder: Path, init: Path) -> None:
    """Refuse a model that was not made of the checkpoint that ``--init`` names.

    Raises:
        ConfigError: as ``provide_initial_model``.
        CheckpointError: if ``init`` is there and no checkpoint.
    """
    remedy = f"remove {folder}, so that it is made again, or use another --run-folder"
    origin = read_json_object(folder / _ORIGIN, remedy=remedy)
    made_of, digest = origin.get("checkpoint"), origin.get("manifest")
    if not isinstance(made_of, str) or not isinstance(digest, str):
        raise ConfigError(
            f"{folder / _ORIGIN}: got {sorted(origin)}, expected checkpoint and manifest; {remedy}"
        )
    if init.exists():
        is_same = checkpoint_facts(resolve_checkpoint(init))["manifest"] == digest
    else:
        is_same = Path(made_of).is_relative_to(init.resolve())
    if not is_same:
        raise ConfigError(
            f"--init {init}: {folder} was made of {made_of}; name that one, or use another "
            "--run-folder"
        )


def _with_path(config: RunConfig, path: Path) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
