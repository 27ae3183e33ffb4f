"""The benchmark of the whole policy, at its tiny size on this machine."""

import itertools

import pytest
import torch
from bench import policy as bench_policy
from bench.policy_case import FULL, TINY, PolicyResult, build_batch, run_variant

from prefixrl_mcore.config.model_shape import read_model_shape
from prefixrl_mcore.policy import topology


def test_a_batch_has_prefixes_in_three_of_four_groups_and_centred_advantages() -> None:
    batch, work = build_batch(TINY, seed=0)
    assert batch.num_sequences == TINY.num_groups * TINY.group_size
    lengths, rows = [], 0
    for stream in batch.streams:
        for first, last in itertools.pairwise(stream.sequence_starts.tolist()):
            inside = (stream.rows_R >= first) & (stream.rows_R < last)
            if inside.any():
                lengths.append(last - first)
                rows += int(inside.sum())
    assert work.num_tokens == sum(lengths)
    assert work.num_rows == rows == batch.num_trained_tokens
    assert work.num_pairs == sum(length * (length + 1) // 2 for length in lengths)
    contexts = {}
    for stream in batch.streams:
        for first, last in itertools.pairwise(stream.sequence_starts.tolist()):
            inside = (stream.rows_R >= first) & (stream.rows_R < last)
            if inside.any():
                index = int(stream.sequence_index_R[inside][0])
                advantage = float(stream.advantages_R[inside][0])
                contexts[index] = (int(stream.rows_R[inside][0]) - first + 1, advantage)
    for group in range(TINY.num_groups):
        members = [contexts[group * TINY.group_size + i] for i in range(TINY.group_size)]
        assert len({length for length, _ in members}) == 1
        assert sum(advantage for _, advantage in members) == pytest.approx(0.0, abs=1e-6)
        assert (members[0][0] > TINY.prompt_tokens[1]) == (group % 4 < 3)


def test_the_full_case_is_a_qwen3_of_over_half_a_billion_parameters() -> None:
    shape = read_model_shape(FULL.hf_config)
    layer = 2 * shape.hidden_size * 128 * (16 + 8) + 3 * shape.hidden_size * shape.ffn_hidden_size
    assert shape.num_layers * layer + shape.vocab_size * shape.hidden_size > 0.5e9
    longest = FULL.prompt_tokens[1] + FULL.prefix_tokens[1] + FULL.completion_tokens[1]
    assert longest <= FULL.stream_tokens


def _run(variant: str) -> PolicyResult:
    settings = bench_policy.VARIANTS[variant]
    seconds: list[float] = []
    try:
        result = run_variant(
            TINY,
            variant,
            settings,
            num_steps=7,
            seed=0,
            report=lambda step, took, loss: seconds.append(took),
        )
    finally:
        topology.shut_down()
    assert result.step_seconds == tuple(seconds)
    assert result.seconds == sorted(seconds[4:])[1]  # the median of three after four of warm-up
    return result


def test_variants_train_alike_and_report_what_they_did() -> None:
    plain, recomputed = _run("local"), _run("local, selective recomputation")
    assert recomputed.losses == plain.losses
    assert recomputed.gradient_norms == plain.gradient_norms
    assert plain.losses[-1] < plain.losses[0] - 0.1  # it learns its batch by heart
    assert plain.tokens_per_second == pytest.approx(plain.num_tokens / plain.seconds)
    # 96 x 32 embedding; a layer: 2 x 32 x 16 x (4 + 2) attention, 3 x 32 x 64 feed-forward, norms
    # of 2 x 32 and 2 x 16; the last norm.
    assert plain.num_parameters == 96 * 32 + 2 * (6144 + 6144 + 64 + 32) + 32
    if not torch.cuda.is_available():
        assert (plain.mfu, plain.peak_bytes) == (None, None)


def test_the_command_runs_and_says_what_this_machine_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("about a machine without a GPU")
    assert bench_policy.main(["--tiny", "--steps", "5"]) == 0
    printed = capsys.readouterr()
    assert "peak of this device unknown" in printed.out
    assert "there is no CUDA device; install the extra 'te'" in printed.err.replace("\n", " ")
    assert bench_policy.main(["--steps", "5"]) == 1
    assert "--tiny runs a tiny model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--steps must be above 4"):
        run_variant(TINY, "local", {}, num_steps=4, seed=0, report=lambda *_: None)
