"""Which layers this machine runs: Megatron's local ones or Transformer Engine's, and what in them.

A config says what it wants or leaves it open; the machine says what it can. ``choose_layers`` puts
the two together, once, before anything is built, and every choice has a reason that is logged. It
is a pure function of a record of the machine, so that it is tested without one.
"""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.utils import get_te_version

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import LayerSpec, PolicyConfig
from prefixrl_mcore.config.precision import recomputed_modules

logger = logging.getLogger(__name__)

Attention = Literal["transformer_engine", "varlen", "sdpa"]
"""Attention over packed sequences: Transformer Engine's; torch's flash attention over sequences of
any length; torch's scaled dot-product attention on the padded layout of ``packed.py``."""

MIN_TE_VERSION = (2, 8)
"""Oldest Transformer Engine whose source was read for this."""

_FLASH_BLOCK = 128

_MAX_FLASH_WIDTH = 256
"""Widest head of torch's flash attention; widths are multiples of 8."""

_FP8_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Per FP8 recipe, the least compute capability."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the layers may run on."""

    compute_capability: tuple[int, int] | None
    """Of the GPU; None where there is none."""

    te_version: tuple[int, int] | None
    """Of Transformer Engine; None where it cannot be imported."""

    has_apex_kernel: bool
    """apex's fused weight gradient (``fused_weight_gradient_mlp_cuda``) can be imported."""

    has_flash: bool
    """This torch was built with flash attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """What was chosen."""

    spec: LayerSpec
    """Whose layers."""

    attention: Attention
    """Whose attention; under context parallelism the local one gathers keys (``context.py``)."""

    fuses_weight_gradients: bool
    """Weight gradients are added to the float32 buffer inside the matrix product."""

    reasons: tuple[str, ...]
    """One line per choice."""

    def padding_length(self, sequence_multiple: int) -> int:
        """Return the tokens of the sequences that a stream's padding is cut into.

        The shorter, the less attention: but flash attention computes blocks of 128 tokens, and
        its backward pass has work space for one more block of each sequence.

        Args:
            sequence_multiple: what every sequence is a multiple of.
        """
        if self.attention == "sdpa":
            return sequence_multiple
        return -(-_FLASH_BLOCK // sequence_multiple) * sequence_multiple


def describe_machine() -> Machine:
    """Return what this process can use; touches no GPU memory."""
    has_cuda = torch.cuda.is_available()
    return Machine(
        compute_capability=torch.cuda.get_device_capability() if has_cuda else None,
        te_version=_te_version(),
        has_apex_kernel=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        has_flash=torch.backends.cuda.is_flash_attention_available(),
    )


def choose_layers(policy: PolicyConfig, shape: ModelShape, machine: Machine) -> Layers:
    """Return the layers for a model on a machine.

    Raises:
        ConfigError: if the config asks for something that the machine cannot run.
    """
    spec, spec_reason = _choose_spec(policy, machine)
    _check_fp8(policy, spec, spec_reason, machine)
    _check_recompute(policy, shape, spec)
    _check_optimizer(policy, machine)
    attention, attention_reason = _choose_attention(policy, shape, spec, machine)
    fuses, fusion_reason = _choose_fusion(policy, spec, machine)
    return Layers(
        spec=spec,
        attention=attention,
        fuses_weight_gradients=fuses,
        reasons=(
            f"layer spec {spec}: {spec_reason}",
            f"attention {attention}: {attention_reason}",
            f"gradient accumulation fusion {'on' if fuses else 'off'}: {fusion_reason}",
        ),
    )


def log_layers(layers: Layers) -> None:
    """Log every choice with its reason."""
    for reason in layers.reasons:
        logger.info("%s", reason)


def check_equal_layers(by_rank: Sequence[Layers]) -> None:
    """Refuse ranks that would not run the same layers: their machines are not alike.

    Args:
        by_rank: what every rank has chosen.

    Raises:
        ConfigError: with the choices and their reasons, equally on every rank.
    """
    ranks: dict[tuple[str, ...], list[int]] = {}
    reasons: dict[tuple[str, ...], str] = {}
    for rank, layers in enumerate(by_rank):
        choice = (layers.spec, layers.attention, str(layers.fuses_weight_gradients))
        ranks.setdefault(choice, []).append(rank)
        reasons.setdefault(choice, "; ".join(layers.reasons))
    if len(ranks) > 1:
        found = " | ".join(
            f"ranks {numbers}: {reasons[choice]}" for choice, numbers in ranks.items()
        )
        raise ConfigError(
            "policy: every rank must run the same layers, but their machines differ, got "
            f"{found}; set policy.layer_spec and policy.gradient_accumulation_fusion, or install "
            "the same software on every node"
        )


def _te_version() -> tuple[int, int] | None:
    """Return major and minor version of Transformer Engine; None where it cannot be imported."""
    if not HAVE_TE:
        return None
    version = get_te_version()
    return version.major, version.minor


def _choose_spec(policy: PolicyConfig, machine: Machine) -> tuple[LayerSpec, str]:
    """Return whose layers, and why."""
    obstacle = _te_obstacle(machine)
    if policy.layer_spec == "transformer_engine" and obstacle:
        raise ConfigError(
            f"policy.layer_spec = 'transformer_engine' cannot run here: {obstacle}; install the "
            "extra 'te' on a machine with a GPU, or leave layer_spec out"
        )
    if policy.layer_spec is not None:
        return policy.layer_spec, "asked for"
    if obstacle is None and policy.dtype != "bfloat16":
        obstacle = f"policy.dtype is {policy.dtype!r}, its attention is 16-bit"
    if obstacle:
        return "local", obstacle
    return "transformer_engine", f"version {_dotted(machine.te_version)} and CUDA are there"


def _te_obstacle(machine: Machine) -> str | None:
    """Return why Transformer Engine cannot run here; None if it can."""
    if machine.compute_capability is None:
        return "there is no CUDA device"
    if machine.te_version is None:
        return "transformer_engine cannot be imported"
    if machine.te_version < MIN_TE_VERSION:
        return (
            f"transformer_engine is {_dotted(machine.te_version)}, at least "
            f"{_dotted(MIN_TE_VERSION)} is needed"
        )
    return None


def _check_fp8(policy: PolicyConfig, spec: LayerSpec, reason: str, machine: Machine) -> None:
    """Refuse FP8 where its matrix products are missing."""
    if policy.fp8 is None:
        return
    if spec != "transformer_engine":
        raise ConfigError(
            f"policy.fp8 = {policy.fp8!r} needs Transformer Engine's layers, got the local ones: "
            f"{reason}; leave fp8 out"
        )
    needed = _FP8_CAPABILITY[policy.fp8_recipe]
    if machine.compute_capability is None or machine.compute_capability < needed:
        raise ConfigError(
            f"policy.fp8_recipe = {policy.fp8_recipe!r} needs compute capability "
            f"{_dotted(needed)}, this GPU has {_dotted(machine.compute_capability)}; choose "
            "another recipe or leave fp8 out"
        )
    if policy.fp8_recipe == "delayed":
        logger.warning(
            "policy.fp8_recipe = 'delayed': a resumed run begins its scales anew and is not bit "
            "for bit the undisturbed one; 'tensorwise' has no history"
        )


def _check_recompute(policy: PolicyConfig, shape: ModelShape, spec: LayerSpec) -> None:
    """Refuse recomputation of norms that are part of the next matrix product."""
    if (
        spec == "transformer_engine"
        and shape.mixture is None
        and "layernorm" in recomputed_modules(policy, shape)
    ):
        raise ConfigError(
            "policy.recompute_modules: Transformer Engine's layers of a dense model have no "
            "'layernorm' of their own (it is fused into the next matrix product); leave it out"
        )


def _check_optimizer(policy: PolicyConfig, machine: Machine) -> None:
    """Refuse optimizers that cannot run here."""
    optimizer = policy.optimizer
    if optimizer.cpu_offload and machine.compute_capability is None:
        raise ConfigError(
            "policy.optimizer.cpu_offload cannot run here: there is no CUDA device, so that all "
            "state is in host memory already; leave it out"
        )
    if optimizer.use_precision_aware_optimizer and not optimizer.cpu_offload:
        obstacle = _te_obstacle(machine)
        if obstacle:
            raise ConfigError(
                "policy.optimizer.use_precision_aware_optimizer cannot run here: it needs "
                f"Transformer Engine's FusedAdam, and {obstacle}; leave it out"
            )


def _choose_attention(
    policy: PolicyConfig, shape: ModelShape, spec: LayerSpec, machine: Machine
) -> tuple[Attention, str]:
    """Return whose attention, and why."""
    if spec == "transformer_engine":
        return "transformer_engine", "of its layer spec"
    obstacle = None
    if machine.compute_capability is None:
        obstacle = "there is no CUDA device"
    elif machine.compute_capability < (8, 0):
        obstacle = f"compute capability {_dotted(machine.compute_capability)} is below 8.0"
    elif not machine.has_flash:
        obstacle = "this torch was built without flash attention"
    elif policy.dtype != "bfloat16":
        obstacle = f"flash attention is 16-bit, policy.dtype is {policy.dtype!r}"
    elif shape.kv_channels % 8 or shape.kv_channels > _MAX_FLASH_WIDTH:
        obstacle = (
            f"heads of {shape.kv_channels} channels, flash attention takes multiples of 8 up to "
            f"{_MAX_FLASH_WIDTH}"
        )
    elif policy.parallel.context_parallel_size > 1:
        obstacle = "context parallelism gathers keys and values"
    if obstacle:
        return "sdpa", obstacle
    return "varlen", "torch's flash attention over sequences of any length"


def _choose_fusion(policy: PolicyConfig, spec: LayerSpec, machine: Machine) -> tuple[bool, str]:
    """Return whether weight gradients are fused, and why."""
    has_kernel = spec == "transformer_engine" or (
        machine.compute_capability is not None and machine.has_apex_kernel
    )
    missing = "the local layers need apex's fused_weight_gradient_mlp_cuda and CUDA"
    if policy.gradient_accumulation_fusion is None:
        return has_kernel, "its kernel is there" if has_kernel else missing
    if policy.gradient_accumulation_fusion and not has_kernel:
        raise ConfigError(
            f"policy.gradient_accumulation_fusion = true cannot run here: {missing}; leave it out"
        )
    return policy.gradient_accumulation_fusion, "asked for"


def _dotted(version: tuple[int, int] | None) -> str:
    """Return (9, 0) as ``9.0``."""
    return "none" if version is None else ".".join(map(str, version))
