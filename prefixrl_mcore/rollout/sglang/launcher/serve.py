"""Start SGLang's HTTP server; run by SGLang's own interpreter instead of its launch module.

The same as ``python -m sglang.launch_server``, with two additions: a server on a machine without a
GPU is helped along (``without_gpu.py``), and a key that comes on the standard input is asked for in
every request (``require_api_key.py``).
"""

import os
import sys

import require_api_key
import without_gpu


def main() -> None:
    """Run the server with the arguments of the command line."""
    arguments = sys.argv[1:]
    key = sys.stdin.readline().strip()
    # First of all: it decides how the server's processes are started.
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        without_gpu.prepare(is_deterministic="--enable-deterministic-inference" in arguments)

    # Not at the top, for the same reason; and only SGLang's environment has them.
    from sglang.launch_server import run_server  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import (  # pyright: ignore[reportMissingImports]
        prepare_server_args,
    )

    server_args = prepare_server_args(arguments)
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        without_gpu.keep_imports_out_of_garbage_collection()
    if key:
        require_api_key.protect(key)
    run_server(server_args)


if __name__ == "__main__":
    main()
