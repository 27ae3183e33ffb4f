"""An update with a KL term against another model, in any layout."""

from pathlib import Path

import numpy as np

from prefixrl_mcore.config.policy import LossConfig, OptimizerConfig, ParallelConfig
from prefixrl_mcore.data.packing import PackedBatch
from prefixrl_mcore.policy import cpu_runtime
from prefixrl_mcore.policy.policy import MegatronPolicy
from prefixrl_mcore.records import UpdateResult
from tests.support.layouts import ADAM_EPS, batch_for
from tests.support.policies import NO_CLIPPING, build_policy, max_difference, weights_of


def kl_loss(folder: Path, kl: str = "k3") -> LossConfig:
    """Return REINFORCE with a KL term against the model in ``folder``."""
    return LossConfig.model_validate({"kl": kl, "kl_coefficient": 0.5, "reference_path": folder})


@cpu_runtime.megatron_on_cpu()
def reference_logprobs(policy: MegatronPolicy, batch: PackedBatch) -> list[np.ndarray] | None:
    """Return the reference's logprobs of this rank's rows, as an update asks for them."""
    return policy._passes.reference_logprobs(batch)


def update_twice(
    _rank: int,
    folder: Path,
    reference: Path,
    parallel: ParallelConfig,
    distributed: bool,
    recompute: str = "none",
    experts: str | None = None,
) -> list[UpdateResult]:
    """Return two updates, having seen that the reference leaves the weights as they were."""
    policy = build_policy(
        folder,
        parallel=parallel,
        loss=kl_loss(reference),
        recompute=recompute,
        experts=experts,
        optimizer=OptimizerConfig(
            lr=1e-3,
            eps=ADAM_EPS,
            clip_grad=NO_CLIPPING,
            use_distributed_optimizer=distributed,
        ),
    )
    batch = batch_for(parallel)
    before = weights_of(policy)
    reference_logprobs(policy, batch)
    assert max_difference(before, weights_of(policy)) == 0.0
    results = [policy.update(batch), policy.update(batch)]
    assert all(np.isfinite(result.loss) for result in results)
    return results
