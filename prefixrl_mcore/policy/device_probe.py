"""Computes on each GPU of a node once: ``python -m prefixrl_mcore.policy.device_probe``.

Prints one JSON object. A process of its own, because a broken GPU may kill it or hang it.
"""

import json
import sys
from typing import Any

import torch
from torch.cuda import nccl

_SIZE = 1024
"""A power of two, so that the product of matrices of ones is exact in bfloat16."""


def probe() -> dict[str, Any]:
    """Return versions, the number of GPUs, and what went wrong on which."""
    faults = {}
    for index in range(torch.cuda.device_count()):
        try:
            ones_SS = torch.ones(_SIZE, _SIZE, dtype=torch.bfloat16, device=f"cuda:{index}")
            total = (ones_SS @ ones_SS).float().sum().item()
        except RuntimeError as error:  # what CUDA raises
            faults[index] = str(error).splitlines()[0]
            continue
        if total != _SIZE**3:
            faults[index] = f"a product of matrices is wrong: {total:g} in place of {_SIZE**3}"
    has_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, nccl.version())) if has_nccl else None,
        "num_gpus": torch.cuda.device_count(),
        "faults": faults,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
