"""Start SGLang's HTTP server on a machine without a GPU; run by SGLang's own interpreter.

The same as ``python -m sglang.launch_server``, except that the server's processes are forked
instead of spawned: a spawned process imports SGLang again, and on two cores those imports are
most of the time that a start takes. Forking is safe here because nothing has touched a GPU or
started a thread before.
"""

import multiprocessing
import sys


def main() -> None:
    """Run the server with the arguments of the command line."""
    multiprocessing.set_start_method("fork")
    # SGLang asks for "spawn" by force, through this attribute.
    multiprocessing.set_start_method = _keep_start_method

    # Not at the top: the start method must be chosen first; and only SGLang's environment has them.
    from sglang.launch_server import run_server  # pyright: ignore[reportMissingImports]
    from sglang.srt.server_args import (  # pyright: ignore[reportMissingImports]
        prepare_server_args,
    )

    run_server(prepare_server_args(sys.argv[1:]))


def _keep_start_method(method: str | None, force: bool = False) -> None:
    """Do nothing, whatever is asked for."""


if __name__ == "__main__":
    main()
