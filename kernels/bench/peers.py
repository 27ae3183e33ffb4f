"""Other people's heads, each called as its documentation says, with its own defaults.

All are packages of their own; one that is missing is recorded as not installed. Peers that know no
weights per token get advantages of one, which is what everything here computes. A peer that is
given a whole batch is told by ``ignore_index``, or by a mask, which rows carry no loss.

Kernels that exist only inside another project's source tree (verl, flash-attention, RL-Kernel) are
not here: nothing is copied.
"""

import atexit
import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from bench.cases import IGNORE_INDEX, Inputs
from bench.implementation import (
    PASSES,
    Implementation,
    NotInstalledError,
    Outputs,
    Pass,
    Runner,
    bfloat16_logit_bounds,
)
from bench.reference import Errors

_LOW_PRECISION_BOUND = 0.15
"""Relative error of gradients that are summed in bfloat16, or from which terms are left out."""

_QUACK_CHUNK_ROWS = 4096
_QUACK_ROW_MULTIPLE = 8


def load(module: str) -> ModuleType:
    """Import a peer's module.

    Raises:
        NotInstalledError: if its package is missing; other failures to import are passed on.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            raise NotInstalledError(f"{error.name} is not installed") from error
        raise


class _MaskedRunner(Runner):
    """What peers without ``ignore_index`` need: safe targets and a weight per row."""

    def __init__(self, inputs: Inputs) -> None:
        """Replace the targets of inactive rows, and weigh those rows with zero."""
        super().__init__(inputs)
        is_active_R = inputs.targets_R != IGNORE_INDEX
        self.safe_targets_R = inputs.targets_R.clamp(min=0)
        self.weights_R = is_active_R.float()
        self._active_rows = inputs.active_rows.to(inputs.targets_R.device)

    def mean(self, logprobs_R: Tensor) -> Tensor:
        """Return the mean negative logprob of the active rows."""
        return -(logprobs_R * self.weights_R).sum() / self.inputs.num_active

    def active(self, values_R: Tensor) -> Tensor:
        """Return the values of the active rows."""
        return values_R[self._active_rows]


class Materialized(_MaskedRunner):
    """Plain PyTorch: all logits at once, ``log_softmax`` in float32, ``gather``."""

    def __init__(self, inputs: Inputs, *, is_compiled: bool) -> None:
        """Compile for this size alone, where asked."""
        super().__init__(inputs)
        self._compute = _target_logprobs
        if is_compiled:
            self._compute = torch.compile(_target_logprobs, dynamic=False)

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the mean negative logprob."""
        return self.mean(self._compute(hidden_RH, weight_VH, self.safe_targets_R))

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        """Return the [A] logprobs."""
        inputs = self.inputs
        return self.active(
            self._compute(inputs.hidden_RH, inputs.weight_VH, self.safe_targets_R).float()
        )


def _target_logprobs(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    """Return [R] float32 logprobs; without a float32 copy of the logits, where PyTorch can."""
    logits_RV = torch.nn.functional.linear(hidden_RH, weight_VH)
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1, dtype=torch.float32)
    return logprobs_RV.gather(1, targets_R[:, None])[:, 0]


class LigerCrossEntropy(Runner):
    """Liger's fused linear cross entropy."""

    def __init__(self, inputs: Inputs, *, accum_dtype: torch.dtype | None) -> None:
        """Build the loss; ``accum_dtype`` is the precision in which it sums the weight's grad."""
        super().__init__(inputs)
        module = load("liger_kernel.transformers.fused_linear_cross_entropy")
        build = partial(
            module.LigerFusedLinearCrossEntropyLoss,
            ignore_index=IGNORE_INDEX,
            accum_dtype=accum_dtype,
        )
        self._mean, self._per_row = build(reduction="mean"), build(reduction="none")

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the mean negative logprob."""
        return self._mean(weight_VH, hidden_RH, self.inputs.targets_R)

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        """Return the [A] logprobs, by its per-row form."""
        inputs = self.inputs
        losses_R = self._per_row(inputs.weight_VH, inputs.hidden_RH, inputs.targets_R)
        return -losses_R[inputs.active_rows.to(losses_R.device)]


class LigerGrpo(_MaskedRunner):
    """Liger's fused linear GRPO loss: one sequence, advantage one, no KL term.

    Its value is the surrogate, not the negative logprob; its gradient is the same.
    """

    def __init__(self, inputs: Inputs) -> None:
        """Build the loss."""
        super().__init__(inputs)
        module = load("liger_kernel.chunked_loss")
        self._loss = module.LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, loss_type="dapo"
        )
        self._advantages = torch.ones(1, device=inputs.hidden_RH.device)

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the surrogate."""
        loss, *_ = self._loss(
            hidden_RH[None],
            weight_VH,
            self.safe_targets_R[None],
            self.weights_R[None],
            self._advantages,
            num_items_in_batch=self.inputs.num_active,
        )
        return loss

    def forward_backward(self) -> Outputs:
        """Return the gradients; the value is another one."""
        return replace(super().forward_backward(), loss=None)


class CutCrossEntropy(Runner):
    """Apple's cut cross entropy."""

    def __init__(self, inputs: Inputs, *, is_exact: bool) -> None:
        """Choose whether gradients below a threshold are left out, as they are by default."""
        super().__init__(inputs)
        compute = load("cut_cross_entropy").linear_cross_entropy
        self._compute: Callable[..., Tensor] = partial(
            compute, ignore_index=IGNORE_INDEX, **({"filter_eps": None} if is_exact else {})
        )

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the mean negative logprob."""
        return self._compute(hidden_RH, weight_VH, self.inputs.targets_R)

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        """Return the [A] logprobs, by its per-row form."""
        inputs = self.inputs
        losses_R = self._compute(
            inputs.hidden_RH, inputs.weight_VH, inputs.targets_R, reduction="none"
        )
        return -losses_R[inputs.active_rows.to(losses_R.device)]


class MegatronFused(_MaskedRunner):
    """Megatron-core's fused vocabulary-parallel cross entropy, with a group of one rank.

    Inactive rows are multiplied by zero after the loss, as Megatron's loss mask does.
    """

    def __init__(self, inputs: Inputs) -> None:
        """Start a process group of one, once per process."""
        super().__init__(inputs)
        module = load("megatron.core.fusions.fused_cross_entropy")
        self._compute = module.fused_vocab_parallel_cross_entropy
        _start_single_rank(inputs.hidden_RH.device)

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the mean negative logprob."""
        return self.mean(self._logprobs(hidden_RH, weight_VH))

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        """Return the [A] logprobs."""
        return self.active(self._logprobs(self.inputs.hidden_RH, self.inputs.weight_VH))

    def _logprobs(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        logits_RV = torch.nn.functional.linear(hidden_RH, weight_VH)
        losses_R1 = self._compute(
            logits_RV[:, None], self.safe_targets_R[:, None], dist.group.WORLD
        )
        return -losses_R1[:, 0]


def _start_single_rank(device: torch.device) -> None:
    """Initialise a process group of one rank, unless there is one."""
    if dist.is_initialized():
        return
    is_cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=dist.HashStore(),
        rank=0,
        world_size=1,
        device_id=device if is_cuda else None,
    )
    atexit.register(dist.destroy_process_group)


class Quack(Runner):
    """QuACK's chunked linear cross entropy; it chooses its own pipeline.

    It wants a multiple of eight rows: ignored ones are appended before the clock starts.
    """

    def __init__(self, inputs: Inputs) -> None:
        """Pad the rows."""
        self._compute = load("quack.linear_cross_entropy").chunked_linear_cross_entropy
        self._num_rows = inputs.hidden_RH.size(0)
        super().__init__(_pad(inputs, _QUACK_ROW_MULTIPLE))

    def loss(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        """Return the mean negative logprob."""
        return self._compute(
            hidden_RH, weight_VH, self.inputs.targets_R, chunk_size=_QUACK_CHUNK_ROWS
        )

    def forward_backward(self) -> Outputs:
        """Return loss and gradients, without the padding."""
        outputs = super().forward_backward()
        return replace(outputs, grad_hidden_RH=outputs.grad_hidden_RH[: self._num_rows])


def _pad(inputs: Inputs, multiple: int) -> Inputs:
    """Return the inputs with ignored rows appended."""
    missing = -inputs.hidden_RH.size(0) % multiple
    if not missing:
        return inputs
    zeros_RH = inputs.hidden_RH.new_zeros(missing, inputs.hidden_RH.size(1))
    ignored_R = inputs.targets_R.new_full((missing,), IGNORE_INDEX)
    return replace(
        inputs,
        hidden_RH=torch.cat((inputs.hidden_RH, zeros_RH)),
        targets_R=torch.cat((inputs.targets_R, ignored_R)),
    )


def _low_precision_bounds(max_abs_logit: float) -> Errors:
    """Bounds for bfloat16 logits and gradients summed in bfloat16 or cut at a threshold."""
    return replace(
        bfloat16_logit_bounds(max_abs_logit),
        hidden_relative=_LOW_PRECISION_BOUND,
        weight_relative=_LOW_PRECISION_BOUND,
    )


def peers() -> list[Implementation]:
    """Return every peer, installed or not."""
    bounds, low = bfloat16_logit_bounds, _low_precision_bounds
    liger, cut, megatron = "liger-kernel", "cut-cross-entropy", "megatron-core"
    return [
        _peer("torch-eager", partial(Materialized, is_compiled=False), bounds, "torch"),
        _peer(
            "torch-compile", partial(Materialized, is_compiled=True), bounds, "torch", on_cpu=False
        ),
        _peer("liger", partial(LigerCrossEntropy, accum_dtype=None), low, liger),
        _peer(
            "liger-fp32-accum", partial(LigerCrossEntropy, accum_dtype=torch.float32), bounds, liger
        ),
        _peer("liger-grpo", LigerGrpo, bounds, liger, passes=("forward_backward",)),
        _peer("cce", partial(CutCrossEntropy, is_exact=False), low, cut, on_cpu=False),
        _peer("cce-exact", partial(CutCrossEntropy, is_exact=True), low, cut, on_cpu=False),
        _peer("megatron-fused", MegatronFused, bounds, megatron),
        _peer("quack", Quack, bounds, "quack-kernels", on_cpu=False),
    ]


def _peer(
    name: str,
    prepare: Callable[[Inputs], Runner],
    bounds: Callable[[float], Errors],
    package: str,
    *,
    passes: tuple[Pass, ...] = PASSES,
    on_cpu: bool = True,
) -> Implementation:
    """Describe one peer."""
    return Implementation(
        name=name,
        family="peer",
        prepare=prepare,
        package=package,
        passes=passes,
        runs_on_cpu=on_cpu,
        bounds=bounds,
    )
