"""The fused forward on one CUDA device, with the device's own tiles and at real sizes."""

from collections.abc import Iterator

import pytest
import torch
from prefixrl_kernels.head.linear_logprob import fused_row_statistics, linear_logprob_forward
from prefixrl_kernels.head.reference import merge_partials
from torch import Tensor

from tests.support.head_cases import nan_filled_memory
from tests.support.head_oracle import assert_bitwise, assert_close, logprobs_of_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(1200),
]

CUDA = torch.device("cuda")
VOCAB, HIDDEN_SIZE = 151_936, 2560

REFERENCE_ROWS = 256
"""Rows of float64 logits that the reference holds at once: 0.3 GB."""

ROW_TOLERANCE = 5e-5
"""Nats per unit of the largest logit: float32 sums over 2560 products and 151,936 columns, in
tensor cores that round an addition less carefully than an ordinary one."""

EXTRA_BYTES = 64 * 1024**2
"""Bound on the extra memory for 4096 rows; their float32 logits alone are 2.5 GB."""


@pytest.fixture(autouse=True)
def _nan_filled_memory_that_is_given_back() -> Iterator[None]:
    with nan_filled_memory():
        yield
    torch.cuda.empty_cache()


def _inputs(
    num_rows: int, vocab: int, hidden_size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weight and targets: logits of 3, most targets likely."""
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden_RH = torch.randn(num_rows, hidden_size, generator=generator, device=CUDA)
    weight_VH = torch.randn(vocab, hidden_size, generator=generator, device=CUDA)
    weight_VH *= 3.0 / hidden_size**0.5
    targets_R = torch.randint(0, vocab, (num_rows,), generator=generator, device=CUDA)
    # 70 % of the rows point at their target: its logit rises by about 12.
    is_likely_R1 = torch.rand(num_rows, 1, generator=generator, device=CUDA) < 0.7
    hidden_RH += is_likely_R1 * weight_VH[targets_R] * (12.0 / 9.0)
    return hidden_RH.to(dtype), weight_VH.to(dtype), targets_R


def _assert_is_reference(
    got: tuple[Tensor, Tensor],
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    true_vocab_size: int,
) -> None:
    weight_HV = weight_VH[:true_vocab_size].double().T
    for start in range(0, hidden_RH.size(0), REFERENCE_ROWS):
        rows = slice(start, start + REFERENCE_ROWS)
        logits_RV = hidden_RH[rows].double() @ weight_HV
        bound = ROW_TOLERANCE * (1.0 + float(logits_RV.abs().max()))
        expected = logprobs_of_logits(logits_RV, targets_R[rows])
        for name, mine_R, theirs_R in zip(("logprobs", "entropies"), got, expected, strict=True):
            assert_close(f"{name} from row {start}", mine_R[rows], theirs_R, atol=bound)


def test_a_real_vocabulary_without_logits_in_memory() -> None:
    hidden_RH, weight_VH, targets_R = _inputs(4096, VOCAB, HIDDEN_SIZE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=VOCAB)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < EXTRA_BYTES
    assert first[0].max() <= 0.0
    assert first[1].min() >= 0.0
    for _ in range(3):
        again = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=VOCAB)
        for name, mine_R, first_R in zip(("logprobs", "entropies"), again, first, strict=True):
            assert_bitwise(name, mine_R, first_R)
    _assert_is_reference(first, hidden_RH, weight_VH, targets_R, VOCAB)


def test_a_rows_bits_do_not_depend_on_the_other_rows_beyond_2_to_the_31_logits() -> None:
    hidden_RH, weight_VH, targets_R = _inputs(16_384 + 77, VOCAB, HIDDEN_SIZE)
    whole = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=VOCAB)
    for rows in (slice(0, 1), slice(100, 1000), slice(16_000, None)):
        some = linear_logprob_forward(
            hidden_RH[rows], weight_VH, targets_R[rows], true_vocab_size=VOCAB
        )
        for name, some_R, whole_R in zip(("logprobs", "entropies"), some, whole, strict=True):
            assert_bitwise(f"{name} of {rows}", some_R, whole_R[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden_size", [8, 64, 200, 2560])
def test_sizes_around_the_devices_tiles(hidden_size: int, dtype: torch.dtype) -> None:
    for num_rows in (1, 63, 64, 65, 127, 128, 129, 259):
        for vocab in (1, 63, 65, 255, 256, 257, 1283, 40_003):
            case = _inputs(num_rows, vocab, hidden_size, dtype)
            got = linear_logprob_forward(*case, true_vocab_size=vocab)
            _assert_is_reference(got, *case, vocab)


def test_padding_temperature_and_shards() -> None:
    hidden_RH, weight_VH, targets_R = _inputs(300, 19_072, HIDDEN_SIZE)
    true_vocab_size = 18_500
    targets_R %= true_vocab_size
    weight_VH[true_vocab_size:] = float("nan")
    partials_W4R = torch.stack(
        [
            fused_row_statistics(
                hidden_RH,
                weight_VH[first : first + 4768],
                targets_R,
                num_true_columns=min(4768, true_vocab_size - first),
                vocab_start=first,
                temperature=0.7,
            )
            for first in range(0, 19_072, 4768)
        ]
    )
    _, _, logprobs_R, entropies_R = merge_partials(partials_W4R)
    logits_RV = hidden_RH.double() @ weight_VH[:true_vocab_size].double().T / 0.7
    expected = logprobs_of_logits(logits_RV, targets_R)
    bound = ROW_TOLERANCE * (1.0 + float(logits_RV.abs().max()))
    assert_close("logprobs", logprobs_R, expected[0], atol=bound)
    assert_close("entropies", entropies_R, expected[1], atol=bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_leaves_its_neighbours_alone(bad: float) -> None:
    hidden_RH, weight_VH, targets_R = _inputs(200, 5000, 256)
    clean = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=5000)
    hidden_RH[70, 100] = bad
    dirty = linear_logprob_forward(hidden_RH, weight_VH, targets_R, true_vocab_size=5000)
    others = [row for row in range(200) if row != 70]
    for name, before_R, after_R in zip(("logprobs", "entropies"), clean, dirty, strict=True):
        assert_bitwise(name, after_R[others], before_R[others])
        assert after_R[70].isnan()
