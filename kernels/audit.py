"""Audits: which query rows are computed exactly beside a call, and how errors are told."""

from __future__ import annotations

import torch


def audited_rows(rows: int, count: int, turn: int) -> list[int]:
    """One row of each of `count` equal parts, another one with each turn, all in the end.

    Steps by the golden ratio: of any number of turns in a row the places are spread evenly.
    """
    count = min(count, rows)
    share = (turn * 0.6180339887498949) % 1.0
    return [int((i + share) * rows / count) for i in range(count)]


def relative_error(given: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """sqrt(sum |given - exact|^2 / sum |exact|^2) over rows, [B,H] of [B,H,R,E].

    Where the exact rows are 0 throughout, infinite unless the given are, too.
    """
    wrong = (given - exact).square().sum((-2, -1))
    whole = exact.square().sum((-2, -1))
    return torch.where(wrong == 0, 0.0, (wrong / whole).sqrt())
