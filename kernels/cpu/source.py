"""The C++ source of one kernel: what its spec says, in front of the headers that do the work."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

from adaattn_compiler.kernels.cpu.expressions import ELEMENTS, Row, sizes_of
from adaattn_compiler.predicates import describe
from adaattn_compiler.spec import AttentionSpec, EmptyRow, S, k

HEADERS = Path(__file__).parent

_EMPTY_ROWS = {
    EmptyRow.IMPOSSIBLE: "kZero",
    EmptyRow.ZERO: "kZero",
    EmptyRow.NAN: "kNaN",
    EmptyRow.UNIFORM: "kUniform",
}


@dataclass(frozen=True)
class Configuration:
    """What one library is generated for.

    dtype: of q, k, v and the result; operands: of the spec's operands, names of torch dtypes.
    """

    spec: AttentionSpec
    dtype: str
    head_dim: int
    value_dim: int
    operands: tuple[str, ...]


def source_of(made_for: Configuration) -> str:
    """C++ that includes the headers of this folder. NoCpp where an expression has no form."""
    parts = [
        _comment(made_for),
        '#include "expressions.h"',
        _constants(made_for),
        _score_row(made_for),
        _sink(made_for),
        '#include "forward.h"',
        _ENTRY,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _comment(made_for: Configuration) -> str:
    spec = made_for.spec
    text = [
        f"Attention of {made_for.dtype}, head dimension {made_for.head_dim}"
        + (f" (values {made_for.value_dim})" if made_for.value_dim != made_for.head_dim else "")
        + f", {spec.group} query head(s) for each key head.",
        f"score: {spec.score}    mask: {describe(spec.mask)}",
        f"where S is {spec.scale!r} times the product of a query row q and a key row k",
    ]
    if spec.sink is not None:
        text.append(f"sink: {spec.sink}")
    if spec.operands:
        operands = (
            f"{i}: {dtype}[{o.rank}]"
            for i, (o, dtype) in enumerate(zip(spec.operands, made_for.operands, strict=True))
        )
        text.append(f"operands: {', '.join(operands)}")
    lines = [line for part in text for line in textwrap.wrap(part, 96, break_long_words=False)]
    return "\n".join(f"// {line}" for line in lines)


def _constants(made_for: Configuration) -> str:
    spec = made_for.spec
    plain = spec.score == S and spec.scale > 0
    return f"""using Number = {ELEMENTS[made_for.dtype]};
constexpr int kHeadDim = {made_for.head_dim}, kValueDim = {made_for.value_dim};
constexpr int kGroup = {spec.group};
constexpr float kScale = {_scale(spec)};
constexpr bool kPlain = {_flag(plain)};
constexpr EmptyRow kEmptyRow = EmptyRow::{_EMPTY_ROWS[spec.empty_row]};"""


def _scale(spec: AttentionSpec) -> str:
    return f"{spec.scale!r}f"


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _score_row(made_for: Configuration) -> str:
    """The function that makes scores of one row's products with the keys of one block."""
    spec = made_for.spec
    row = Row([ELEMENTS[name] for name in made_for.operands])
    score, mask = row.printed(spec.score), row.printed(spec.mask)
    inside = [
        "const int k = first + i;" if k in spec.score.free_symbols | spec.mask.free_symbols else "",
        "const float S = kScale * scores[i];",
        f"const float score = {score};",
        f"const bool keep = !kMasked | {mask};" if mask != "true" else "",
        f"scores[i] = {'score' if mask == 'true' else 'keep ? score : -kInfinity'};",
    ]
    return _function(
        "// Products of query row q with `keys` keys from `first` become scores; -inf where masked.\n"
        "template <bool kMasked>\n"
        "static inline void score_row(const Call& call, int b, int h, int q, int first, int keys,\n"
        "                             float* scores)",
        [
            *sizes_of(spec.params, spec.score, spec.mask),
            *row.statements,
            "#pragma GCC ivdep",
            "for (int i = 0; i < keys; ++i) {",
            *(f"  {line}" for line in inside if line),
            "}",
        ],
    )


def _sink(made_for: Configuration) -> str:
    spec = made_for.spec
    if spec.sink is None:
        return ""
    row = Row([ELEMENTS[name] for name in made_for.operands])
    sink = row.printed(spec.sink)
    return _function(
        "// The logit of the sink.\n"
        "#define ADAATTN_HAS_SINK 1\n"
        "static inline float sink_of(const Call& call, int b, int h, int q)",
        [*sizes_of(spec.params, spec.sink), *row.statements, f"return {sink};"],
    )


def _function(head: str, lines: list[str]) -> str:
    body = "\n".join(line if line.startswith("#") else f"  {line}" for line in lines)
    return f"{head} {{\n{body}\n}}"


_ENTRY = """// The words in which the products are computed: floats, or pairs of bfloat16.
extern "C" int64_t attention_forward(const Call* call) {
  return forward_in_precision(*call);
}"""
