"""A task of a launched job that does nothing but a collective: ``... OUTPUT_FOLDER``."""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from prefixrl_mcore.launch.slurm.rank_environment import rank_variables

os.environ.update(rank_variables(os.environ))
dist.init_process_group("gloo")
rank = dist.get_rank()
value = torch.tensor([float(10**rank)])
dist.all_reduce(value)
(Path(sys.argv[1]) / f"{rank}.json").write_text(
    json.dumps(
        {
            "sum": value.item(),
            "host": socket.gethostname(),
            "address": socket.gethostbyname(socket.gethostname()),
            "local_rank": int(os.environ["LOCAL_RANK"]),
            "local_world_size": int(os.environ["LOCAL_WORLD_SIZE"]),
            "master": os.environ["MASTER_ADDR"],
            "end": float(os.environ["PREFIXRL_JOB_END_UNIX_SECONDS"]),
        }
    )
)
dist.barrier()
dist.destroy_process_group()
