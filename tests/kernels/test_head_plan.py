"""The plan: its memory by hand, its choice at real sizes, and what a run really allocates."""

from typing import Any

import pytest
import torch
from prefixrl_kernels import HeadShape, RowIndex, head_logprobs, plan_head, reinforce_head
from prefixrl_kernels.head.estimators import Estimator
from prefixrl_kernels.head.row_kernels import LossInputs
from prefixrl_kernels.head.vocab import VocabShard
from prefixrl_kernels.head_plan import MODES, Mode
from torch import Tensor

from tests.support.live_memory import LiveMemory

BUDGET = 1_500_000_000


def _shape(**changes: Any) -> HeadShape:
    """Return 1000 gathered rows, 512 columns, width 64, bfloat16 with float32 logits."""
    sizes: dict[str, Any] = {
        "num_rows": 1000,
        "num_columns": 512,
        "hidden_size": 64,
        "operand_bytes": 2,
        "logit_bytes": 4,
    }
    return HeadShape(**{**sizes, **changes})


# By hand, in bytes. Table, its scaled copy and partial statistics: 14 + 14 + 4 float32 per row.
TABLE = 1000 * 32 * 4
ROWS = 1000 * 64 * 2  # the gathered rows, and their gradient in bfloat16
ROWS_IN_FLOAT32 = 1000 * 64 * 4
LOGITS = 1000 * 512 * 4
GRADS = 1000 * 512 * 2
WEIGHT_IN_FLOAT32 = 512 * 64 * 4


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("save_dlogits", TABLE + ROWS + ROWS_IN_FLOAT32 + ROWS + LOGITS + GRADS),
        ("grad_in_forward", TABLE + ROWS + ROWS + WEIGHT_IN_FLOAT32 + LOGITS + GRADS),
        ("recompute", TABLE + ROWS + ROWS + LOGITS + GRADS),
        ("no_grad", TABLE + ROWS + LOGITS),
    ],
)
def test_memory_of_each_mode_by_hand(mode: Mode, expected: int) -> None:
    plan = plan_head(_shape(), mode=mode)
    assert (plan.mode, plan.chunk_rows, plan.logit_rows) == (mode, 1000, 1000)
    assert plan.peak_bytes == expected


def test_gradients_that_overwrite_logits_need_no_room_for_them() -> None:
    for mode in ("save_dlogits", "grad_in_forward", "recompute"):
        apart = plan_head(_shape(), mode=mode)
        in_place = plan_head(_shape(logit_bytes=2), mode=mode)
        assert apart.peak_bytes - in_place.peak_bytes == LOGITS


def test_main_grad_that_is_written_in_the_forward_pass_needs_no_private_sum() -> None:
    private = plan_head(_shape(), mode="grad_in_forward")
    direct = plan_head(_shape(), mode="grad_in_forward", has_private_weight_grad=False)
    assert private.peak_bytes - direct.peak_bytes == WEIGHT_IN_FLOAT32


def test_several_chunks_of_recompute_need_a_sum_of_the_weight() -> None:
    shape = _shape(num_rows=4096, num_columns=8192)
    summed = plan_head(shape, mode="recompute", memory_budget_bytes=1)
    given = plan_head(shape, mode="recompute", memory_budget_bytes=1, is_weight_grad_summed=False)
    assert (summed.chunk_rows, summed.logit_rows) == (2048, 128)
    assert summed.peak_bytes - given.peak_bytes == 8192 * 64 * 4
    by_hand = 4096 * (32 * 4 + 2 * 64 * 2) + 128 * 8192 * 4 + 2048 * 8192 * 2
    assert given.peak_bytes == by_hand


def test_repeated_rows_and_ranks_keep_the_gradient_of_rows_in_float32() -> None:
    plain = plan_head(_shape(), mode="recompute").peak_bytes
    repeated = plan_head(_shape(has_duplicates=True), mode="recompute").peak_bytes
    ranks = plan_head(_shape(num_ranks=4), mode="recompute").peak_bytes
    assert repeated - plain == ranks - plain == ROWS_IN_FLOAT32 - ROWS
    # Sequence parallelism: the whole sequence and a share of it in float32, and none gathered.
    sequence = plan_head(_shape(num_ranks=4, num_sequence_rows=2000), mode="recompute").peak_bytes
    assert sequence - ranks == (2000 + 500) * 64 * 4


def test_no_rows_need_nothing_of_the_size_of_the_vocabulary() -> None:
    for mode in ("save_dlogits", "recompute", "no_grad"):
        assert plan_head(_shape(num_rows=0), mode=mode).peak_bytes == 0


# H100 with 1.5 GB: T 32k, V 151,936, H 4096, and the eighth of it that one of 8 ranks holds.
WHOLE = {"num_rows": 32_768, "num_columns": 151_936, "hidden_size": 4096}
EIGHTH = {**WHOLE, "num_columns": 19_072, "num_ranks": 8}


@pytest.mark.parametrize(
    ("sizes", "has_private", "is_summed", "expected"),
    [
        pytest.param(WHOLE, False, False, ("grad_in_forward", 2048), id="32k-promised"),
        pytest.param(WHOLE, True, False, ("recompute", 2048), id="32k-main-grad"),
        pytest.param(
            {**WHOLE, "num_rows": 1638}, True, False, ("save_dlogits", 1638), id="8k-a-fifth-active"
        ),
        pytest.param(EIGHTH, False, False, ("grad_in_forward", 8192), id="tp8-32k-promised"),
        pytest.param(
            {**EIGHTH, "num_rows": 6554}, True, False, ("save_dlogits", 6554), id="tp8-a-fifth"
        ),
    ],
)
def test_the_choice_at_real_sizes_fits_its_budget(
    sizes: dict[str, int], has_private: bool, is_summed: bool, expected: tuple[Mode, int]
) -> None:
    plan = plan_head(
        _shape(**sizes),
        memory_budget_bytes=BUDGET,
        has_private_weight_grad=has_private,
        is_weight_grad_summed=is_summed,
    )
    assert (plan.mode, plan.chunk_rows) == expected
    assert plan.peak_bytes <= BUDGET
    assert "OVER" not in plan.describe()


def test_without_main_grad_a_whole_vocabulary_is_over_budget_and_says_so() -> None:
    # A float32 gradient of the weight alone is 2.5 GB.
    plan = plan_head(_shape(**WHOLE), memory_budget_bytes=BUDGET)
    assert plan.peak_bytes > 151_936 * 4096 * 4 > BUDGET
    assert plan.describe().endswith("of 1.50 GB, OVER BUDGET")
    others = [plan_head(_shape(**WHOLE), mode=mode).peak_bytes for mode in MODES[:3]]
    assert plan.peak_bytes == min(others)


@pytest.mark.parametrize("mode", ["grad_in_forward", "recompute", "no_grad"])
@pytest.mark.parametrize("num_rows", [1, 127, 128, 1025, 5000, 32_768])
def test_blocks_are_whole_tiles_and_grow_with_the_budget(mode: Mode, num_rows: int) -> None:
    sizes = []
    for budget in (1, 10**8, 10**9, 10**10, 10**11):
        plan = plan_head(
            _shape(num_rows=num_rows, num_columns=50_000), mode=mode, memory_budget_bytes=budget
        )
        for rows in (plan.chunk_rows, plan.logit_rows):
            assert rows == num_rows or (rows % 128 == 0 and 0 < rows < num_rows)
        assert plan.logit_rows <= plan.chunk_rows
        if mode != "no_grad":  # no chunk is small: each costs a pass over the weight's gradient
            num_chunks = -(-num_rows // plan.chunk_rows)
            last = num_rows - (num_chunks - 1) * plan.chunk_rows
            assert last > plan.chunk_rows - 128 * num_chunks
        sizes.append((plan.chunk_rows, plan.logit_rows))
    assert sizes == sorted(sizes)
    assert sizes[-1] == (num_rows, num_rows)


def test_a_budget_or_a_mode_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_budget_bytes must be positive, got 0"):
        plan_head(_shape(), memory_budget_bytes=0)
    with pytest.raises(ValueError, match="mode must be auto or one of"):
        plan_head(_shape(), mode="fast")  # pyright: ignore[reportArgumentType]  # that is the test


class _NoWork:
    """Row kernels that allocate what Triton's do and compute nothing: what is left are passes."""

    def statistics(
        self, logits_RV: Tensor, targets_R: Tensor, *, shard: VocabShard, temperature: float
    ) -> Tensor:
        return torch.empty((4, logits_RV.size(0)))

    def merge(self, partials_W4R: Tensor, table_KR: Tensor) -> None:
        pass

    def weigh(self, table_KR: Tensor, inputs: LossInputs, estimator: Estimator) -> None:
        pass

    def grad_logits(
        self,
        logits_RV: Tensor,
        table_KR: Tensor,
        targets_R: Tensor,
        out_RV: Tensor,
        *,
        shard: VocabShard,
        temperature: float,
        has_entropy_grad: bool,
    ) -> None:
        pass

    def scatter(self, grad_RH: Tensor, index: RowIndex, out_TH: Tensor, scale: Tensor) -> None:
        pass


@pytest.mark.parametrize("rows", ["all", "some", "repeated"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [1, 2 * 10**7, 10**9])
@pytest.mark.parametrize("weight_grad", ["autograd", "main_grad", "promised"])
def test_a_run_allocates_no_more_than_the_plan_says(
    mode: Mode, budget: int, weight_grad: str, rows: str
) -> None:
    # float32 with float32 logits: the CPU widens narrower operands, which a GPU does not.
    num_hidden_rows, num_columns, hidden_size = 2600, 1024, 96
    hidden_TH = torch.zeros(num_hidden_rows, hidden_size, requires_grad=mode != "no_grad")
    weight_VH = torch.zeros(num_columns, hidden_size, requires_grad=mode != "no_grad")
    named = {"all": None, "some": range(2500), "repeated": [*range(2499), 0]}[rows]
    named = None if named is None else list(named)
    index = RowIndex.build(named, num_hidden_rows=num_hidden_rows, device=torch.device("cpu"))
    num_rows = index.num_rows
    targets_R, advantages_R = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows)
    if weight_grad != "autograd":
        weight_VH.main_grad = torch.zeros(num_columns, hidden_size)  # pyright: ignore[reportAttributeAccessIssue]
    is_promised = weight_grad == "promised"
    plan = plan_head(
        HeadShape(
            num_rows=num_rows,
            num_columns=num_columns,
            hidden_size=hidden_size,
            operand_bytes=4,
            logit_bytes=4,
            is_copied=named is not None,
            has_duplicates=rows == "repeated",
        ),
        mode=mode,
        memory_budget_bytes=budget,
        has_private_weight_grad=not is_promised,
        is_weight_grad_summed=weight_grad == "autograd",
    )
    main_grads = [weight_VH.main_grad] if weight_grad != "autograd" else []  # pyright: ignore[reportAttributeAccessIssue]
    memory = LiveMemory([hidden_TH, weight_VH, targets_R, advantages_R, *main_grads])
    with memory:
        loss, statistics = reinforce_head(
            hidden_TH,
            weight_VH,
            targets_R,
            index,
            advantages_R,
            num_global_loss_tokens=1,
            true_vocab_size=num_columns,
            mode=mode,
            memory_budget_bytes=budget,
            weight_grad="autograd" if weight_grad == "autograd" else "main_grad",
            promised_upstream=1.0 if is_promised else None,
            backend=_NoWork(),
        )
        if loss.requires_grad:
            loss.backward()
    del statistics
    returned = 0
    if mode != "no_grad":
        assert hidden_TH.grad is not None
        returned = hidden_TH.grad.nbytes
        returned += 0 if weight_VH.grad is None else weight_VH.grad.nbytes
    slack = 16 * num_rows  # flags of the statistics; a [R, H] buffer is 384 bytes a row
    assert memory.peak <= plan.peak_bytes + returned + slack
    assert memory.peak >= 0.7 * plan.peak_bytes


def test_logprobs_under_no_grad_hold_one_block_of_logits() -> None:
    hidden_TH, weight_VH = torch.zeros(2000, 32), torch.zeros(4096, 32)
    targets_R = torch.zeros(2000, dtype=torch.int64)
    budget = 4 * 256 * 4096 * 4
    plan = plan_head(
        HeadShape(
            num_rows=2000,
            num_columns=4096,
            hidden_size=32,
            operand_bytes=4,
            logit_bytes=4,
            is_copied=False,
        ),
        mode="no_grad",
        memory_budget_bytes=budget,
    )
    assert plan.logit_rows == 256
    memory = LiveMemory([hidden_TH, weight_VH, targets_R])
    with memory, torch.no_grad():
        head_logprobs(
            hidden_TH,
            weight_VH,
            targets_R,
            true_vocab_size=4096,
            memory_budget_bytes=budget,
            backend=_NoWork(),
        )
    assert 256 * 4096 * 4 < memory.peak <= plan.peak_bytes + 2 * 2000 * 4
