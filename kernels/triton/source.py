"""The Triton source of one kernel: what its spec says, beside the templates that do the work."""

from __future__ import annotations

import functools
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import sympy

from adaattn_compiler.kernels.triton.expressions import Tile
from adaattn_compiler.kernels.triton.ranges import Interval, key_ranges
from adaattn_compiler.predicates import describe
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, S, param

_FOLDER = Path(__file__).parent
# The functions that expressions call, with the imports of a generated module.
FUNCTIONS = (_FOLDER / "functions.py").read_text()
_TILE = (_FOLDER / "tile.py").read_text()
_SOFTMAX = (_FOLDER / "softmax.py").read_text()
_FORWARD = (_FOLDER / "forward.py").read_text()
_DECODE = (_FOLDER / "decode.py").read_text()
_LOWRANK = (_FOLDER / "lowrank.py").read_text()
_STATISTICS = (_FOLDER / "statistics.py").read_text()
_ROW_PRODUCTS = (_FOLDER / "rowproducts.py").read_text()


@dataclass(frozen=True)
class Configuration:
    """What one module is generated for; dtypes: of the spec's operands, without "torch.". halves:
    for q, k and v of 16 bits alone, beside whose rounding that of cheaper functions is nothing."""

    spec: AttentionSpec
    dtypes: tuple[str, ...] = ()
    halves: bool = False

    @property
    def params(self) -> list[str]:
        """The names of the run-time numbers."""
        return [f"p{i}" for i in range(self.spec.params)]

    @property
    def tile(self) -> Tile:
        """What prints its expressions."""
        return Tile(self.dtypes, self.halves)

    @property
    def operands(self) -> list[str]:
        """The names of the arguments that operands are."""
        return [
            name
            for i, operand in enumerate(self.spec.operands)
            for name in (f"operand{i}_ptr", *operand_strides(i, operand.rank))
        ]


def operand_strides(operand: int, rank: int) -> list[str]:
    """The names of an operand's strides, of which the last is 1."""
    return [f"stride_operand{operand}_{axis}" for axis in range(rank - 1)]


# What a row yields whose scores are all -inf; where that cannot be, they are too large for a float.
EMPTY_ROWS = {
    EmptyRow.IMPOSSIBLE: "nan",
    EmptyRow.ZERO: "zero",
    EmptyRow.NAN: "nan",
    EmptyRow.UNIFORM: "uniform",
}


# The forward kernel; without values; with products of another precision for some heads.
FORWARD, ENTROPY, MIXED = "fused_qk_softmax_av", "fused_entropy_estimate", "fused_mixed_precision"


@functools.cache
def forward_source(made_for: Configuration) -> str:
    """A module with the kernels FORWARD, ENTROPY and MIXED. NoCode: an expression has no form."""
    visits, kernel = _FORWARD.split(f"@triton.jit\ndef {FORWARD}(")
    kernels = (f"@triton.jit\ndef {name}({kernel}" for name in (FORWARD, ENTROPY, MIXED))
    return module_source(made_for, visits + "\n\n".join(kernels), _SOFTMAX)


@functools.cache
def decode_source(made_for: Configuration) -> str:
    """A module with the kernels `fused_decode` and `combine_splits`. NoCode: as above."""
    return module_source(made_for, _DECODE, _SOFTMAX)


@functools.cache
def lowrank_source(made_for: Configuration) -> str:
    """A module with the kernel `fused_lowrank_attention`. NoCode: as above."""
    visits, _ = _FORWARD.split(f"@triton.jit\ndef {FORWARD}(")
    return module_source(made_for, _LOWRANK, visits, _SOFTMAX)


@functools.cache
def statistics_source(made_for: Configuration) -> str:
    """A module with the kernels `fused_row_statistics` and `sampled_scores`. NoCode: as above."""
    return module_source(made_for, _STATISTICS)


@functools.cache
def row_products_source(made_for: Configuration) -> str:
    """A module with the kernel `fused_row_products`. NoCode: as above."""
    return module_source(made_for, _ROW_PRODUCTS)


def module_source(made_for: Configuration, *templates: str) -> str:
    """A module of templates, headed by their docstrings. NoCode: an expression has no form."""
    parts = (
        _heading(made_for, "\n\n".join(_parts(template)[0] for template in templates)),
        "import triton\nimport triton.language as tl",
        _parts(FUNCTIONS)[1],
        _generated(made_for),
        _parts(_TILE)[1],
        *(_parts(template)[1] for template in templates),
    )
    arguments = (*made_for.params, *made_for.operands)

    def named(found: re.Match[str]) -> str:
        return "".join(f",{found[1]}{name}" for name in arguments)

    return re.sub(r",(\s+)OPERANDS\b", named, "\n\n\n".join(parts) + "\n")


def _parts(text: str) -> tuple[str, str]:
    """The docstring of a file, and what follows its imports."""
    _, docstring, code = text.split('"""', 2)
    return docstring.strip(), code.split("import triton.language as tl\n", 1)[1].strip()


def _heading(made_for: Configuration, docstring: str) -> str:
    spec = made_for.spec
    text = [
        f"score: {spec.score}    mask: {describe(spec.mask)}    sink: {spec.sink}",
        f"where S is {spec.scale!r} times the product of a query row q and a key row k, and",
        "Load(i, ...) is the element of operand i at batch b, head h, query q, key k",
    ]
    lines = [line for part in text for line in textwrap.wrap(part, 96, break_long_words=False)]
    return '"""Attention.\n\n' + "\n".join(lines) + "\n\n" + docstring + '\n"""'


LOG2_E = math.log2(math.e)
# Of the numbers in a score: see `fold`.
_LARGE = 1e6


def fold(spec: AttentionSpec) -> float:
    """What scores are multiplied by where they are compared (softmax.py); 1: nothing.

    Products with a number above 0 keep their order, so that the largest score can be multiplied
    instead of all. That product is rounded, while in the difference from it the others are not:
    what a row's weights are taken from is off by 2^-24 of it, all alike, which is nothing but where
    a whole row may be filled with a large number. (Of -1e9 it is 18: float16 holds no 2^18. Of
    -1e30 float32 holds no such power.) So not where a score has such a number in it, or what may be
    one: where it reads a tensor, or a number of run time.
    """
    score, scale = spec.score, spec.scale
    if score == S:
        return scale * LOG2_E if 0 < scale < math.inf else 1.0
    numbers = (*score.atoms(sympy.Number), scale)
    is_large = not all(abs(number) <= _LARGE for number in numbers)
    of_a_call = score.has(Load, *(param(i) for i in range(spec.params)))
    return 1.0 if is_large or of_a_call else LOG2_E


def units(spec: AttentionSpec) -> tuple[float, float]:
    """SCALE and UNIT of the templates."""
    if spec.score != S:
        return spec.scale, LOG2_E if fold(spec) == 1 else 1.0
    return spec.scale * LOG2_E / fold(spec), 1.0


def _generated(made_for: Configuration) -> str:
    spec, tile = made_for.spec, made_for.tile
    sink = -sympy.oo if spec.sink is None else spec.sink
    ranges = key_ranges(spec.mask)
    functions = (
        _function("score_of", "S, b, h, q, k, q_inside, k_inside", tile.printed(spec.score)),
        _function("mask_of", "b, h, q, k, q_inside, k_inside", tile.printed(spec.mask)),
        _function("sink_of", "b, h, q, q_inside", tile.printed(sink)),
        _function("some_keys", "b, h, first, last", _printed(ranges.some, tile)),
        _function("every_key", "b, h, first, last", _printed(ranges.every, tile)),
    )
    constant = f"FOLD: tl.constexpr = tl.constexpr({fold(spec)!r})"
    return "\n\n\n".join((constant, *functions))


def _printed(interval: Interval, tile: Tile) -> str:
    ends = (tile.printed(sympy.sympify(end)) for end in (interval.low, interval.high))
    return ", ".join(ends)


def _function(name: str, arguments: str, body: str) -> str:
    head = f"@triton.jit\ndef {name}({arguments}, M, N, OPERANDS):"
    return f"{head}\n    return {body}"
