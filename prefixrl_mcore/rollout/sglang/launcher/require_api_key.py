"""Have SGLang ask for an API key that SGLang itself is never told; part of ``serve.py``.

``--api-key`` would stand in the list of processes, in the server's log, which prints all of its
arguments, and in the answer of ``/server_info``. So SGLang's own check is installed here, with the
key, and SGLang believes that it has none.
"""


def protect(key: str) -> None:
    """Let every endpoint but ``/health...`` and ``/metrics`` answer 401 to requests without it."""
    from sglang.srt.entrypoints.http_server import (  # pyright: ignore[reportMissingImports]
        app,
    )
    from sglang.srt.utils.auth import (  # pyright: ignore[reportMissingImports]
        add_api_key_middleware,
    )

    add_api_key_middleware(app, api_key=key, admin_api_key=None)
