"""A process that starts a pool of real SGLang servers and then does nothing, to be killed.

    python -m tests.support.pool_trainer <model folder> <interpreter of SGLang> <file to write>

The file gets the process ids of the servers' supervisors once all are healthy.
"""

import sys
import time
from pathlib import Path

from prefixrl_mcore.config.rollout import SGLangConfig
from prefixrl_mcore.rollout.sglang.engine import SGLangEngine

if __name__ == "__main__":
    model_folder, python, done_file = (Path(argument) for argument in sys.argv[1:])
    engine = SGLangEngine(
        model_folder,
        SGLangConfig(python=python, num_servers=2, start_timeout_seconds=300),
        logits_dtype="float32",
        max_total_tokens=200,
        logs_folder=done_file.parent / "logs",
    )
    written = done_file.with_suffix(".part")
    written.write_text(" ".join(str(server.supervisor_pid) for server in engine.servers))
    written.rename(done_file)
    time.sleep(600)
