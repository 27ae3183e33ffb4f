"""Which GPUs of a machine the servers get that are started there, beside the trainer's ranks.

Starting, ``prefixrl check`` and ``prefixrl launch`` all call what is here, so that they refuse the
same configs; nothing here imports torch. Only a start can see whether SGLang is there: with
``rollout.engine`` left out the others take it to be.
"""

from prefixrl_mcore.config.base import ConfigError
from prefixrl_mcore.config.rollout import RolloutConfig, SGLangConfig


def check_server_gpus(rollout: RolloutConfig, *, num_trainer_ranks: int, num_gpus: int) -> None:
    """Refuse a run whose trainer and servers need more GPUs than rank 0's machine has.

    Args:
        rollout: the engine, and its servers if they are started there.
        num_trainer_ranks: ranks on that machine.
        num_gpus: its GPUs.

    Raises:
        ConfigError: with the arithmetic.
    """
    if rollout.starts_servers:
        server_gpus(
            rollout.sglang,
            colocated=rollout.colocated,
            num_trainer_ranks=num_trainer_ranks,
            num_gpus=num_gpus,
        )


def server_gpus(
    servers: SGLangConfig, *, colocated: bool, num_trainer_ranks: int, num_gpus: int
) -> list[range]:
    """Return the numbers of each server's GPUs on the machine that starts them.

    Trainer ranks have the first GPUs, one each. The servers have those after them, or, if they
    are colocated, the first ones too.

    Args:
        servers: how many, of how many GPUs.
        colocated: they take turns with the trainer (``rollout.colocated``).
        num_trainer_ranks: ranks on this machine; 0 where nothing is trained.
        num_gpus: GPUs of this machine.

    Raises:
        ConfigError: if there are too few, with the arithmetic.
    """
    size, number = servers.tensor_parallel_size, servers.num_servers
    first = 0 if colocated else num_trainer_ranks
    wanted = first + number * size
    if wanted > num_gpus:
        needs, remedy = f"{number} servers x TP {size}", ""
        if first:
            needs = f"{first} trainer ranks + {needs}"
            remedy = (
                "set rollout.colocated = true (both take turns on the same GPUs) or "
                'rollout.engine = "transformers" (which samples on rank 0\'s, slowly), '
            )
        raise ConfigError(
            f"rollout.sglang: {needs} = {wanted} GPUs, but the node of rank 0, which starts the "
            f"servers, has {num_gpus}; {remedy}lower num_servers or tensor_parallel_size, or put "
            "servers on nodes of their own (prefixrl launch --shape split, or rollout.sglang.urls)"
        )
    return [range(first + i * size, first + (i + 1) * size) for i in range(number)]
