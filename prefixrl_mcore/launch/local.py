"""Starting the trainer's ranks on this machine, with torch's own launcher."""

import subprocess
import sys
from collections.abc import Sequence


def launch_ranks(world_size: int, arguments: Sequence[str]) -> int:
    """Run ``prefixrl ARGUMENTS`` in ``world_size`` ranks of this machine; return the exit code.

    ``torchrun`` stops the other ranks when one fails.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", "--nproc-per-node", str(world_size)),
        *("-m", "prefixrl_mcore.cli", *arguments),
    ]
    return subprocess.run(command, check=False).returncode
