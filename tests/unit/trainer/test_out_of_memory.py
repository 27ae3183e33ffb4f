"""Out of memory: the largest batch, and an error that says what to turn."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.packing import pack
from prefixrl_mcore.policy.topology import Topology
from prefixrl_mcore.trainer.dry_run import largest_sequences
from prefixrl_mcore.trainer.out_of_memory import TrainerMemoryError, advice, explained

FAKE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
RANK_3 = Topology(
    rank=3,
    world_size=4,
    tp_rank=0,
    tp_size=1,
    pp_rank=0,
    pp_size=1,
    cp_rank=0,
    cp_size=1,
    dp_rank=3,
    dp_size=4,
    ep_size=1,
    etp_size=1,
    device=torch.device("cpu"),
)


def _config(**policy: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_folder": "runs/x",
            "model": {"path": "models/x"},
            "data": {"problems": "x.jsonl"},
            "rollout": {"max_completion_tokens": 40, "max_total_tokens": 60},
            "batch": {"stream_tokens": 160},
            "policy": policy,
        }
    )


@pytest.mark.parametrize(
    ("parallel", "num_streams"),
    [
        pytest.param({}, 1, id="one"),
        pytest.param({"data_parallel_size": 2}, 2, id="each replica"),
        pytest.param({"pipeline_model_parallel_size": 4}, 4, id="each stage"),
        pytest.param(
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            4,
            id="virtual stages",
        ),
        pytest.param({"context_parallel_size": 2}, 1, id="context"),
    ],
)
def test_streams_are_full_of_the_longest_sequences(
    parallel: dict[str, int], num_streams: int
) -> None:
    config = _config(parallel=parallel)
    layout = config.policy.parallel
    sequences = largest_sequences(config, vocab_size=7)
    batch = pack(
        sequences,
        stream_tokens=160,
        num_ranks=layout.data_parallel_size,
        streams_multiple=layout.microbatch_multiple,
        sequence_multiple=layout.sequence_multiple,
        max_completion_tokens=40,
    )
    assert len(batch.streams) == num_streams
    assert batch.num_padding_tokens == 0
    for stream in batch.streams:
        assert stream.sequence_starts.tolist() == [0, 60, 120, 160]
        assert stream.num_rows == 40 + 40 + 39
        assert set(stream.token_ids_T.tolist()) == set(range(7))


def test_a_rest_without_room_for_a_sequence_stays_padding() -> None:
    config = _config().model_copy(
        update={"batch": _config().batch.model_copy(update={"stream_tokens": 121})}
    )
    assert [len(s.context_token_ids) for s in largest_sequences(config, vocab_size=7)] == [20, 20]


def test_the_error_names_rank_place_batch_memory_and_settings() -> None:
    config = _config(parallel={"data_parallel_size": 4})
    batch = pack(
        largest_sequences(config, vocab_size=7),
        stream_tokens=160,
        num_ranks=4,
        max_completion_tokens=40,
    )
    with (
        pytest.raises(TrainerMemoryError) as raised,
        explained(
            config,
            RANK_3,
            what=lambda: "step 12, phase forward_backward",
            batch=batch,
            predicted_bytes=3 * 1024**3,
        ),
    ):
        raise FAKE
    lines = str(raised.value).splitlines()
    assert lines[0] == (
        "out of memory on rank 3 in step 12, phase forward_backward: CUDA out of memory. Tried to "
        "allocate 20.00 GiB."
    )
    assert lines[1] == (
        "batch: 4 streams of 160 tokens over 4 data-parallel rank(s), 12 sequences, longest 60 "
        "tokens, at most 119 completion tokens in a stream"
    )
    assert lines[2].startswith("memory: 3.00 GiB predicted; peak of the process ")
    assert raised.value.__cause__ is FAKE
    text = "\n".join(lines[3:])
    for name in (
        "batch.stream_tokens = 60 (now 160",
        'policy.recompute = "full" (now "none")',
        "policy.head.memory_gb below 1.5",
        "policy.optimizer.use_distributed_optimizer = true",
        "policy.parallel.tensor_model_parallel_size above 1",
    ):
        assert name in text, name


def test_advice_leaves_out_what_was_turned_already() -> None:
    config = _config(
        recompute="full",
        parallel={"tensor_model_parallel_size": 8, "data_parallel_size": 2},
        optimizer={"use_distributed_optimizer": True},
    ).model_copy(update={"batch": _config().batch.model_copy(update={"stream_tokens": None})})
    text = "\n".join(advice(config))
    for name in ("stream_tokens", "recompute", "distributed_optimizer", "tensor_model_parallel"):
        assert name not in text, name
    assert "policy.head.memory_gb" in text


def test_advice_is_a_config_that_training_accepts() -> None:
    config = _config(
        recompute="selective",
        recompute_modules=("mlp",),
        parallel={"context_parallel_size": 4},
    )
    text = "\n".join(advice(config))
    assert "batch.stream_tokens = 64 (now 160; the longest sequence needs 60)" in text
    assert 'policy.recompute = "full" without recompute_modules (now "selective")' in text


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(MemoryError(), id="Python"),
        pytest.param(
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough"),
            id="PyTorch on a CPU",
        ),
    ],
)
def test_host_memory_counts_too(error: BaseException) -> None:
    with (
        pytest.raises(TrainerMemoryError, match="out of memory on rank 3 in sync"),
        explained(_config(), RANK_3, what=lambda: "sync"),
    ):
        raise error


def test_other_errors_pass_and_a_told_one_is_told_once(tmp_path: Path) -> None:
    for error in (RuntimeError("NCCL error"), TrainerMemoryError("told")):
        with (
            pytest.raises(RuntimeError) as raised,
            explained(_config(), RANK_3, what=lambda: "sync", snapshots=tmp_path),
        ):
            raise error
        assert raised.value is error
    assert not list(tmp_path.iterdir())  # a CPU has no snapshots


def test_a_real_allocation_that_cannot_succeed_is_recognised() -> None:
    with pytest.raises(TrainerMemoryError), explained(_config(), RANK_3, what=lambda: "sync"):
        torch.empty(2**60, dtype=torch.uint8)
