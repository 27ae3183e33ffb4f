"""Host memory of one trainer rank, predicted: what leaves the GPU for a while, or lives beside it.

Symbols are those of ``memory.py``. Python itself, the rollout engine and the batch are not counted.
"""

from dataclasses import dataclass

from prefixrl_mcore.accounting.parameters import rank_parameters, stepped_parameters
from prefixrl_mcore.config.model_shape import ModelShape
from prefixrl_mcore.config.policy import PolicyConfig

_STATE_BYTES = 12
"""Main weight and two moments, float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Bytes on one rank's host."""

    reference: float
    """``2 w P`` with a KL term: the reference's weights, and the policy's while they change
    places."""

    offloaded: float
    """``12 P / replicas`` times ``cpu_offload_fraction``, with ``cpu_offload``."""

    save: float
    """While a save is prepared, on the replica that writes: ``2 s P``, each tensor being copied
    twice. With the distributed optimizer ``36 P`` on every rank: its state gathered, padded and cut
    into the model's tensors."""

    written: float
    """The part of ``save`` that stays until it is on disk, also beside the next steps: ``s P`` with
    ``s`` the bytes of weight and state, ``w + 12`` (float32: 12, and 16 with the distributed
    optimizer, which saves main weights of its own)."""

    @property
    def total(self) -> float:
        """The peak, in a save."""
        return self.reference + self.offloaded + self.save


def estimate_host(shape: ModelShape, policy: PolicyConfig, *, has_reference: bool) -> HostMemory:
    """Return the host memory of the rank that needs most; the layout must have passed the checks.

    Args:
        shape: the model.
        policy: precision, layout, optimizer.
        has_reference: there is a KL term.
    """
    parallel, optimizer = policy.parallel, policy.optimizer
    stages = range(parallel.pipeline_model_parallel_size)
    parameters = max(
        (rank_parameters(shape, parallel, stage) for stage in stages), key=lambda p: p.total
    )
    stepped = stepped_parameters(policy, parameters)
    width = policy.weight_bytes
    is_sharded = optimizer.use_distributed_optimizer
    saved_bytes = _STATE_BYTES
    if policy.dtype == "bfloat16" or is_sharded:
        saved_bytes += width  # else the weights are the main weights
    written = saved_bytes * parameters.total
    offloaded_fraction = optimizer.cpu_offload_fraction if optimizer.cpu_offload else 0.0
    return HostMemory(
        reference=2 * width * parameters.total if has_reference else 0.0,
        offloaded=_STATE_BYTES * stepped * offloaded_fraction,
        save=3 * _STATE_BYTES * parameters.total if is_sharded else 2 * written,
        written=written,
    )
