"""What a site computes, in words: where two specs differ, a key tells nobody in what."""

from __future__ import annotations

from collections.abc import Mapping

from adaattn_compiler.predicates import describe
from adaattn_compiler.spec import AttentionSpec, EmptyRow

# Of each part: expressions can be pages.
_LONGEST = 200
_EMPTY_ROWS = {
    EmptyRow.IMPOSSIBLE: "none",
    EmptyRow.ZERO: "give zeros",
    EmptyRow.NAN: "give NaN",
    EmptyRow.UNIFORM: "give the mean of all values",
}


def spec_in_words(spec: AttentionSpec) -> Mapping[str, str]:
    """Its parts by name, "none" where there is no such thing. Of the same names for every spec."""
    operands = (f"{operand.kind} of {operand.rank} axes" for operand in spec.operands)
    words = {
        "mask": describe(spec.mask),
        "score": str(spec.score),
        "scale": repr(spec.scale),
        "query heads for each key head": str(spec.group),
        "rows without a key": _EMPTY_ROWS[spec.empty_row],
        "sink": "none" if spec.sink is None else str(spec.sink),
        "dropout": f"{spec.dropout_p:g}",
        "tensors that mask and score read": ", ".join(operands) or "none",
        "numbers known at run time": str(spec.params),
    }
    return {name: _short(text) for name, text in words.items()}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
