"""Arguments of a server that ``rollout.sglang.extra_args`` must not have."""

import re

import pytest

from prefixrl_mcore.config.base import ConfigError, validate
from prefixrl_mcore.config.rollout import SGLangConfig
from tests.support.sglang_environments import sglang_python

OPENS_A_PORT = re.compile(
    r"-(port|ports|addr|bootstrap|urls|sidecar|disaggregation)\b|grpc|encoder-"
)
HARMLESS = {
    "--grpc-worker-threads": "a number",
    "--sidecar-args": "of --sidecar",
    "--grpc-response-timeout-secs": "a time",
    "--encoder-transfer-backend": "of a server that has --encoder-only or --encoder-urls",
    "--enable-adaptive-dispatch-to-encoder": "of a server that has --encoder-urls",
    "--enable-encoder-swa-bounded-replay": "part of a model",
    "--mm-enable-dp-encoder": "part of a model",
}


def argument_names(environment: str) -> set[str]:
    """Return the arguments of an installed SGLang: its annotated fields, and their aliases."""
    sources = sglang_python(environment).parents[1].glob("lib/python3*/site-packages/sglang/srt")
    names: set[str] = set()
    for folder in sources:
        for file in [folder / "server_args.py", *folder.glob("arg_groups/fields/*.py")]:
            text = file.read_text(encoding="utf-8")
            fields = re.findall(r"^    ([a-z0-9_]+): A\[", text, re.MULTILINE)
            names |= {"--" + field.replace("_", "-") for field in fields}
            for aliases in re.findall(r"aliases=\[([^]]*)\]", text):
                names |= set(re.findall(r'"(--[a-z0-9-]+)"', aliases))
    return names


def is_refused(argument: str) -> bool:
    try:
        SGLangConfig(extra_args=(argument, "1"))
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("environment", ["sglang", "sglang-next"])
def test_no_argument_of_an_installed_version_opens_a_port(environment: str) -> None:
    names = argument_names(environment)
    ports = {name for name in names if OPENS_A_PORT.search(name)} - set(HARMLESS)

    assert {"--port", "--nccl-init-addr", "--disaggregation-mode", "--grpc-port"} <= ports
    assert sorted(name for name in ports if not is_refused(name)) == []


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("--tp-size=2", r"tensor_parallel_size"),
        ("--tp", r"tensor_parallel_size"),
        ("--tensor-parallel-size", r"tensor_parallel_size"),
        ("--dp-size", r"rollout\.sglang\.num_servers"),
        ("--data-parallel-size", r"rollout\.sglang\.num_servers"),
        ("--pp-size", "not supported"),
        ("--context-length", r"rollout\.max_total_tokens"),
        ("--max-total-tokens", r"max_kv_tokens"),
        ("--mem-fraction-static=0.9", r"memory_fraction"),
        ("--model-path", r"model\.path"),
        ("--model", r"model\.path"),
        ("--device", "the trainer's"),
        ("--weight-version", "names the weights"),
        ("--disaggregation-mode=prefill", "several parts"),
        ("--encoder-only", "several parts"),
        ("--enable-tf32-matmul", "round"),
        ("--rl-on-policy-target=fsdp", "round"),
        ("--base-gpu-id", "after the trainer's"),
        ("--kv-events-config", "API key"),
        ("--preferred-sampling-params", "as the loss knows it"),
    ],
)
def test_refusal_names_what_takes_its_place(argument: str, instead: str) -> None:
    with pytest.raises(
        ConfigError, match=f"must not have {argument.partition('=')[0]}; .*{instead}"
    ):
        validate(SGLangConfig, {"extra_args": [argument]}, where="test")


@pytest.mark.parametrize(
    "argument", ["--attention-backend", "--disable-overlap-schedule", "--max-running-requests=8"]
)
def test_other_arguments_are_let_through(argument: str) -> None:
    assert SGLangConfig(extra_args=(argument,)).extra_args == (argument,)
