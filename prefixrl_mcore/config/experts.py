"""How the experts of a mixture are computed and kept in balance."""

from typing import Literal

from prefixrl_mcore.config.base import Config

ExpertsImplementation = Literal["grouped", "sequential"]


class ExpertsConfig(Config):
    """Settings of mixture-of-experts layers; a dense model takes the defaults only."""

    implementation: ExpertsImplementation | None = None
    """``grouped`` computes all experts of a rank in one grouped matrix product, ``sequential`` one
    after the other; the numbers, weights and checkpoints are the same. None is ``grouped`` for
    bfloat16 on a GPU, where it is fast, otherwise ``sequential``; the choice is logged."""
