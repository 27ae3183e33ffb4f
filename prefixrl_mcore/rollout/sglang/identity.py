"""Whether a server is what the settings say: its parts, its model, its version."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefixrl_mcore.config.json_files import read_json_object
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.sglang.protocol import ServerProtocol

_MODEL_KEYS = ("architectures", "model_type", "vocab_size")


def check_layout(server_info: Mapping[str, Any], config: SGLangConfig, *, url: str) -> None:
    """Refuse a server of other parallel sizes: weights are sent to each of its ranks.

    What a server does not report is not compared.

    Raises:
        EngineError: naming the size and the setting.
    """
    remedies = {
        "tp_size": (config.tensor_parallel_size, "set rollout.sglang.tensor_parallel_size to it"),
        "pp_size": (1, "start it without --pp-size: pipelines of servers are not supported"),
        "dp_size": (1, "start it without --dp-size, and name each replica in rollout.sglang.urls"),
    }
    for name, (expected, remedy) in remedies.items():
        found = server_info.get(name)
        if found is not None and found != expected:
            raise EngineError(
                f"SGLang: the server at {url} has {name} = {found}, expected {expected}; {remedy}"
            )


def check_model(model_info: Mapping[str, Any], model_folder: Path, *, url: str) -> None:
    """Refuse a server with a model of another kind than the folder's.

    What the server or the folder does not say is not compared.

    Raises:
        EngineError: naming what differs.
    """
    expected = read_json_object(
        model_folder / "config.json", remedy="name the folder of a Hugging Face model"
    )
    for key in _MODEL_KEYS:
        ours, theirs = expected.get(key), model_info.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise EngineError(
                f"SGLang: the server at {url} serves a model with {key} = {theirs!r} "
                f"({model_info.get('model_path')}), expected {ours!r} as in {model_folder}; start "
                "it with that model, or correct rollout.sglang.urls or model.path"
            )


def check_sampling(model_info: Mapping[str, Any], *, url: str) -> None:
    """Refuse a server that adds to what a request says of sampling: the loss would not know.

    Raises:
        EngineError: with what it adds.
    """
    preferred = model_info.get("preferred_sampling_params")
    if preferred:
        raise EngineError(
            f"SGLang: the server at {url} has preferred sampling parameters, {preferred}, which "
            "the loss cannot follow; start it without --preferred-sampling-params"
        )


def check_memory_release(
    protocol: ServerProtocol, server_info: Mapping[str, Any], *, url: str
) -> None:
    """Refuse a server whose sleep would leave the trainer no memory.

    Raises:
        EngineError: with the remedy.
    """
    if server_info.get("device") == "cuda" and not protocol.can_release_memory:
        raise EngineError(
            f"SGLang: the server at {url} keeps its GPU memory when it sleeps, which "
            "rollout.colocated has it do for every update; start it with --enable-memory-saver, or "
            "set rollout.colocated = false"
        )


def check_versions(version: str, others: Iterable[str], *, url: str) -> None:
    """Refuse a server of another version of SGLang than the other servers of the pool.

    Raises:
        EngineError: with the versions.
    """
    different = sorted({other for other in others if other != version})
    if different:
        raise EngineError(
            f"SGLang: the server at {url} is version {version}, others of the pool are "
            f"{', '.join(different)}; their logprobs may differ: start all servers of "
            "rollout.sglang.urls (or rollout.sglang.python) with one version"
        )
