"""The row index: which hidden rows are read, and in which order their gradients are added."""

import numpy as np
import pytest
import torch
from prefixrl_kernels import RowIndex

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "rows",
    [[4, 1, 4, 0], np.array([4, 1, 4, 0], dtype=np.int32), torch.tensor([4, 1, 4, 0])],
    ids=["list", "numpy", "tensor"],
)
def test_rows_repeat_in_any_order(rows: object, device: torch.device) -> None:
    index = RowIndex.build(rows, num_hidden_rows=5, device=device)  # pyright: ignore[reportArgumentType]  # three types
    assert (index.num_rows, index.num_hidden_rows, index.has_duplicates) == (4, 5, True)
    assert index.rows_R is not None
    assert index.rows_R.device.type == device.type
    assert index.rows_R.tolist() == [4, 1, 4, 0]
    assert index.unique_rows_U is not None
    assert index.unique_rows_U.tolist() == [0, 1, 4]
    assert index.members_R is not None
    assert index.members_R.tolist() == [3, 1, 0, 2]
    assert index.starts_U1 is not None
    assert index.starts_U1.tolist() == [0, 1, 2, 4]
    hidden_TH = torch.arange(10.0, device=device).reshape(5, 2)
    assert index.gather(hidden_TH)[:, 0].tolist() == [8.0, 2.0, 8.0, 0.0]


def test_layers_hold_each_hidden_row_once_and_every_use_once() -> None:
    rows = [3, 0, 3, 3, 1, 0]
    index = RowIndex.build(rows, num_hidden_rows=4, device=CPU)
    layers = [(positions.tolist(), hidden.tolist()) for positions, hidden in index.layers]
    assert layers == [([1, 4, 0], [0, 1, 3]), ([5, 2], [0, 3]), ([3], [3])]
    positions = sorted(position for layer in layers for position in layer[0])
    assert positions == list(range(6))


def test_all_rows_in_order_need_no_index() -> None:
    index = RowIndex.build(None, num_hidden_rows=3, device=CPU)
    assert (index.num_rows, index.rows_R, index.has_duplicates) == (3, None, False)
    hidden_TH = torch.randn(3, 2)
    assert index.gather(hidden_TH).data_ptr() == hidden_TH.data_ptr()
    assert index.gather(hidden_TH.T.contiguous().T).is_contiguous()


def test_no_rows_are_a_valid_index() -> None:
    index = RowIndex.build([], num_hidden_rows=3, device=CPU)
    assert index.num_rows == 0
    assert index.rows_R is not None
    assert index.rows_R.dtype == torch.int64
    assert index.layers == ()
    assert index.gather(torch.randn(3, 2)).shape == (0, 2)
    assert RowIndex.build(np.zeros(0), num_hidden_rows=0, device=CPU).num_rows == 0


def test_the_index_does_not_alias_what_it_was_built_from() -> None:
    rows_R = torch.tensor([1, 0])
    index = RowIndex.build(rows_R, num_hidden_rows=2, device=CPU)
    rows_R.fill_(0)
    assert index.rows_R is not None
    assert index.rows_R.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([0, 3], r"\[0, 3\).*got 0 to 3", id="too-large"),
        pytest.param([-1, 0], "got -1 to 0", id="negative"),
        pytest.param([0.0, 1.0], "one-dimensional integers, got 1 .* float64", id="float"),
        pytest.param(torch.tensor([True, False, True]), r"mask\.nonzero\(\)", id="mask"),
        pytest.param([[0], [1]], "got 2 dimension", id="two-dimensional"),
        pytest.param(torch.zeros(2, device="meta"), r"on the host.*rows\.cpu\(\)", id="on-device"),
    ],
)
def test_rows_that_mean_nothing_are_refused(rows: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowIndex.build(rows, num_hidden_rows=3, device=CPU)  # pyright: ignore[reportArgumentType]  # that is the test
