import ast
import base64
import inspect
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from prefixrl_mcore.rollout.engine import EngineError
from prefixrl_mcore.rollout.weight_names import WeightCoverage
from prefixrl_mcore.rollout.weight_sync.buckets import Bucket, pack_buckets
from prefixrl_mcore.rollout.weight_sync.tensor import (
    GpuHandle,
    _dumps,
    _metadata,
    flattened_bucket,
)
from tests.support.fake_sglang import read_bucket, read_pickle
from tests.support.sglang_environments import sglang_python
from tests.support.tiny_models import build_tiny_qwen2, build_tiny_qwen3_moe

LAYER = "model.layers.0"


def pack(
    weights: dict[str, Tensor], *, bucket_bytes: int, dtype: torch.dtype = torch.float32
) -> list[Bucket]:
    coverage = WeightCoverage(shapes={name: tuple(w.shape) for name, w in weights.items()})
    return list(
        pack_buckets(iter(weights.items()), coverage, dtype=dtype, bucket_bytes=bucket_bytes)
    )


def names(buckets: list[Bucket]) -> list[list[str]]:
    return [[entry.name for entry in bucket.entries] for bucket in buckets]


def numbered(shapes: dict[str, int]) -> dict[str, Tensor]:
    return {name: torch.full((size,), float(i)) for i, (name, size) in enumerate(shapes.items())}


def test_buckets_are_filled_up_to_their_limit_and_in_order() -> None:
    weights = numbered({"a": 1, "b": 2, "c": 1, "d": 4, "e": 3})

    buckets = pack(weights, bucket_bytes=16)

    assert names(buckets) == [["a", "b", "c"], ["d"], ["e"]]
    assert [bucket.num_bytes for bucket in buckets] == [16, 16, 12]
    assert [(one.start_bytes, one.end_bytes) for one in buckets[0].entries] == [
        (0, 4),
        (4, 12),
        (12, 16),
    ]
    assert {n: w.tolist() for b in buckets for n, w in b.weights()} == {
        name: weight.tolist() for name, weight in weights.items()
    }


def test_weight_larger_than_a_bucket_is_a_bucket_of_its_own() -> None:
    buckets = pack(numbered({"a": 1, "huge": 9, "b": 1, "c": 1}), bucket_bytes=16)

    assert names(buckets) == [["a"], ["huge"], ["b", "c"]]
    assert buckets[1].num_bytes == 36


def test_what_an_engine_fuses_is_in_one_bucket() -> None:
    q, k, v = (f"{LAYER}.self_attn.{one}_proj.bias" for one in "qkv")
    gate, up = (f"{LAYER}.mlp.experts.3.{one}_proj.weight" for one in ("gate", "up"))
    down = f"{LAYER}.mlp.experts.3.down_proj.weight"

    sizes = {"norm": 1, q: 2, k: 1, v: 1, gate: 3, up: 3, down: 1}
    buckets = pack(numbered(sizes), bucket_bytes=16)

    assert names(buckets) == [["norm"], [q, k, v], [gate, up], [down]]
    assert [bucket.num_bytes for bucket in buckets] == [4, 16, 24, 4]


def test_parts_of_a_fused_weight_that_come_apart_are_refused() -> None:
    q, k = (f"{LAYER}.self_attn.{one}_proj.weight" for one in "qk")

    with pytest.raises(EngineError, match=r"0\.self_attn\.qkv_proj' do not follow"):
        pack(numbered({q: 1, "norm": 1, k: 1}), bucket_bytes=64)


@pytest.mark.parametrize("build", [build_tiny_qwen2, build_tiny_qwen3_moe])
@pytest.mark.parametrize("bucket_bytes", [1024, 100_000, 10**9])
def test_every_weight_of_a_model_arrives_bit_for_bit(build: object, bucket_bytes: int) -> None:
    model = build()  # pyright: ignore[reportCallIssue] -- one of the above
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    weights = {n: w for n, w in weights.items() if w.dim() < 3}  # transformers stacks experts

    buckets = pack(weights, bucket_bytes=bucket_bytes)

    got = dict(pair for bucket in buckets for pair in read_bucket(flattened_bucket(bucket)))
    assert list(got) == list(weights)
    assert all(torch.equal(got[name], weight) for name, weight in weights.items())


def test_weights_come_in_the_engines_precision() -> None:
    weights = {"odd": torch.randn(3, dtype=torch.float64), "w": torch.randn(5, 2)}

    (bucket,) = pack(weights, bucket_bytes=1024, dtype=torch.bfloat16)

    got = dict(read_bucket(flattened_bucket(bucket)))
    assert bucket.num_bytes == 26
    for name, weight in weights.items():
        assert torch.equal(got[name], weight.bfloat16()), name


def test_no_weight_is_drawn_before_there_is_room_for_it() -> None:
    drawn: list[str] = []
    weights = numbered({f"w{index}": 4 for index in range(6)})

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights.items():
            drawn.append(name)
            yield name, weight

    coverage = WeightCoverage(shapes=dict.fromkeys(weights, (4,)))
    buckets = pack_buckets(stream(), coverage, dtype=torch.float32, bucket_bytes=16)

    assert [entry.name for entry in next(buckets).entries] == ["w0"]
    assert drawn == ["w0", "w1"]  # the second did not fit


def test_stream_that_ends_early_is_an_error_after_the_buckets_before() -> None:
    coverage = WeightCoverage(shapes={"a": (4,), "b": (4,), "c": (4,)})
    weights = numbered({"a": 4, "b": 4})
    buckets = pack_buckets(iter(weights.items()), coverage, dtype=torch.float32, bucket_bytes=16)

    assert [entry.name for entry in next(buckets).entries] == ["a"]
    with pytest.raises(EngineError, match="1 of the model's 3 did not come: c"):
        list(buckets)


def test_pickled_bucket_is_short_and_names_only_torch_and_sglang_once_megatron_is_imported() -> (
    None
):
    import megatron.core  # noqa: F401  replaces a function that pickled tensors name

    weights = {"a": torch.randn(2, 3)}
    (bucket,) = pack(weights, bucket_bytes=10**6)

    data = base64.b64decode(flattened_bucket(bucket))

    assert len(data) < 1500
    assert b"megatron" not in data
    assert b"prefixrl" not in data
    assert b"sglang.srt.weight_sync.tensor_bucket" in data
    assert b"_load_from_bytes" in data
    assert torch.equal(dict(read_bucket(flattened_bucket(bucket)))["a"], weights["a"])


def test_handle_of_gpu_memory_names_sglangs_function_and_the_gpus_own_id() -> None:
    handle = GpuHandle((torch.Tensor, torch.Size([8]), (1,), "GPU-id", b"handle", torch.uint8))

    data = _dumps({"flattened_tensor": handle, "metadata": []})

    assert read_pickle(data) == {
        "flattened_tensor": (
            "GPU handle",
            torch.Tensor,
            (8,),
            (1,),
            "GPU-id",
            b"handle",
            torch.uint8,
        ),
        "metadata": [],
    }


def test_server_that_reads_few_names_reads_all_that_a_handle_has() -> None:
    """From 0.5.21 on a server has a list of what a pickle may name."""
    arguments = dict.fromkeys(inspect.signature(reductions.rebuild_cuda_tensor).parameters, 0)
    arguments |= {  # as ``reduce_tensor`` fills them in for memory of a GPU
        "tensor_cls": torch.Tensor,
        "tensor_size": torch.Size([8]),
        "tensor_stride": (1,),
        "storage_cls": torch.storage.TypedStorage,
        "dtype": torch.uint8,
        "storage_device": "GPU-id",
        "storage_handle": b"handle",
        "requires_grad": False,
    }
    (bucket,) = pack({"a": torch.randn(2, 3)}, bucket_bytes=10**6, dtype=torch.bfloat16)
    handle = GpuHandle(tuple(arguments.values()))

    named = _names_in(_dumps({"flattened_tensor": handle, "metadata": _metadata(bucket)}))

    assert ("sglang.srt.utils.patch_torch", "_rebuild_cuda_tensor_modified") in named
    assert ("torch.storage", "TypedStorage") in named
    assert named <= _names_that_a_server_reads()


class _Anything:
    """Stands for whatever a pickle names."""

    def __init__(self, *_: object) -> None:
        pass


def _names_in(serialized: str) -> set[tuple[str, str]]:
    """Return (module, name) of all that a pickle asks its reader for."""
    named: set[tuple[str, str]] = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> type[_Anything]:
            named.add((module, name))
            return _Anything

    Reader(io.BytesIO(base64.b64decode(serialized))).load()
    return named


def _names_that_a_server_reads() -> set[tuple[str, str]]:
    """Return the list of the newest supported version, from its source."""
    environment = sglang_python("sglang-next").parent.parent
    (file,) = environment.glob("lib/python3.*/site-packages/sglang/srt/utils/common.py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ALLOWED_GLOBALS":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{file} has no ALLOWED_GLOBALS")
