"""The Triton source of a backward pass: a spec's derivatives, and the templates that sum them."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sympy

from adaattn_compiler.kernels.derivatives import derivative
from adaattn_compiler.kernels.triton.ranges import Interval, row_ranges
from adaattn_compiler.kernels.triton.readings import Reading, Sums, readings
from adaattn_compiler.kernels.triton.source import Configuration, module_source
from adaattn_compiler.spec import S

_FOLDER = Path(__file__).parent
_BACKWARD = (_FOLDER / "backward.py").read_text()
_BIASES = (_FOLDER / "biases.py").read_text()

# The kernels of a module.
ROW_TERMS, GRAD_Q, GRAD_KV = "attention_row_terms", "attention_grad_q", "attention_grad_kv"
GRAD_BIAS, GRAD_DISTANCE = "attention_grad_bias", "attention_grad_distance"

_AT_SCORE = "S, b, h, q, k, q_inside, k_inside"


@functools.cache
def backward_source(made_for: Configuration) -> str:
    """A module with the kernels above. NoCode: an expression has no derivative, or no form."""
    kinds = [_BACKWARD, _derivatives(made_for)]
    if of_blocks(made_for):
        kinds.append(_BIASES)
    return module_source(made_for, *kinds)


def summed(made_for: Configuration, sums: Sums, *, in_sink: bool = False) -> tuple[Reading, ...]:
    """What is summed in one way, in the order in which the kernel's sums stand."""
    found = readings(made_for.spec)
    return tuple(each for each in found if each.sums is sums and each.in_sink == in_sink)


def of_blocks(made_for: Configuration) -> tuple[Reading, ...]:
    """What has launches of its own, in the order of LOAD."""
    return summed(made_for, Sums.ELEMENTS) + summed(made_for, Sums.DIAGONALS)


def _derivatives(made_for: Configuration) -> str:
    """The functions that the templates call, as the text of a template."""
    spec = made_for.spec
    by_product = _times("gradient", made_for, spec.score, S)
    rows, columns = summed(made_for, Sums.ROWS), summed(made_for, Sums.COLUMNS)
    of_sink, blocks = summed(made_for, Sums.ROWS, in_sink=True), of_blocks(made_for)
    meeting = row_ranges(spec.mask)
    functions = [
        _function("some_rows", "b, h, first, last", _interval(made_for, meeting.some)),
        _function("every_row", "b, h, first, last", _interval(made_for, meeting.every)),
        _function("to_product", f"gradient, {_AT_SCORE}", f"return {by_product}"),
        _zeros("zero_row_sums", len(rows)),
        _zeros("zero_column_sums", len(columns)),
    ]
    for name, found in (("row_sums_of", rows), ("column_sums_of", columns)):
        if found:
            functions.append(
                _function(name, f"sums, gradient, {_AT_SCORE}", _sums(made_for, found))
            )
    if of_sink:
        terms = (_times("gradient", made_for, spec.sink, each.load) for each in of_sink)
        functions.append(_function("sink_sums_of", "gradient, b, h, q, q_inside", _tuple(terms)))
    if blocks:
        functions.append(_gradient_of_load(made_for))
    named = ", ".join(f"{each.load} ({each.sums.value})" for each in readings(spec))
    heading = f'"""Loads that receive a gradient: {named or "none"}.\n"""'
    return "\n\n\n".join([f"{heading}\nimport triton.language as tl\n", *functions])


def _interval(made_for: Configuration, interval: Interval) -> str:
    ends = (sympy.sympify(end) for end in (interval.low, interval.high))
    return "return " + ", ".join(made_for.tile.printed(end) for end in ends)


def _times(gradient: str, made_for: Configuration, expression: Any, by: Any) -> str:
    """The gradient of what an expression reads, from the expression's own."""
    found = derivative(expression, by)
    return gradient if found == 1 else f"{gradient} * {made_for.tile.printed(found)}"


def _sums(made_for: Configuration, found: Iterable[Reading]) -> str:
    """Each sum of a tile along its second axis, added to what it was."""
    score = made_for.spec.score
    terms = (_times("gradient", made_for, score, each.load) for each in found)
    return _tuple(f"sums[{i}] + tl.sum({term}, 1)" for i, term in enumerate(terms))


def _tuple(parts: Iterable[str]) -> str:
    lines = "".join(f"        {part},\n" for part in parts)
    return f"return (\n{lines}    )"


def _zeros(name: str, count: int) -> str:
    """At least one: an empty tuple cannot be carried by a loop."""
    parts = _tuple(["tl.zeros([BLOCK], tl.float32)"] * max(count, 1))
    return f"@triton.jit\ndef {name}(BLOCK: tl.constexpr):\n    {parts}"


def _gradient_of_load(made_for: Configuration) -> str:
    score = made_for.spec.score
    lines = [
        f"if LOAD == {i}:\n        return {_times('gradient', made_for, score, each.load)}"
        for i, each in enumerate(of_blocks(made_for))
    ]
    return _function(
        "gradient_of_load", f"LOAD: tl.constexpr, gradient, {_AT_SCORE}", "\n    ".join(lines)
    )


def _function(name: str, arguments: str, body: str) -> str:
    return f"@triton.jit\ndef {name}({arguments}, M, N, OPERANDS):\n    {body}"
