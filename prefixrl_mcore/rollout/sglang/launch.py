"""How a server's process is started: its command line and its environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.api_key import API_KEY_VARIABLE
from prefixrl_mcore.rollout.sglang.determinism import deterministic_flags
from prefixrl_mcore.rollout.sglang.precision import logits_flags
from prefixrl_mcore.rollout.weight_names import read_config_number

_HERE = Path(__file__).resolve().parent
LAUNCHER = _HERE / "launcher" / "serve.py"
_STAND_INS = _HERE / "cpu" / "stand_ins"

_CPU_KV_BYTES = 1024**3
_CPU_MAX_KV_TOKENS = 65536
"""Size of the KV cache on a CPU machine without ``max_kv_tokens``: SGLang would take a share
of all memory."""

_CONTEXT_MARGIN = 16
"""SGLang cuts a completion a few tokens before its context length, without a word."""

_NO_LIBRARY = "/no-nccl-without-a-gpu"

_PRIVATE_VARIABLES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        API_KEY_VARIABLE,  # the server gets it through its standard input
        *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE"),
        "CUDA_DEVICE_MAX_CONNECTIONS",  # Megatron's order of launches
        "SGLANG_RETURN_ORIGINAL_LOGPROB",  # would give logprobs at temperature 1
    }
)
_PRIVATE_BEGINNINGS = ("TORCHELASTIC_", "TORCH_NCCL_", "LOCAL_", "GROUP_", "ROLE_")
"""The trainer's own: the server would join its process group, import its packages, show its key.
Under torchrun, TORCHELASTIC_USE_AGENT_STORE alone has its rank 0 wait for a store for ever."""

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads the settings of its memory on GPUs from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerLaunch:
    """How one server is started, every time that it is."""

    name: str
    """``server 0``; names it in logs and errors."""

    model_folder: Path
    """Hugging Face folder that it serves."""

    config: SGLangConfig
    """Its settings."""

    logits_dtype: LogitsDtype
    """Precision of a bfloat16 model's logits."""

    device: str
    """``cpu`` or ``cuda``."""

    gpus: tuple[str, ...]
    """Its entries of CUDA_VISIBLE_DEVICES; empty on a CPU machine."""

    first_gpu: int = 0
    """Which of them is its first, where it also sees others: a trainer that reaches it by its URL
    and shares its GPUs then learns from it which they are."""

    max_total_tokens: int
    """Longest context and completion together."""

    weight_version: str
    """Name of the weights in the folder, stamped on completions."""

    releases_memory: bool = False
    """Its GPU memory can be released and taken again."""


def server_arguments(launch: ServerLaunch, port: int, *, has_key: bool) -> list[str]:
    """Return what the interpreter is given to run."""
    config, device = launch.config, launch.device
    is_stock = device != "cpu" and not has_key
    launcher = ["-m", "sglang.launch_server"] if is_stock else [str(LAUNCHER)]
    arguments: dict[str, str] = {
        "--model-path": str(launch.model_folder),
        "--weight-version": launch.weight_version,
        "--host": config.host,
        "--port": str(port),
        "--device": device,
        "--dtype": config.dtype,
        "--tensor-parallel-size": str(config.tensor_parallel_size),
        "--mem-fraction-static": str(config.memory_fraction),
        "--context-length": str(launch.max_total_tokens + _CONTEXT_MARGIN),
        # Structured output is not used, and its library takes seconds to load.
        "--grammar-backend": "none",
    }
    if launch.first_gpu:
        arguments["--base-gpu-id"] = str(launch.first_gpu)
    if config.max_kv_tokens is not None:
        arguments["--max-total-tokens"] = str(config.max_kv_tokens)
    flags = ["--skip-server-warmup", "--skip-tokenizer-init"]
    if device == "cpu":
        arguments["--attention-backend"] = "torch_native"
        arguments["--sampling-backend"] = "pytorch"
        arguments["--dtype"] = "float32"
        # A bound only, and a loose one: other programs take memory while the server looks at it.
        arguments["--mem-fraction-static"] = "0.5"
        arguments.setdefault(
            "--max-total-tokens",
            str(_cpu_kv_tokens(launch.model_folder, launch.max_total_tokens + _CONTEXT_MARGIN)),
        )
        # The scheduler otherwise polls all the time, on a core that the trainer needs.
        flags += ["--disable-overlap-schedule", "--sleep-on-idle"]
    flags += logits_flags(config, launch.logits_dtype, device=device)
    flags += deterministic_flags(config, device=device)
    if launch.releases_memory and device != "cpu":
        flags.append("--enable-memory-saver")
    pairs = [part for pair in arguments.items() for part in pair]
    return [*launcher, *pairs, *flags, *config.extra_args]


def _cpu_kv_tokens(model_folder: Path, min_tokens: int) -> int:
    """Return how many tokens of float32 KV cache fit into its share, at least ``min_tokens``."""
    heads = read_config_number(model_folder, "num_attention_heads")
    hidden_size = read_config_number(model_folder, "hidden_size")
    head_dim = read_config_number(model_folder, "head_dim", hidden_size // heads)
    kv_heads = read_config_number(model_folder, "num_key_value_heads", heads)
    numbers_per_token = 2 * read_config_number(model_folder, "num_hidden_layers") * kv_heads
    tokens = _CPU_KV_BYTES // (numbers_per_token * head_dim * 4)
    return max(min(tokens, _CPU_MAX_KV_TOKENS), min_tokens)


def server_environment(launch: ServerLaunch) -> Mapping[str, str]:
    """Return the server's environment: the trainer's, without what would confuse it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _PRIVATE_VARIABLES and not name.startswith(_PRIVATE_BEGINNINGS)
    }
    environment["HF_HUB_OFFLINE"] = "1"  # the model is a folder
    # The margin may go past the model's positions; the requests do not.
    environment["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    # For those who watch it from outside: /health answers without sampling a token.
    environment["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(launch.gpus)
    if launch.releases_memory:
        # The memory saver cannot release segments that expand.
        for name in ALLOCATOR_VARIABLES:
            environment.pop(name, None)
    if launch.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment["PYTHONPATH"] = str(_STAND_INS)
        environment.setdefault("OMP_NUM_THREADS", "1")
        if launch.config.tensor_parallel_size > 1:
            cores = cores_of_ranks(launch.config.tensor_parallel_size)
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", cores)
            # Where NCCL is installed, as torch for GPUs does it, ranks would try to use it.
            environment["SGLANG_NCCL_SO_PATH"] = _NO_LIBRARY
    return environment


def cores_of_ranks(num_ranks: int) -> str:
    """Return a core for each rank on a CPU machine, as SGLang reads them: ``0|1``.

    By itself it gives a whole NUMA node to each rank, and so does not start on a machine that has
    fewer of them.
    """
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))
