"""A spec as text: what is written is read again, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import sympy

from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, OperandSpec, S, Where, h, k, q


@pytest.mark.parametrize("number", [sympy.oo, -sympy.oo, sympy.pi, sympy.Rational(1, 3), 0.1])
def test_unusual_numbers_survive_being_written(number: Any) -> None:
    spec = AttentionSpec(0.5, Where(sympy.Ge(q, k), S, number))
    assert AttentionSpec.deserialize(spec.serialize()) == spec


def test_every_field_survives_being_written() -> None:
    spec = AttentionSpec(
        scale=0.125,
        score=sympy.tanh(S / 30) * 30 + (k - q) * Load(0, h),
        mask=sympy.And(sympy.Ge(q - k, 0), sympy.Eq(sympy.floor(q / 4), sympy.floor(k / 4))),
        empty_row=EmptyRow.ZERO,
        sink=Load(1, h),
        dropout_p=0.1,
        group=4,
        operands=(OperandSpec("float", 1), OperandSpec("float", 1)),
        params=2,
    )
    again = AttentionSpec.deserialize(spec.serialize())
    assert again == spec
    assert again.key() == spec.key()


@pytest.mark.parametrize("text", ["", "{}", "no spec", "{'scale': 1}", "__import__('os')"])
def test_text_that_is_no_spec_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a serialized AttentionSpec|malformed"):
        AttentionSpec.deserialize(text)
