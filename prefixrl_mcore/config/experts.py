"""How the experts of a mixture are computed and kept in balance."""

from typing import Literal

from pydantic import Field, model_validator

from prefixrl_mcore.config.base import Config

ExpertsImplementation = Literal["grouped", "sequential"]


class ExpertsConfig(Config):
    """Settings of mixture-of-experts layers; a dense model takes the defaults only."""

    implementation: ExpertsImplementation | None = None
    """``grouped`` computes all experts of a rank in one grouped matrix product, ``sequential`` one
    after the other; the numbers, weights and checkpoints are the same. None is ``grouped`` for
    bfloat16 on a GPU, where it is fast, otherwise ``sequential``; the choice is logged."""

    aux_loss_coefficient: float = Field(default=0.0, ge=0.0)
    """Weight of the load-balancing loss, beside the policy's; 0 is none. The loss is a sum over
    layers and a mean over real tokens (context and completion; padding does not count), whatever
    part of them is trained on."""

    aux_loss_type: Literal["aux_loss", "global_aux_loss"] = "aux_loss"
    """Tokens that are to be balanced, by Megatron's names: those of a stream (``aux_loss``; depends
    on the packing), or of all streams of the update so far, of all data-parallel ranks
    (``global_aux_loss``; depends on their order). Megatron's ``seq_aux_loss`` is the former here:
    a stream is one sequence to it."""

    z_loss_coefficient: float = Field(default=0.0, ge=0.0)
    """Weight of the mean squared log-sum-exp of the router's logits, summed over layers; keeps them
    small. 0 is none."""

    @model_validator(mode="after")
    def _a_balance_loss_has_a_coefficient(self) -> "ExpertsConfig":
        if self.aux_loss_coefficient == 0.0 and self.aux_loss_type != "aux_loss":
            raise ValueError(
                f"policy.experts.aux_loss_type = {self.aux_loss_type!r} is used with "
                "aux_loss_coefficient only, got 0; set the coefficient or leave the type out"
            )
        return self
