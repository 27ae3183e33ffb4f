"""A stand-in for SGLang's HTTP server that keeps its rules and can be told to break them.

It samples token 4 at logprob -0.5 until the length limit. Weight updates between 0.5.21's begin
and end calls are enforced where ``has_sessions`` is set.
"""

import base64
import io
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from prefixrl_mcore.rollout.weight_sync.checksums import Digests

SAMPLED_TOKEN = 4
SAMPLED_LOGPROB = -0.5

Answer = dict[str, Any]


class _Metadata:
    """What SGLang's class of a flattened bucket's entries is read as."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("sglang.srt.weight_sync.tensor_bucket", "FlattenedTensorMetadata"):
            return _Metadata
        if (module, name) == ("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified"):
            return lambda *arguments: ("GPU handle", *arguments)
        if module.split(".")[0] not in ("torch", "collections"):
            raise pickle.UnpicklingError(f"SGLang does not load {module}.{name}")
        return super().find_class(module, name)


def read_pickle(serialized: str) -> Any:
    """Return what a pickle holds, with stand-ins for SGLang's own classes."""
    return _Unpickler(io.BytesIO(base64.b64decode(serialized))).load()


def read_bucket(serialized: str) -> list[tuple[str, Tensor]]:
    """Return the weights of a flattened bucket, taken apart as SGLang does it."""
    bucket = read_pickle(serialized)
    return [
        (entry.name, flat.view(entry.dtype).reshape(entry.shape))
        for entry in bucket["metadata"]
        for flat in [bucket["flattened_tensor"][entry.start_idx : entry.end_idx]]
    ]


class FakeSGLang:
    """State of the server: what was asked, and how the next answers are spoiled."""

    def __init__(self, *, has_sessions: bool = False) -> None:
        self.has_sessions = has_sessions
        self.has_prefix_cache = False
        self.weight_version = "first"
        self.precision: dict[str, Any] = {"dtype": "float32", "enable_fp32_lm_head": False}
        self.model: dict[str, Any] = {}
        self.loaded: dict[str, list[int]] = {}
        self.weights: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.num_dropped_answers = 0
        self.fail_generate = 0
        self.refuse_update = ""
        self.version = "0.5.23" if has_sessions else "0.5.17"
        self.is_sick = False
        self.is_paused = False
        self.raw_answer: bytes | None = None
        self.hold: threading.Event | None = None
        self.hold_warm_up: threading.Event | None = None
        self.sampled: list[str] = []
        self._contexts: set[str] = set()
        self._aborted = threading.Event()
        self.refuse_generate = ""
        self.spoil: Callable[[Answer], None] | None = None
        self.is_session_open = False
        self.is_cache_fresh = False
        self.is_paused = False
        self.released: set[str] = set()
        self.holds_finished_batch = False
        self.url = ""

    def answer(self, path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if payload.get("rid") == "warm-up":
            return self._warm_up()
        self.calls.append(path)
        if path in ("/health", "/health_generate"):
            # A stock server samples a token for both, which needs a scheduler that goes on.
            return (503, None) if self.is_sick or self.is_paused else (200, None)
        if path == "/model_info":
            return 200, {"weight_version": self.weight_version} | self.model
        if path == "/server_info":
            settings = {"disable_radix_cache": not self.has_prefix_cache}
            return 200, {"version": self.version} | settings | self.precision
        if path == "/generate":
            return self._generate(payload)
        if path == "/abort_request":
            self._aborted.set()
        if path in ("/begin_weight_update", "/end_weight_update"):
            return self._session(path)
        if path == "/update_weights_from_tensor":
            return self._update(payload)
        if path == "/weights_checker":
            return 200, {"ranks": [self._checksums()]}
        return self._control(path, payload)

    def _warm_up(self) -> tuple[int, Any]:
        """Sample first tokens, which nobody counts; a paused server never does."""
        self.calls.append("warm-up")
        hold = self.hold_warm_up
        while self.is_paused or (hold is not None and not hold.is_set()):
            time.sleep(0.01)
        return 200, {"output_ids": [SAMPLED_TOKEN] * 8, "meta_info": {}}

    def _control(self, path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        if path in ("/pause_generation", "/continue_generation"):
            self.is_paused = path == "/pause_generation"
            self.holds_finished_batch &= self.is_paused
        if path == "/flush_cache" and self.is_paused and self.holds_finished_batch:
            return 400, "Timed out waiting for idle state."
        if path.endswith("_memory_occupation"):
            return self._memory(path, payload["tags"])
        self.weight_version = payload.get("new_version", self.weight_version)
        self.is_cache_fresh |= path == "/flush_cache"
        return 200, {"success": True}

    def _memory(self, path: str, tags: list[str]) -> tuple[int, Any]:
        """Release or resume, with the assertions that end a real server's scheduler."""
        self.calls[-1] += f" {' '.join(tags)}"
        if path.startswith("/release"):
            is_sound = not self.is_paused and not self.released & set(tags)
            self.released |= set(tags)
        else:
            is_sound = self.released >= set(tags)
            self.released -= set(tags)
        return (200, None) if is_sound else (500, "the scheduler is gone")

    def _generate(self, payload: dict[str, Any]) -> tuple[int, Any]:
        if self.num_dropped_answers > 0:
            self.num_dropped_answers -= 1
            return 0, None
        if self.fail_generate:
            return self.fail_generate, {"error": {"message": "scripted"}}
        if self.refuse_generate:
            return 400, {"error": {"message": self.refuse_generate}}
        if self.raw_answer is not None:
            return 200, self.raw_answer
        parameters = payload["sampling_params"]
        is_batch = isinstance(payload["input_ids"][0], list)
        num_samples = len(payload["input_ids"]) if is_batch else parameters.get("n", 1)
        if self.hold is not None and not self._wait_for_release(self.hold):
            return 200, self._aborted_answers(num_samples)
        self.sampled.append(payload["rid"])
        self.holds_finished_batch = True  # until the scheduler's next round, if it is not paused
        answers = [
            {
                "output_ids": [SAMPLED_TOKEN] * parameters["max_new_tokens"],
                "meta_info": {
                    "finish_reason": {"type": "length"},
                    "weight_version": self.weight_version,
                    "cached_tokens": self._cached_tokens(payload["input_ids"]),
                    "output_token_logprobs": [
                        [SAMPLED_LOGPROB, SAMPLED_TOKEN, None]
                        for _ in range(parameters["max_new_tokens"])
                    ],
                },
            }
            for _ in range(num_samples)
        ]
        if self.spoil is not None:
            self.spoil(answers[-1])
        self._contexts.add(str(payload["input_ids"]))
        return 200, answers if len(answers) > 1 else answers[0]

    def _cached_tokens(self, input_ids: list[Any]) -> int:
        """Return all but the last token of a context that an earlier request had."""
        context = input_ids[0] if isinstance(input_ids[0], list) else input_ids
        is_known = self.has_prefix_cache and str(context) in self._contexts
        return len(context) - 1 if is_known else 0

    def _wait_for_release(self, hold: threading.Event) -> bool:
        """Sample slowly: until ``hold`` is set, or an abort comes; return False for an abort."""
        self._aborted.clear()
        while not hold.wait(0.01):
            if self._aborted.is_set():
                return False
        return True

    def _aborted_answers(self, num_samples: int) -> list[Answer]:
        """Return completions that had two tokens, the last one none: it was in the queue."""
        meta = {"finish_reason": {"type": "abort"}, "weight_version": self.weight_version}
        pair = [SAMPLED_LOGPROB, SAMPLED_TOKEN, None]
        begun = {"cached_tokens": 1, "output_token_logprobs": [pair] * 2}
        answers = [
            {"output_ids": [SAMPLED_TOKEN] * 2, "meta_info": meta | begun}
            for _ in range(num_samples - 1)
        ]
        return [*answers, {"output_ids": [], "meta_info": meta}]

    def _checksums(self) -> dict[str, Any]:
        """Return what a single rank reports, by our own rules: what it was sent is what it has."""
        digests = Digests({1}, dtype=torch.float32, num_key_value_heads=1, is_cuda=False)
        for name, weight in self.weights.items():
            digests.add(name, weight)
        place: Any = {"tp_rank": 0}
        if self.has_sessions:  # as 0.5.23 does it
            place = [{"role": "target", "tp_rank": 0}]
        return {"parallelism_info": place, "checksums": digests.of_rank(1, 0)}

    def _session(self, path: str) -> tuple[int, Any]:
        if not self.has_sessions:
            return 404, {"detail": "Not Found"}
        opens = path == "/begin_weight_update"
        if opens == self.is_session_open:
            return 400, {"success": False, "message": "a weight-update session is already open"}
        self.is_session_open = opens
        return 200, {"success": True}

    def _update(self, payload: dict[str, Any]) -> tuple[int, Any]:
        if self.has_sessions and not self.is_session_open:
            return 400, {"success": False, "message": "must run between begin and end"}
        if self.refuse_update:
            return 400, {"success": False, "message": self.refuse_update}
        (serialized,) = payload["serialized_named_tensors"]
        self.weights |= dict(read_bucket(serialized))
        self.loaded |= {name: list(weight.shape) for name, weight in self.weights.items()}
        self.is_cache_fresh = False
        return 200, {"success": True}


@contextmanager
def serve(fake: FakeSGLang) -> Iterator[str]:
    """Serve ``fake`` on a free port; yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/begin_weight_update":  # may only be posted to
                status = 405 if fake.has_sessions else 404
                self._send(status, {"detail": "no"})
                return
            self._reply({})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._reply(json.loads(self.rfile.read(length)))

        def _reply(self, payload: dict[str, Any]) -> None:
            status, content = fake.answer(self.path.partition("?")[0], payload)
            if status == 0:
                self.close_connection = True
                return
            self._send(status, content)

        def _send(self, status: int, content: Any) -> None:
            if isinstance(content, bytes):
                body = content
            else:
                body = b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
