"""The precision of a SGLang server's logits: asked for at its start, checked when it answers.

SGLang's sampler is float32 throughout: temperature, softmax, logprobs. What it is given is not: the
output layer of a bfloat16 model rounds its logits, unless the server is started with the flag
below. Version 0.5.17 then widens hidden states and weight in every call, so that a weight update
leaves no stale copy behind.
"""

from collections.abc import Mapping
from typing import Any

from prefixrl_mcore.config.policy import LogitsDtype
from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.engine import EngineError

_FLOAT32_LOGITS = "--enable-fp32-lm-head"


def logits_flags(config: SGLangConfig, logits_dtype: LogitsDtype, *, device: str) -> list[str]:
    """Return the flags that give a server on ``device`` its precision of logits.

    Where the weights are float32, as on every CPU, the logits are so without a flag.
    """
    is_bfloat16 = config.dtype == "bfloat16" and device != "cpu"
    return [_FLOAT32_LOGITS] if is_bfloat16 and logits_dtype == "float32" else []


def refused_flags(log: str) -> str:
    """Return what to say of a server that died because its version lacks the flag, or nothing."""
    if not any(
        "unrecognized arguments" in line and _FLOAT32_LOGITS in line for line in log.splitlines()
    ):
        return ""
    return (
        f": this version of SGLang has no {_FLOAT32_LOGITS}, which float32 logits of a bfloat16 "
        "model need; run `make setup-sglang` for a version that has it, or set "
        'model.logits_dtype = "bfloat16" to round them in trainer and engine alike'
    )


def check_logits(
    server_info: Mapping[str, Any], config: SGLangConfig, logits_dtype: LogitsDtype
) -> None:
    """Refuse a server whose logits are not in the precision of the trainer's.

    Args:
        server_info: the server's arguments, as it reports them.
        config: the engine's settings; what they say of precision agrees with the policy's.
        logits_dtype: precision of a bfloat16 model's logits.

    Raises:
        EngineError: with the arguments that the server lacks or has too many.
    """
    dtype = server_info.get("dtype", "auto")
    if dtype == "auto":
        dtype = config.dtype
    has_flag = bool(server_info.get("enable_fp32_lm_head"))
    target = server_info.get("rl_on_policy_target")  # rounds logits and logprobs, flag or not
    has_tf32 = bool(server_info.get("enable_tf32_matmul"))  # rounds what is multiplied
    is_float32 = (has_flag or dtype == "float32") and target is None and not has_tf32
    if is_float32 == (logits_dtype == "float32" or config.dtype == "float32"):
        return
    raise EngineError(
        f"SGLang: the server has {'float32' if is_float32 else 'rounded'} logits (dtype {dtype}, "
        f"{_FLOAT32_LOGITS} {'on' if has_flag else 'off'}, rl_on_policy_target {target}, "
        f"enable_tf32_matmul {'on' if has_tf32 else 'off'}), but "
        f'model.logits_dtype = "{logits_dtype}" and rollout.sglang.dtype = "{config.dtype}" give '
        f"the trainer {'rounded' if is_float32 else 'float32'} ones; start it with "
        + (
            f"dtype bfloat16 and without {_FLOAT32_LOGITS} (a server on a CPU cannot: set "
            'model.logits_dtype = "float32")'
            if is_float32
            else f"{_FLOAT32_LOGITS} and without --rl-on-policy-target and --enable-tf32-matmul, "
            'or set model.logits_dtype = "bfloat16"'
        )
    )
