"""Expressions as Triton, in its interpreter: what they compute beside kernels/evaluate.py."""

from __future__ import annotations

import functools

import pytest
import torch
from forms import (
    BATCH_ITEM,
    COLUMNS,
    HEAD,
    LARGE,
    PARAMS,
    ROWS,
    SMALL,
    SQUARE,
    Compute,
    assert_form_is_right,
    products,
)
from forms_as_triton import GROUPS, operand_arguments, write_module

BLOCK = 64


@pytest.fixture(scope="module")
def compute(tmp_path_factory: pytest.TempPathFactory) -> Compute:
    """What Triton makes of a form in the square that starts at a row and a key."""
    module = write_module(tmp_path_factory.mktemp("triton") / "forms.py")
    given = [value for _, value in operand_arguments()]
    place = {
        form: (group, number)
        for group, forms in GROUPS.items()
        for number, form in enumerate(forms.values())
    }

    @functools.cache
    def squares(group: str, first: int) -> torch.Tensor:
        out = torch.empty(len(GROUPS[group]), SQUARE, SQUARE, dtype=torch.float64)
        fixed = (first, BATCH_ITEM, HEAD, ROWS, COLUMNS, *PARAMS)
        getattr(module, group)[(1,)](out, products(), *fixed, *given, SQUARE=SQUARE, BLOCK=BLOCK)
        return out

    def computed(form: object, first: int) -> torch.Tensor:
        group, number = place[form]
        return squares(group, first)[number]

    return computed


@pytest.mark.parametrize("first", [SMALL, LARGE])
@pytest.mark.parametrize("name", GROUPS["elements"])
def test_form_is_right(name: str, first: int, compute: Compute) -> None:
    assert_form_is_right(name, first, compute)


@pytest.mark.parametrize("name", GROUPS["tables"])
def test_table_is_read_where_it_should(name: str, compute: Compute) -> None:
    assert_form_is_right(name, SMALL, compute)
