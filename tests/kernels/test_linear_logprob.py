"""The fused forward against ``log_softmax`` in float64, with tiles that little tensors overflow."""

import math
from dataclasses import replace

import pytest
import torch
from prefixrl_kernels.head.linear_logprob import (
    TileConfig,
    fused_row_statistics,
    linear_logprob_forward,
    split_columns,
)
from prefixrl_kernels.head.reference import merge_partials
from torch import Tensor

from tests.support.head_cases import DEVICE
from tests.support.head_oracle import (
    assert_bitwise,
    assert_close,
    logprobs_of_logits,
    oracle_logprobs,
)
from tests.support.ranks import run_on_ranks

BLOCK = 16
"""Rows, columns and hidden elements of a tile: the least that a tensor core takes."""

TINY = TileConfig(rows=BLOCK, columns=BLOCK, hidden=BLOCK, num_warps=4, num_stages=2)

TOLERANCE = 2e-6
"""Nats per unit of the largest logit: float32 sums in another order."""

EXACT_TOLERANCE = 1e-5
"""Nats, where the logits are exact: what is left is float32's exponentials and sums."""

NEG_INF = float("-inf")


def _case(
    *,
    num_rows: int = 7,
    vocab: int = 83,
    hidden_size: int = 24,
    dtype: torch.dtype = torch.float32,
    logit_std: float = 3.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weight and targets on the device."""
    generator = torch.Generator().manual_seed(seed)
    hidden_RH = torch.randn(num_rows, hidden_size, generator=generator)
    weight_VH = torch.randn(vocab, hidden_size, generator=generator) * logit_std / hidden_size**0.5
    targets_R = torch.randint(0, vocab, (num_rows,), generator=generator)
    return hidden_RH.to(DEVICE, dtype), weight_VH.to(DEVICE, dtype), targets_R.to(DEVICE)


def _of_logits(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states and weight whose product is exactly these finite logits."""
    return logits_RV.to(DEVICE), torch.eye(logits_RV.size(1), device=DEVICE)


def _oracle(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    true_vocab_size: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return oracle_logprobs(
        hidden_RH.cpu().double(),
        weight_VH.cpu().double(),
        targets_R.cpu(),
        true_vocab_size=true_vocab_size,
        temperature=temperature,
    )


def _assert_is_oracle(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    true_vocab_size: int | None = None,
    temperature: float = 1.0,
    tiles: TileConfig | None = TINY,
) -> None:
    true_vocab_size = weight_VH.size(0) if true_vocab_size is None else true_vocab_size
    got = linear_logprob_forward(
        hidden_RH,
        weight_VH,
        targets_R,
        true_vocab_size=true_vocab_size,
        temperature=temperature,
        tiles=tiles,
    )
    expected = _oracle(hidden_RH, weight_VH, targets_R, true_vocab_size, temperature)
    logits_RV = hidden_RH.double() @ weight_VH[:true_vocab_size].double().T / temperature
    tolerance = TOLERANCE * (1.0 + float(logits_RV.abs().max()))
    for name, mine, theirs in zip(("logprobs", "entropies"), got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert not mine.requires_grad
        assert_close(name, mine, theirs, atol=tolerance)


def test_a_row_worked_by_hand() -> None:
    # Probabilities 1/8, 2/8, 5/8; the target is the second.
    hidden_RH, _ = _of_logits(torch.tensor([[1.0, 2.0, 5.0, 1.0]]).log())
    weight_VH = torch.eye(3, 4, device=DEVICE)
    logprobs_R, entropies_R = linear_logprob_forward(
        hidden_RH, weight_VH, torch.tensor([1], device=DEVICE), true_vocab_size=3, tiles=TINY
    )
    assert logprobs_R.item() == pytest.approx(-1.386294, abs=1e-6)
    by_hand = (2.079442 + 2 * 1.386294 + 5 * 0.470004) / 8
    assert entropies_R.item() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("vocab", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
@pytest.mark.parametrize("num_rows", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_rows_and_columns_around_every_tile_boundary(num_rows: int, vocab: int) -> None:
    _assert_is_oracle(*_case(num_rows=num_rows, vocab=vocab))


@pytest.mark.parametrize(
    ("hidden_size", "dtype"),
    [
        (4, torch.float32),
        (8, torch.float32),
        (16, torch.float32),
        (40, torch.float32),
        (8, torch.bfloat16),
        (16, torch.bfloat16),
        (24, torch.bfloat16),
        (40, torch.bfloat16),
    ],
)
def test_hidden_sizes_that_are_no_multiple_of_the_tile(
    hidden_size: int, dtype: torch.dtype
) -> None:
    _assert_is_oracle(*_case(num_rows=17, vocab=33, hidden_size=hidden_size, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_devices_own_tiles_do(dtype: torch.dtype) -> None:
    _assert_is_oracle(*_case(num_rows=70, vocab=700, hidden_size=72, dtype=dtype), tiles=None)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    _assert_is_oracle(*_case(num_rows=17), temperature=temperature)


def test_the_number_of_splits_changes_only_the_order_of_summation() -> None:
    case = _case(num_rows=2 * BLOCK + 3, vocab=7 * BLOCK + 5)
    results = [
        linear_logprob_forward(*case, true_vocab_size=117, tiles=replace(TINY, num_splits=splits))
        for splits in (1, 2, 3, 5, 8, 1000, None)
    ]
    for logprobs_R, entropies_R in results[1:]:
        assert_close("logprobs", logprobs_R, results[0][0], atol=1e-6)
        assert_close("entropies", entropies_R, results[0][1], atol=1e-6)


def test_the_vocabulary_is_cut_into_at_most_128_splits_with_little_waste() -> None:
    tiles = replace(TINY, columns=256)
    assert split_columns(151_936, tiles) == (5, 119)  # 594 tiles
    assert split_columns(18_992, tiles) == (1, 75)
    assert split_columns(1, tiles) == (1, 1)
    assert split_columns(151_936, replace(tiles, num_splits=10)) == (60, 10)
    for num_tiles in range(1, 700):
        per_split, num_splits = split_columns(256 * num_tiles, tiles)
        assert num_splits <= 128
        assert num_tiles <= per_split * num_splits <= num_tiles * (1 + 1 / 128)


def test_blocks_of_rows_larger_than_the_cache_are_worked_on_in_groups() -> None:
    # 16 rows of 131072 float32 are 8 MiB: groups of 2, 2 and 1 of these 5 row blocks.
    case = _case(num_rows=4 * BLOCK + 1, vocab=BLOCK + 4, hidden_size=131072)
    _assert_is_oracle(*case, tiles=replace(TINY, hidden=1024))


def test_columns_of_padding_change_nothing() -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=17, vocab=48)
    targets_R %= 37
    cut = linear_logprob_forward(
        hidden_RH, weight_VH[:37], targets_R, true_vocab_size=37, tiles=TINY
    )
    weight_VH[37:] = float("nan")
    padded = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=37, tiles=TINY)
    for name, mine, theirs in zip(("logprobs", "entropies"), padded, cut, strict=True):
        assert_bitwise(name, mine, theirs)
        assert mine.isfinite().all()


SHARDS = ((0, 33), (33, 34), (34, 50), (50, 83), (83, 96), (96, 100))
"""First and last column of unequal shards of 83 tokens; the last two are all padding."""


def test_shards_of_the_vocabulary_merge_into_the_whole() -> None:
    hidden_RH, weight_VH, _ = _case(num_rows=12, vocab=100)
    # First and last token of every shard that has tokens.
    edges = sorted({token for first, end in SHARDS[:4] for token in (first, end - 1)})
    targets_R = torch.tensor([*edges, 0, 82, 40, 7, 51], device=DEVICE)[:12]
    partials_W4R = torch.stack(
        [
            fused_row_statistics(
                hidden_RH,
                weight_VH[first:end],
                targets_R,
                num_true_columns=max(min(end, 83) - first, 0),
                vocab_start=first,
                temperature=1.0,
                tiles=TINY,
            )
            for first, end in SHARDS
        ]
    )
    assert partials_W4R[4:, 0].eq(NEG_INF).all()
    assert partials_W4R[4:, 1:3].eq(0.0).all()
    # A target's logit comes from exactly one shard.
    assert partials_W4R[:, 3].isfinite().sum(0).tolist() == [1] * 12
    _, _, logprobs_R, entropies_R = merge_partials(partials_W4R)
    expected = _oracle(hidden_RH, weight_VH, targets_R, 83)
    assert_close("logprobs", logprobs_R, expected[0], atol=2e-5)
    assert_close("entropies", entropies_R, expected[1], atol=2e-5)


def _forward_of_rank(rank: int, bounds: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    hidden_RH, weight_VH, targets_R = _case(num_rows=18, vocab=96)
    first, end = bounds[rank]
    group = torch.distributed.group.WORLD
    return linear_logprob_forward(
        hidden_RH,
        weight_VH[first:end],
        targets_R % 83,
        true_vocab_size=83,
        vocab_start=first,
        tp_group=group,
        tiles=TINY,
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="gloo ranks share the CPU's interpreter")
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param(((0, 48), (48, 96)), id="two"),
        pytest.param(((0, 40), (40, 41), (41, 84), (84, 96)), id="four-uneven-one-all-padding"),
    ],
)
def test_ranks_agree_bitwise_and_with_one_rank(bounds: tuple[tuple[int, int], ...]) -> None:
    results = run_on_ranks(_forward_of_rank, bounds, world_size=len(bounds))
    hidden_RH, weight_VH, targets_R = _case(num_rows=18, vocab=96)
    alone = linear_logprob_forward(
        hidden_RH, weight_VH, targets_R % 83, true_vocab_size=83, tiles=TINY
    )
    for result in results:
        for name, mine, first, whole in zip(
            ("logprobs", "entropies"), result, results[0], alone, strict=True
        ):
            assert_bitwise(name, mine, first)
            assert_close(name, mine, whole, atol=1e-6)


@pytest.mark.parametrize("token", [-1, -100, 83, 96, 10**9, 2**32 + 5, -(2**40)])
def test_a_target_outside_of_the_vocabulary_has_no_logprob(token: int) -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=5, vocab=96)
    targets_R %= 83
    expected = _oracle(hidden_RH, weight_VH, targets_R, 83)
    targets_R[2] = token
    logprobs_R, entropies_R = linear_logprob_forward(
        hidden_RH, weight_VH, targets_R, true_vocab_size=83, tiles=TINY
    )
    assert logprobs_R.isnan().tolist() == [False, False, True, False, False]
    expected[0][2] = float("nan")
    assert_close("logprobs", logprobs_R, expected[0], atol=2e-5)
    assert_close("entropies", entropies_R, expected[1], atol=2e-5)


@pytest.mark.parametrize("num_splits", [1, None])
@pytest.mark.parametrize("name", ["all-very-negative", "wide", "certain", "uniform", "doubled"])
def test_extreme_logits(name: str, num_splits: int | None) -> None:
    vocab = 4 * BLOCK
    generator = torch.Generator().manual_seed(1)
    noise_RV = torch.randn(6, vocab, generator=generator)
    logits_RV = {
        "all-very-negative": -3.0e4 + noise_RV,
        "wide": (noise_RV * 1.0e4).clamp(-1.0e4, 1.0e4),
        "certain": torch.zeros(6, vocab).index_fill(1, torch.tensor([BLOCK + 2]), 200.0),
        "uniform": torch.full((6, vocab), -7.5),
        "doubled": noise_RV.index_fill(1, torch.tensor([1, BLOCK, 3 * BLOCK]), 9.0),
    }[name]
    targets_R = torch.tensor([0, 1, BLOCK + 2, 2 * BLOCK, vocab - 2, vocab - 1], device=DEVICE)
    logprobs_R, entropies_R = linear_logprob_forward(
        *_of_logits(logits_RV),
        targets_R,
        true_vocab_size=vocab,
        tiles=replace(TINY, num_splits=num_splits),
    )
    expected = logprobs_of_logits(logits_RV.double(), targets_R.cpu())
    # Differences of 1e4 are rounded to 1e-3; nothing else here is larger than 200.
    rtol = 1e-6
    assert_close("logprobs", logprobs_R, expected[0], atol=EXACT_TOLERANCE, rtol=rtol)
    assert_close("entropies", entropies_R, expected[1], atol=EXACT_TOLERANCE, rtol=rtol)
    assert logprobs_R.max() <= 0.0
    if name == "certain":
        assert logprobs_R[2].item() == 0.0
        assert entropies_R.tolist() == [0.0] * 6
    if name == "uniform":
        assert entropies_R.tolist() == pytest.approx([math.log(vocab)] * 6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_splits", [1, 2, None])
def test_tokens_whose_logit_is_minus_infinity_are_as_good_as_absent(
    dtype: torch.dtype, num_splits: int | None
) -> None:
    # A weight row of -inf against positive hidden states; the first two tiles are banned whole.
    hidden_RH, weight_VH, _ = _case(num_rows=18, vocab=70, hidden_size=40, dtype=dtype)
    hidden_RH = hidden_RH.abs() + 0.1
    banned = [*range(2 * BLOCK), 40, 69]
    weight_VH[banned] = NEG_INF
    targets_R = torch.tensor([2 * BLOCK, 41, 68] * 6, device=DEVICE)
    targets_R[4] = 40
    logprobs_R, entropies_R = linear_logprob_forward(
        hidden_RH,
        weight_VH,
        targets_R,
        true_vocab_size=70,
        tiles=replace(TINY, num_splits=num_splits),
    )
    kept = [token for token in range(70) if token not in banned]
    places_R = torch.tensor([kept.index(token) for token in [32, 41, 68] * 6])
    expected = _oracle(hidden_RH, weight_VH[kept], places_R, len(kept))
    expected[0][4] = NEG_INF
    assert_close("logprobs", logprobs_R, expected[0], atol=5e-5)
    assert_close("entropies", entropies_R, expected[1], atol=5e-5)


def test_a_row_without_any_possible_token_is_nan() -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=3, vocab=40)
    weight_VH.fill_(NEG_INF)
    results = linear_logprob_forward(
        hidden_RH.abs() + 0.1, weight_VH, targets_R, true_vocab_size=40, tiles=TINY
    )
    assert torch.stack(results).isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_splits", [1, None])
def test_a_row_that_is_not_finite_is_nan_and_leaves_the_others_alone(
    bad: float, num_splits: int | None
) -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=BLOCK + 3)
    tiles = replace(TINY, num_splits=num_splits)
    clean = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=83, tiles=tiles)
    hidden_RH[5] = 0.0
    hidden_RH[5, 3] = bad
    hidden_RH[BLOCK + 1, 23] = bad
    dirty = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=83, tiles=tiles)
    others = [row for row in range(BLOCK + 3) if row not in (5, BLOCK + 1)]
    for name, before_R, after_R in zip(("logprobs", "entropies"), clean, dirty, strict=True):
        assert_bitwise(name, after_R[others], before_R[others])
        assert after_R[[5, BLOCK + 1]].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_infinite_logit_anywhere_in_the_vocabulary_is_reported(bad: float) -> None:
    # Positive hidden states: the column's logits are NaN or +inf, the target's is finite.
    hidden_RH, weight_VH, _ = _case(num_rows=3, vocab=6 * BLOCK)
    targets_R = torch.tensor([0, 1, 90], device=DEVICE)
    for column in (0, BLOCK + 1, 6 * BLOCK - 1):
        poisoned_VH = weight_VH.clone()
        poisoned_VH[column] = bad
        targets_R[targets_R == column] += 1
        results = linear_logprob_forward(
            hidden_RH.abs() + 0.1, poisoned_VH, targets_R, true_vocab_size=96, tiles=TINY
        )
        assert torch.stack(results).isnan().all(), column


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_shard_of_nothing_but_nan_is_not_left_out_of_the_merge(bad: float) -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=3, vocab=64)
    weight_VH[32:] = bad
    partials_W4R = torch.stack(
        [
            fused_row_statistics(
                hidden_RH.abs() + 0.1,
                weight_VH[first : first + 32],
                targets_R % 32,
                num_true_columns=32,
                vocab_start=first,
                temperature=1.0,
                tiles=TINY,
            )
            for first in (0, 32)
        ]
    )
    # Not -inf, which says that there is no column.
    assert partials_W4R[1, :3].isnan().all()
    _, _, logprobs_R, entropies_R = merge_partials(partials_W4R)
    assert logprobs_R.isnan().all()
    assert entropies_R.isnan().all()


def test_bfloat16_operands_are_no_worse_than_plain_pytorch_with_bfloat16_logits() -> None:
    case = _case(num_rows=40, vocab=200, hidden_size=64, dtype=torch.bfloat16, logit_std=5.0)
    expected_R, _ = _oracle(*case, 200)
    ours_R, _ = linear_logprob_forward(*case, true_vocab_size=200, tiles=TINY)
    plain_R, _ = logprobs_of_logits((case[0] @ case[1].T).float(), case[2])
    plain_error = float((plain_R.cpu() - expected_R).abs().max())
    assert plain_error > 1e-3  # the comparison says something
    assert float((ours_R.cpu() - expected_R).abs().max()) <= plain_error / 100


def test_no_rows_give_no_results() -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=0)
    logprobs_R, entropies_R = linear_logprob_forward(
        hidden_RH, weight_VH, targets_R, true_vocab_size=83
    )
    assert logprobs_R.shape == entropies_R.shape == (0,)
    assert logprobs_R.dtype == entropies_R.dtype == torch.float32


def test_equal_calls_give_equal_bits() -> None:
    case = _case(num_rows=2 * BLOCK + 3, dtype=torch.bfloat16)
    first, second = (
        linear_logprob_forward(*case, true_vocab_size=83, tiles=TINY) for _ in range(2)
    )
    assert_bitwise("logprobs", second[0], first[0])
    assert_bitwise("entropies", second[1], first[1])


def test_a_rows_bits_do_not_depend_on_the_other_rows() -> None:
    # Small integers, whose products and sums are exact: the interpreter's matrix product, unlike a
    # tensor core, rounds a row according to its place in the tile.
    hidden_RH, weight_VH, targets_R = _case(num_rows=3 * BLOCK + 5, vocab=150)
    hidden_RH, weight_VH = hidden_RH.round(), weight_VH.round()
    whole = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=150, tiles=TINY)
    for rows in ([0], [52], list(range(20, 41)), list(range(52, -1, -1))):
        some = linear_logprob_forward(
            hidden_RH[rows], weight_VH, targets_R[rows], true_vocab_size=150, tiles=TINY
        )
        for name, some_R, whole_R in zip(("logprobs", "entropies"), some, whole, strict=True):
            assert_bitwise(f"{name} of {len(rows)} rows", some_R, whole_R[rows])


@pytest.mark.parametrize(
    "layout", ["transposed", "spread", "unaligned", "odd-stride", "expanded", "strided"]
)
def test_hidden_states_of_any_layout_give_the_same_bits(layout: str) -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=19, dtype=torch.bfloat16)
    if layout == "expanded":
        hidden_RH = hidden_RH[:1].expand(19, -1)
    expected = linear_logprob_forward(
        hidden_RH.contiguous(), weight_VH, targets_R, true_vocab_size=83, tiles=TINY
    )
    if layout == "transposed":
        hidden_RH = hidden_RH.T.contiguous().T
    elif layout == "spread":
        hidden_RH = hidden_RH.repeat_interleave(2, dim=1)[:, ::2]
    elif layout == "unaligned":
        hidden_RH = torch.cat((hidden_RH.new_zeros(1), hidden_RH.flatten()))[1:].view(19, 24)
    elif layout == "odd-stride":
        hidden_RH = torch.nn.functional.pad(hidden_RH, (0, 3))[:, :24]
    elif layout == "strided":
        hidden_RH = hidden_RH.repeat_interleave(2, dim=0)[::2]
    got = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=83, tiles=TINY)
    for name, mine, theirs in zip(("logprobs", "entropies"), got, expected, strict=True):
        assert_bitwise(name, mine, theirs)


def test_a_weight_with_longer_rows_and_a_hidden_size_without_alignment() -> None:
    # 21 of 24 stored elements; what is stored beyond them must not be read.
    hidden_RH, weight_VH, targets_R = _case(num_rows=17, dtype=torch.bfloat16)
    weight_VH[:, 21:] = float("nan")
    hidden_RH = hidden_RH[:, :21].contiguous()
    _assert_is_oracle(hidden_RH, weight_VH[:, :21], targets_R)


def test_nothing_is_written_to_the_arguments_and_no_graph_is_kept() -> None:
    hidden_RH, weight_VH, targets_R = _case(num_rows=17)
    copies = [values.clone() for values in (hidden_RH, weight_VH, targets_R)]
    parameter_VH = torch.nn.Parameter(weight_VH)
    results = linear_logprob_forward(
        hidden_RH.requires_grad_(), parameter_VH, targets_R, true_vocab_size=83, tiles=TINY
    )
    assert not any(result_R.requires_grad for result_R in results)
    for values, copy in zip((hidden_RH, parameter_VH, targets_R), copies, strict=True):
        assert torch.equal(values, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"temperature": 0.0}, "temperature must be positive", id="temperature"),
        pytest.param({"true_vocab_size": 0}, "true_vocab_size must be at least 1", id="vocab"),
        pytest.param({"vocab_start": -1}, "vocab_start at least 0", id="start"),
        pytest.param({"targets_R": torch.zeros(7)}, r"targets \[7\] int64", id="target-dtype"),
        pytest.param({"targets_R": torch.zeros(6).long()}, r"targets \[7\] int64", id="targets"),
        pytest.param({"hidden_RH": torch.zeros(7, 5)}, r"hidden \[T, H\]", id="width"),
        pytest.param({"hidden_RH": torch.zeros(7, 24).half()}, "one floating dtype", id="dtype"),
        pytest.param(
            {"hidden_RH": torch.zeros(7, 24).double(), "weight_VH": torch.zeros(83, 24).double()},
            "float32 operands, got torch.float64; use head_logprobs",
            id="float64",
        ),
        pytest.param(
            {"hidden_RH": torch.zeros(7, 6), "weight_VH": torch.zeros(83, 6)},
            r"multiples of 16 bytes, got shape \(83, 6\), strides \(6, 1\).*use head_logprobs",
            id="row-stride",
        ),
        pytest.param(
            {"weight_VH": torch.zeros(24, 83).T}, "whose rows are contiguous", id="transposed"
        ),
        pytest.param({"weight_VH": torch.zeros(83, 48)[:, ::2]}, r"strides \(48, 2\)", id="spread"),
        pytest.param(
            {"weight_VH": torch.zeros(83 * 24 + 1)[1:].view(83, 24)}, "4 modulo 16", id="unaligned"
        ),
        pytest.param(
            {"weight_VH": torch.zeros(1, 24).expand(83, 24)}, r"strides \(0, 1\)", id="expanded"
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    hidden_RH, weight_VH, targets_R = _case()
    arguments: dict[str, object] = {
        "hidden_RH": hidden_RH,
        "weight_VH": weight_VH,
        "targets_R": targets_R,
        "true_vocab_size": 83,
    }
    for name, value in change.items():
        # Copied with its strides and its offset from alignment.
        arguments[name] = _on_device(value) if isinstance(value, Tensor) else value
    with pytest.raises(ValueError, match=message):
        linear_logprob_forward(**arguments)  # pyright: ignore[reportArgumentType]


def _on_device(values: Tensor) -> Tensor:
    """Return the tensor on the device with its strides and storage offset."""
    storage = torch.zeros(83 * 48 + 1, dtype=values.dtype, device=DEVICE)
    return storage.as_strided(values.shape, values.stride(), values.storage_offset())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 24}, "rows must be a power of two from 16"),
        ({"columns": 512}, "columns must be a power of two from 16 to 256, got 512"),
        ({"hidden": 8}, "hidden must be a power of two from 16"),
        ({"num_stages": 0}, "must be at least 1"),
        ({"num_splits": 0}, "must be at least 1"),
    ],
)
def test_tiles_that_no_kernel_can_have_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
