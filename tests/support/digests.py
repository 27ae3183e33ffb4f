"""What servers report of their weights, worked out here."""

from torch import Tensor

from prefixrl_mcore.rollout.weight_sync.digests import GpuDigest


def gpu_digest(*pieces: Tensor) -> str:
    """Return what a server on GPUs reports of a weight that comes in pieces."""
    digest = GpuDigest()
    for piece in pieces:
        digest.update(piece)
    return digest.value()
