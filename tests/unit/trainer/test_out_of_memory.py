"""Out of memory: the largest batch, and an error that says what to turn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefixrl_mcore.config.run import RunConfig
from prefixrl_mcore.data.packing import pack
from prefixrl_mcore.observability.phases import Phase, Phases
from prefixrl_mcore.policy.packed import build_packed_stream
from prefixrl_mcore.policy.topology import FROM_FIRST
from prefixrl_mcore.trainer.dry_run import longest_sequences, most_rows
from prefixrl_mcore.trainer.out_of_memory import TrainerMemoryError, advice, explained
from tests.support.topologies import ONE_RANK

FAKE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
RANK_3 = replace(ONE_RANK, rank=3, world_size=4, dp_rank=3, dp_size=4)


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
    multiple = layout.sequence_multiple
    for sequences, starts, num_rows, num_padding in (
        (longest_sequences(config, vocab_size=7), [0, 60, 120, 160], 40 + 40 + 39, 0),
        # 41 tokens with one of context, then 31 (at least 0.75 x 41 = 30.75), then what is left.
        (
            most_rows(config, vocab_size=7),
            [0, 41, 72, 103, 134, 160] if multiple == 1 else [0, 44, 76, 108, 140, 160],
            40 + 3 * 30 + (25 if multiple == 1 else 19),
            0 if multiple == 1 else 3 + 3 * 1,
        ),
    ):
        batch = pack(
            sequences,
            stream_tokens=160,
            num_ranks=layout.data_parallel_size,
            streams_multiple=layout.microbatch_multiple,
            sequence_multiple=layout.sequence_multiple,
            max_completion_tokens=40,
        )
        assert len(batch.streams) == num_streams
        assert batch.num_padding_tokens == num_padding * num_streams
        for stream in batch.streams:
            assert stream.sequence_starts.tolist() == starts
            assert stream.num_rows == num_rows
            assert set(stream.token_ids_T.tolist()) == set(range(7))


def test_padding_of_the_layout_is_as_large_as_it_gets() -> None:
    """41 tokens and 31 each: 41 slots for 31 tokens."""
    config = _config()
    (stream,) = pack(
        most_rows(config, vocab_size=7), stream_tokens=160, max_completion_tokens=40
    ).streams
    assert np.diff(stream.sequence_starts).tolist() == [41, 31, 31, 31, 26]
    packed = build_packed_stream(
        sequence_starts=stream.sequence_starts,
        position_ids_T=torch.from_numpy(stream.position_ids_T),
        device=torch.device("cpu"),
    )
    assert len(packed.slot_tokens_P) == 4 * 41 + 26


def test_a_rest_without_room_for_a_sequence_stays_padding() -> None:
    config = _config().model_copy(
        update={"batch": _config().batch.model_copy(update={"stream_tokens": 121})}
    )
    assert [len(s.context_token_ids) for s in longest_sequences(config, vocab_size=7)] == [20, 20]


def test_the_error_names_rank_place_batch_memory_and_settings() -> None:
    config = _config(parallel={"data_parallel_size": 4})
    phases = Phases()
    phases.begin_step(12)
    batch = pack(
        longest_sequences(config, vocab_size=7),
        stream_tokens=160,
        num_ranks=4,
        max_completion_tokens=40,
    )
    with (
        pytest.raises(TrainerMemoryError) as raised,
        explained(config, RANK_3, phases, batch=batch, predicted_bytes=3 * 1024**3),
        phases.phase("forward_backward"),
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
        pytest.param(RuntimeError("CUDA error: out of memory\nCompile with ..."), id="the driver"),
        pytest.param(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            id="cuBLAS",
        ),
        pytest.param(RuntimeError("Triton Error [CUDA]: out of memory"), id="Triton"),
        pytest.param(RuntimeError("NCCL error: Failed to CUDA calloc 6291456 bytes"), id="NCCL"),
    ],
)
def test_memory_outside_of_the_allocator_counts_too(error: BaseException) -> None:
    with (
        pytest.raises(TrainerMemoryError, match="out of memory on rank 3 in sync"),
        explained(_config(), RANK_3, Phases(), what="sync"),
    ):
        raise error


def _said_in(phase: Phase, config: RunConfig, *, rank: int, error: BaseException) -> str:
    phases = Phases()
    phases.begin_step(2, kind="supervised step")
    with (
        pytest.raises(TrainerMemoryError) as raised,
        explained(config, replace(RANK_3, rank=rank), phases),
        phases.phase(phase),
    ):
        raise error
    return str(raised.value)


def test_an_engine_without_memory_gets_advice_for_engines() -> None:
    text = _said_in("rollout", _config(), rank=0, error=FAKE)
    assert text.startswith("out of memory on rank 0 in supervised step 2, phase rollout: ")
    assert "rollout.sglang.memory_fraction below 0.8" in text
    assert "policy." not in text
    config = _config()
    rollout = config.rollout.model_copy(update={"engine": "transformers"})
    text = _said_in("eval", config.model_copy(update={"rollout": rollout}), rank=0, error=FAKE)
    assert "rollout.transformers.max_batch_size below 256" in text
    assert "sglang" not in text


def test_a_save_without_memory_is_told_of_the_copy() -> None:
    text = _said_in("save", _config(), rank=3, error=MemoryError())
    assert "checkpoint.in_background = false" in text
    assert "policy.recompute" in text


def test_memory_of_rank_0_is_not_said_to_be_another_ranks() -> None:
    passed_on = torch.OutOfMemoryError(str(FAKE))
    passed_on.add_note(FROM_FIRST)
    assert _said_in("eval", _config(), rank=3, error=passed_on) == (
        "out of memory on rank 0 in supervised step 2, phase eval: CUDA out of memory. Tried to "
        "allocate 20.00 GiB.; the output of rank 0 says what to turn"
    )


def test_other_errors_pass_and_a_told_one_is_told_once(tmp_path: Path) -> None:
    for error in (RuntimeError("NCCL error"), TrainerMemoryError("told")):
        with (
            pytest.raises(RuntimeError) as raised,
            explained(_config(), RANK_3, Phases(), what="sync", snapshots=tmp_path),
        ):
            raise error
        assert raised.value is error
    assert not list(tmp_path.iterdir())  # a CPU has no snapshots


def test_a_real_allocation_that_cannot_succeed_is_recognised() -> None:
    with pytest.raises(TrainerMemoryError), explained(_config(), RANK_3, Phases(), what="sync"):
        torch.empty(2**60, dtype=torch.uint8)
