"""Specs in words: each part that differs shows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import sympy

from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, OperandSpec, S, h, k, q
from adaattn_compiler.spec_in_words import spec_in_words

PLAIN = AttentionSpec(scale=0.125)


def test_plain_attention() -> None:
    assert spec_in_words(PLAIN) == {
        "mask": "none",
        "score": "S",
        "scale": "0.125",
        "query heads for each key head": "1",
        "rows without a key": "none",
        "sink": "none",
        "dropout": "0",
        "tensors that mask and score read": "none",
        "numbers known at run time": "0",
    }


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"mask": q >= k}, "mask", "causal"),
        ({"score": 2 * S}, "score", "2*S"),
        ({"scale": 0.25}, "scale", "0.25"),
        ({"group": 4}, "query heads for each key head", "4"),
        ({"empty_row": EmptyRow.NAN}, "rows without a key", "give NaN"),
        ({"sink": Load(0, h)}, "sink", "Load(0, h)"),
        ({"dropout_p": 0.5}, "dropout", "0.5"),
        (
            {"operands": (OperandSpec("float", 1), OperandSpec("bool", 2))},
            "tensors that mask and score read",
            "float of 1 axes, bool of 2 axes",
        ),
        ({"params": 2}, "numbers known at run time", "2"),
    ],
)
def test_each_part_shows_and_no_other(changes: dict[str, Any], name: str, words: str) -> None:
    spec = dataclasses.replace(PLAIN, **changes)
    assert spec_in_words(spec) == {**spec_in_words(PLAIN), name: words}


def test_each_field_of_a_spec_has_words() -> None:
    assert len(dataclasses.fields(AttentionSpec)) == len(spec_in_words(PLAIN))


@pytest.mark.parametrize("empty_row", EmptyRow)
def test_rows_without_a_key_have_words_of_their_own(empty_row: EmptyRow) -> None:
    words = spec_in_words(dataclasses.replace(PLAIN, empty_row=empty_row))["rows without a key"]
    for other in set(EmptyRow) - {empty_row}:
        of_other = spec_in_words(dataclasses.replace(PLAIN, empty_row=other))
        assert of_other["rows without a key"] != words


def test_long_expressions_are_cut() -> None:
    score = sum((sympy.sin(i * S) for i in range(1, 99)), S)
    words = spec_in_words(dataclasses.replace(PLAIN, score=score))["score"]
    assert len(words) == 203
    assert words.endswith("...")
