"""The C++ source of one kernel: what its spec says, in front of the headers that do the work."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy

from adaattn_compiler.kernels.cpu.expressions import ELEMENTS, GUARDED, Row, sizes_of
from adaattn_compiler.kernels.derivatives import conditional_loads, derivative, float_loads
from adaattn_compiler.predicates import describe
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, S, h, k

HEADERS = Path(__file__).parent

_EMPTY_ROWS = {
    # Then a row can only be -inf throughout because its scores are too large for a float.
    EmptyRow.IMPOSSIBLE: "kNaN",
    EmptyRow.ZERO: "kZero",
    EmptyRow.NAN: "kNaN",
    EmptyRow.UNIFORM: "kUniform",
}


@dataclass(frozen=True)
class Configuration:
    """What one library is generated for.

    dtype: of q, k, v and the result; operands: of the spec's operands; names of torch dtypes.
    mixed: whether plans may have float32 tensors multiplied in bfloat16.
    """

    spec: AttentionSpec
    dtype: str
    head_dim: int
    value_dim: int
    operands: tuple[str, ...]
    mixed: bool = False

    def row(self) -> Row:
        """A row whose expressions read these operands."""
        return Row([ELEMENTS[name] for name in self.operands])


def source_of(made_for: Configuration) -> str:
    """The forward pass; it includes headers of this folder. NoCode: an expression has no form."""
    return _joined(
        _comment(made_for, "the forward pass"),
        '#include "expressions.h"',
        _constants(made_for),
        _score_row(made_for),
        _attended(made_for),
        _sink(made_for),
        '#include "decided.h"\n#include "guards.h"',
        _FORWARD,
    )


def gradient_source_of(made_for: Configuration) -> str:
    """The backward pass, likewise."""
    return _joined(
        _comment(made_for, "the backward pass"),
        '#include "expressions.h"\n#include "gradients.h"',
        _constants(made_for),
        _score_row(made_for),
        _attended(made_for),
        _sink(made_for),
        _gradient_row(made_for),
        _sink_gradient(made_for),
        '#include "backward.h"',
        _BACKWARD,
    )


def gradient_operands(spec: AttentionSpec) -> frozenset[int]:
    """The operands to which a gradient can flow: what the score or the sink adds or scales."""
    found = (float_loads(spec, expression) for expression in (spec.score, spec.sink))
    return frozenset(int(load.args[0]) for loads in found for load in loads)


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def _comment(made_for: Configuration, which: str) -> str:
    spec = made_for.spec
    dims = f"Head dimension {made_for.head_dim}"
    if made_for.value_dim != made_for.head_dim:
        dims += f" (values {made_for.value_dim})"
    text = [
        f"Attention of {made_for.dtype}, {which}.",
        f"{dims}, {spec.group} query head(s) for each key head.",
        f"score: {spec.score}    mask: {describe(spec.mask)}",
        f"where S is {spec.scale!r} times the product of a query row q and a key row k",
    ]
    if spec.sink is not None:
        text.append(f"sink: {spec.sink}")
    if spec.operands:
        kinds = zip(made_for.operands, spec.operands, strict=True)
        named = (f"{i}: {dtype}, {operand.rank} axes" for i, (dtype, operand) in enumerate(kinds))
        text.append(f"operands: {'; '.join(named)}")
        text.append("Load(i, ...) is the element of operand i at batch b, head h, query q, key k")
    lines = [line for part in text for line in textwrap.wrap(part, 96, break_long_words=False)]
    return "\n".join(f"// {line}" for line in lines)


def _constants(made_for: Configuration) -> str:
    spec = made_for.spec
    plain = spec.score == S and spec.scale > 0
    return f"""using Number = {ELEMENTS[made_for.dtype]};
constexpr int kHeadDim = {made_for.head_dim}, kValueDim = {made_for.value_dim};
constexpr int kGroup = {spec.group};
constexpr float kScale = {float_literal(spec.scale)}, kDropout = {float_literal(spec.dropout_p)};
constexpr bool kScaleIsExact = {_flag(math.frexp(abs(spec.scale))[0] in (0.0, 0.5))};
constexpr bool kMaskOfHead = {_flag(spec.mask.has(h))};
constexpr bool kPlain = {_flag(plain)}, kMixedPrecision = {_flag(made_for.mixed)};
constexpr EmptyRow kEmptyRow = EmptyRow::{_EMPTY_ROWS[spec.empty_row]};"""


def _score_row(made_for: Configuration) -> str:
    """The function that makes scores of one row's products with the keys of one block."""
    spec, row = made_for.spec, made_for.row()
    score, mask = row.printed(spec.score), row.printed(spec.mask)
    inside = [
        _key_of_step(spec.score, spec.mask),
        "const float S = kScale * scores[i];",
        f"const float score = {score};",
        f"const bool keep = !kMasked | {mask};" if mask != "true" else "",
        f"scores[i] = {'score' if mask == 'true' else 'keep ? score : -kInfinity'};",
    ]
    return _function(
        "// Products of query row q with `keys` keys from `first` become scores, -inf if masked.\n"
        "template <bool kMasked>\n"
        "static inline void score_row(const Call& call, int b, int h, int q, int first, int keys,\n"
        "                             float* scores)",
        [*sizes_of(spec.params, spec.score, spec.mask), *row.statements, *_loop(inside)],
    )


def _attended(made_for: Configuration) -> str:
    """The function that says to which keys of one block a row attends."""
    spec, row = made_for.spec, made_for.row()
    mask = row.printed(spec.mask)
    inside = [_key_of_step(spec.mask), f"attended[i] |= {mask};"]
    return _function(
        "// Marks the keys that query row q attends to.\n"
        "static inline void mark_attended(const Call& call, int b, int h, int q, int first,\n"
        "                                 int keys, int32_t* attended)",
        [*sizes_of(spec.params, spec.mask), *row.statements, *_loop(inside)],
    )


def _sink(made_for: Configuration) -> str:
    spec = made_for.spec
    if spec.sink is None:
        return ""
    row = made_for.row()
    sink = row.printed(spec.sink)
    return _function(
        "// The logit of the sink.\n"
        "#define ADAATTN_HAS_SINK 1\n"
        "static inline float sink_of(const Call& call, int b, int h, int q)",
        [*sizes_of(spec.params, spec.sink), *row.statements, f"return {sink};"],
    )


# -- gradients -------------------------------------------------------------------------------------


def _gradient_row(made_for: Configuration) -> str:
    """The function that hands a row's gradient on to the operands and to S."""
    spec = made_for.spec
    by_product = derivative(spec.score, S)
    body = []
    for load in float_loads(spec, spec.score):
        body += _gradient_of_load(made_for, spec.score, load)
    if by_product != 1:
        row = made_for.row()
        text = row.printed(by_product)
        inside = [
            _key_of_step(by_product),
            "const float S = kScale * products[i];" if by_product.has(S) else "",
            f"gradient[i] *= {text};",
        ]
        body += [*row.statements, *_loop(inside)]
    mentioned = sizes_of(spec.params, spec.score)
    return _function(
        f"constexpr bool kGradientOfScore = {_flag(by_product != 1)};\n"
        "\n"
        "// The gradient of one row's scores: added up for what the score reads, made that of S.\n"
        "static inline void gradient_row(const BackwardCall& backward, int b, int h, int q,\n"
        "                                int first, int keys, const float* products,\n"
        "                                float* gradient)",
        ["const Call& call = backward.call;", *mentioned, *body],
    )


def _gradient_of_load(made_for: Configuration, score: Any, load: Load) -> list[str]:
    """Statements that add a row's gradient to where one load reads."""
    operand, index = int(load.args[0]), load.args[1:]
    row = made_for.row()
    by_load = derivative(score, load)
    factor = row.printed(by_load)
    whole_row = not load.has(k)
    fixed = [axis for axis, place in enumerate(index) if not place.has(k)]
    moving = [axis for axis, place in enumerate(index) if place.has(k)]
    start = [
        f"if (const GradientSums sums = gradient_of(backward, {operand})) {{",
        f"  const int64_t row_place = {_place(row, operand, index, fixed)};",
    ]
    product = "const float S = kScale * products[i];" if by_load.has(S) else ""
    common = [_key_of_step(load, by_load), product]
    if whole_row:
        loop = _loop([*common, f"sum += {factor} * gradient[i];"], independent=False)
        loop = ["double sum = 0;", *loop, "sums.add(row_place, sum);"]
    else:
        place = f"row_place + {_place(row, operand, index, moving)}"
        condition = "if (factor != 0) " if load in conditional_loads(score) else ""
        add = f"{condition}sums.add({place}, factor * gradient[i]);"
        loop = _loop([*common, f"const float factor = {factor};", add], independent=False)
    hoisted = [f"  {line}" for line in row.statements]
    return [*start, *hoisted, *(f"  {line}" for line in loop), "}"]


def _place(row: Row, operand: int, index: Sequence[Any], axes: Sequence[int]) -> str:
    """The part of a place in an operand's gradient that these axes of its index make."""
    steps = []
    for axis in axes:
        if index[axis] != 0:
            step = f"int64_t({row.printed(index[axis], GUARDED)})"
            inner = axis == len(index) - 1  # its stride is 1
            steps.append(
                step if inner else f"{step} * backward.gradients[{operand}].stride[{axis}]"
            )
    return " + ".join(steps) or "0"


def _sink_gradient(made_for: Configuration) -> str:
    spec = made_for.spec
    if spec.sink is None:
        return ""
    body = []
    for load in float_loads(spec, spec.sink):
        row = made_for.row()
        operand, index = int(load.args[0]), load.args[1:]
        factor = row.printed(derivative(spec.sink, load))
        body += [
            f"if (const GradientSums sums = gradient_of(backward, {operand})) {{",
            f"  const int64_t place = {_place(row, operand, index, range(len(index)))};",
            *(f"  {line}" for line in row.statements),
            f"  sums.add(place, {factor} * gradient);",
            "}",
        ]
    return _function(
        "// The gradient of one row's sink.\n"
        "static inline void sink_gradient(const BackwardCall& backward, int b, int h, int q,\n"
        "                                 float gradient)",
        ["const Call& call = backward.call;", *sizes_of(spec.params, spec.sink), *body],
    )


# -- text ------------------------------------------------------------------------------------------


def float_literal(value: float) -> str:
    """A number as a C++ float."""
    return Row([]).number(sympy.Float(value))


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _key_of_step(*expressions: Any) -> str:
    return "const int k = first + i;" if any(e.has(k) for e in expressions) else ""


def _loop(inside: list[str], *, independent: bool = True) -> list[str]:
    """A loop over the keys; independent: its steps may be taken in any order."""
    lines = (f"  {line}" for line in inside if line)
    loop = ["for (int i = 0; i < keys; ++i) {", *lines, "}"]
    return ["#pragma GCC ivdep", *loop] if independent else loop


def _function(head: str, lines: list[str]) -> str:
    body = "\n".join(line if line.startswith("#") else f"  {line}" for line in lines)
    return f"{head} {{\n{body}\n}}"


_FORWARD = """extern "C" int64_t attention_forward(const Call* call) {
  return attention(*call);
}

extern "C" void attention_guard(const GuardCall* call) { guard(*call); }

extern "C" int64_t attention_decided(const DecidedCall* call) {
  return Decided(*call).run();
}"""

_BACKWARD = """extern "C" int64_t attention_backward(const BackwardCall* backward) {
  return backward_in_precision(*backward);
}"""
