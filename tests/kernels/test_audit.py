"""Which rows are audited, and how errors are told."""

from __future__ import annotations

import pytest
import torch

from adaattn_compiler.kernels.audit import audited_rows, relative_error


@pytest.mark.parametrize(("rows", "count"), [(4096, 4), (90, 8), (3, 8), (1, 1)])
def test_turns_reach_all_rows(rows: int, count: int) -> None:
    turns = [audited_rows(rows, count, turn) for turn in range(400)]
    for at in turns:
        assert len(at) == min(count, rows)
        assert at == sorted(set(at))
        assert 0 <= at[0] <= at[-1] < rows
    if rows < 1000:
        assert {row for at in turns for row in at} == set(range(rows))


def test_errors_are_relative_to_the_exact_rows() -> None:
    exact = torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2)
    assert relative_error(exact, exact).item() == 0
    torch.testing.assert_close(relative_error(1.1 * exact, exact), torch.tensor([[0.1]]))


def test_what_should_be_zero_and_is_not_is_within_no_limit() -> None:
    zero = torch.zeros(1, 1, 1, 2)
    assert relative_error(zero, zero).item() == 0
    assert relative_error(zero + 1e-30, zero).item() == 0  # its square is nothing
    assert relative_error(zero + 1e-10, zero).item() == float("inf")


def test_what_is_not_finite_is_within_no_limit() -> None:
    exact = torch.ones(1, 1, 1, 2)
    assert not relative_error(exact * float("nan"), exact).item() <= float("inf")
