"""Places among ranks, for code that asks for nothing but the place."""

import torch

from prefixrl_mcore.policy.topology import Topology

ONE_RANK = Topology(
    rank=0,
    world_size=1,
    tp_rank=0,
    tp_size=1,
    pp_rank=0,
    pp_size=1,
    cp_rank=0,
    cp_size=1,
    ep_size=1,
    etp_size=1,
    dp_rank=0,
    dp_size=1,
    device=torch.device("cpu"),
)
