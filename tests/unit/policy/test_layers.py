"""Which layers a machine runs, decided from a record of the machine."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.model_shape import MixtureShape, ModelShape
from prefixrl_mcore.config.policy import PolicyConfig
from prefixrl_mcore.policy.layers import (
    Layers,
    Machine,
    check_equal_layers,
    choose_layers,
    describe_machine,
)
from tests.support.shapes import SMALL

LAPTOP = Machine(compute_capability=None, te_version=None, has_apex_kernel=False, has_flash=False)
H100 = Machine(compute_capability=(9, 0), te_version=(2, 14), has_apex_kernel=False, has_flash=True)
H100_WITHOUT_TE = replace(H100, te_version=None)

DENSE = replace(
    SMALL,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=100,
)
MIXTURE = replace(
    DENSE, mixture=MixtureShape(num_experts=4, num_experts_per_token=2, is_renormalized=True)
)


def choose(machine: Machine, shape: ModelShape = DENSE, **policy: Any) -> Layers:
    return choose_layers(PolicyConfig.model_validate(policy), shape, machine)


@pytest.mark.parametrize(
    ("machine", "policy", "expected", "reasons"),
    [
        pytest.param(
            LAPTOP,
            {},
            ("local", "sdpa", False),
            ("there is no CUDA device", "there is no CUDA device", "need apex's"),
            id="laptop",
        ),
        pytest.param(
            H100,
            {},
            ("transformer_engine", "transformer_engine", True),
            ("version 2.14 and CUDA are there", "of its layer spec", "its kernel is there"),
            id="te",
        ),
        pytest.param(
            H100_WITHOUT_TE,
            {},
            ("local", "varlen", False),
            ("transformer_engine cannot be imported", "flash attention over", "need apex's"),
            id="no te",
        ),
        pytest.param(
            replace(H100, te_version=(2, 7)),
            {},
            ("local", "varlen", False),
            ("transformer_engine is 2.7, at least 2.8 is needed", "", ""),
            id="old te",
        ),
        pytest.param(
            replace(H100_WITHOUT_TE, has_apex_kernel=True),
            {},
            ("local", "varlen", True),
            ("", "", "its kernel is there"),
            id="apex",
        ),
        pytest.param(
            H100,
            {"layer_spec": "local", "gradient_accumulation_fusion": False},
            ("local", "varlen", False),
            ("asked for", "", "asked for"),
            id="local asked for",
        ),
        pytest.param(
            H100,
            {"dtype": "float32"},
            ("local", "sdpa", False),
            ("its attention is 16-bit", "flash attention is 16-bit", ""),
            id="float32",
        ),
        pytest.param(
            H100_WITHOUT_TE,
            {"parallel": {"context_parallel_size": 2}},
            ("local", "sdpa", False),
            ("", "context parallelism gathers", ""),
            id="context parallelism",
        ),
        pytest.param(
            replace(H100_WITHOUT_TE, compute_capability=(7, 5)),
            {},
            ("local", "sdpa", False),
            ("", "compute capability 7.5 is below 8.0", ""),
            id="turing",
        ),
        pytest.param(
            replace(H100_WITHOUT_TE, has_flash=False),
            {},
            ("local", "sdpa", False),
            ("", "built without flash attention", ""),
            id="no flash",
        ),
    ],
)
def test_the_choice_and_its_reasons(
    machine: Machine,
    policy: dict[str, Any],
    expected: tuple[str, str, bool],
    reasons: tuple[str, str, str],
) -> None:
    layers = choose(machine, **policy)
    assert (layers.spec, layers.attention, layers.fuses_weight_gradients) == expected
    for line, reason in zip(layers.reasons, reasons, strict=True):
        assert reason in line


@pytest.mark.parametrize("width", [20, 264])
def test_heads_that_flash_attention_does_not_take_get_the_padded_layout(width: int) -> None:
    layers = choose(H100_WITHOUT_TE, replace(DENSE, kv_channels=width))
    assert layers.attention == "sdpa"
    assert f"heads of {width} channels" in layers.reasons[1]


PRECISION_AWARE = {"use_distributed_optimizer": True, "use_precision_aware_optimizer": True}


@pytest.mark.parametrize(
    ("machine", "policy", "message"),
    [
        (LAPTOP, {"layer_spec": "transformer_engine"}, "cannot run here: there is no CUDA device"),
        (
            H100_WITHOUT_TE,
            {"layer_spec": "transformer_engine"},
            "cannot run here: transformer_engine cannot be imported",
        ),
        (H100_WITHOUT_TE, {"fp8": "hybrid"}, "got the local ones: transformer_engine cannot be"),
        (
            replace(H100, compute_capability=(8, 0)),
            {"fp8": "e4m3"},
            "needs compute capability 8.9, this GPU has 8.0",
        ),
        (H100, {"fp8": "hybrid", "fp8_recipe": "mxfp8"}, "needs compute capability 10.0"),
        (
            LAPTOP,
            {"optimizer": {**PRECISION_AWARE, "cpu_offload": True}},
            "cpu_offload cannot run here: there is no CUDA device",
        ),
        (
            H100_WITHOUT_TE,
            {"optimizer": PRECISION_AWARE},
            "needs Transformer Engine's FusedAdam, and transformer_engine cannot be imported",
        ),
        (
            H100,
            {"layer_spec": "local", "gradient_accumulation_fusion": True},
            "fusion = true cannot run here: the local layers need apex's",
        ),
        (
            replace(LAPTOP, has_apex_kernel=True),
            {"gradient_accumulation_fusion": True},
            "fusion = true cannot run here",
        ),
        (
            H100,
            {"recompute": "selective", "recompute_modules": ["layernorm"]},
            "have no 'layernorm' of their own",
        ),
    ],
)
def test_what_the_machine_cannot_run_is_refused_with_the_reason(
    machine: Machine, policy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(machine, **policy)


@pytest.mark.parametrize(
    ("machine", "shape", "policy"),
    [
        (H100, DENSE, {"fp8": "hybrid"}),
        (replace(H100, compute_capability=(8, 9)), DENSE, {"fp8": "hybrid"}),
        (H100, DENSE, {"optimizer": PRECISION_AWARE}),
        (H100_WITHOUT_TE, DENSE, {"optimizer": {**PRECISION_AWARE, "cpu_offload": True}}),
        (H100, MIXTURE, {"recompute": "selective", "recompute_modules": ["layernorm", "moe"]}),
        (LAPTOP, DENSE, {"recompute": "selective", "recompute_modules": ["layernorm"]}),
    ],
)
def test_what_the_machine_can_run_is_taken(
    machine: Machine, shape: ModelShape, policy: dict[str, Any]
) -> None:
    choose(machine, shape, **policy)


def test_padding_is_cut_as_the_attention_likes_it() -> None:
    assert [choose(LAPTOP).padding_length(multiple) for multiple in (1, 4)] == [1, 4]
    assert [choose(H100).padding_length(multiple) for multiple in (1, 4, 12)] == [128, 128, 132]


def test_ranks_with_other_layers_are_refused_and_named() -> None:
    with_te, without = choose(H100), choose(H100_WITHOUT_TE)
    older = choose(replace(H100, te_version=(2, 9)))
    assert older.reasons != with_te.reasons
    check_equal_layers([with_te, older, with_te])  # other reasons, the same layers
    with pytest.raises(ConfigError) as refusal:
        check_equal_layers([with_te, without, older, without])
    message = str(refusal.value)
    assert "ranks [0, 2]: layer spec transformer_engine: version 2.14 and CUDA are there" in message
    assert "ranks [1, 3]: layer spec local: transformer_engine cannot be imported" in message


def test_this_machine_is_described() -> None:
    machine = describe_machine()
    if torch.cuda.is_available():
        assert machine.compute_capability == torch.cuda.get_device_capability()
    else:
        assert machine.compute_capability is None
