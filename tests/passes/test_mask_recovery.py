"""Masks drawn as random trees and written in torch in random spellings.

A tree knows what it means (a dense boolean mask, computed here) and writes itself as the source of
a function, so that a failing example can be read and pasted. Whatever the passes make of it must be
as accurate as eager, rows without keys included; a tree without data must be recovered whole, as a
predicate that reads no tensor.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from check import Outcome, assert_as_accurate, in_float64, run
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.options import Options
from adaattn_compiler.passes import match_product
from adaattn_compiler.passes.lower import Lowered
from adaattn_compiler.predicates import describe
from adaattn_compiler.spec import AttentionSpec, EmptyRow

HEADS, DEPTH = 2, 4
Choose = Callable[[list[str]], str]


@dataclass(frozen=True)
class Case:
    """Sizes, and the tensors that trees read: segment ids of queries and keys, key padding."""

    batch: int
    rows: int
    columns: int
    seed: int

    def inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(length: int) -> torch.Tensor:
            return torch.randn(self.batch, HEADS, length, DEPTH, generator=generator)

        def integers(length: int, end: int) -> torch.Tensor:
            return torch.randint(0, end, (self.batch, length), generator=generator)

        pad = integers(self.columns, 3).clamp(max=1)
        return {
            "q": normal(self.rows),
            "k": normal(self.columns),
            "v": normal(self.columns),
            "row_ids": integers(self.rows, 3).sort(-1).values,
            "column_ids": integers(self.columns, 3).sort(-1).values,
            "pad": pad,
            "pad_bool": pad.bool(),
        }


# -- trees -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """A mask: `And`, `Or`, `Not` of trees, or a named one with a number."""

    kind: str
    number: int = 0
    parts: tuple[Tree, ...] = ()

    @property
    def reads_data(self) -> bool:
        if self.kind in ("segment", "padding"):
            return True
        return any(part.reads_data for part in self.parts)

    def dense(self, case: Case) -> torch.Tensor:
        """bool, broadcastable to [B, 1, M, N]."""
        r, c = torch.arange(case.rows)[:, None], torch.arange(case.columns)[None, :]
        inputs = case.inputs()
        n = self.number
        meanings: dict[str, Callable[[], torch.Tensor]] = {
            "causal": lambda: c <= r + n,
            "window": lambda: r - c < n,
            "prefix": lambda: (c < n).expand(case.rows, -1),
            "chunk": lambda: r // n == c // n,
            "dilated": lambda: (r - c) % n == 0,
            "segment": lambda: (
                inputs["row_ids"][:, None, :, None] == inputs["column_ids"][:, None, None, :]
            ),
            "padding": lambda: inputs["pad_bool"][:, None, None, :],
            "And": lambda: self.parts[0].dense(case) & self.parts[1].dense(case),
            "Or": lambda: self.parts[0].dense(case) | self.parts[1].dense(case),
            "Not": lambda: ~self.parts[0].dense(case),
        }
        return meanings[self.kind]()

    def written(self, choose: Choose) -> str:
        """An expression in torch, of one of its spellings."""
        return f"({_WRITERS[self.kind](self, choose)})"


_small = st.integers(1, 9)
_static = st.one_of(
    st.just(Tree("causal")),
    st.builds(lambda n: Tree("causal", n), st.integers(-5, 5)),
    st.builds(lambda n: Tree("window", n), _small),
    st.builds(lambda n: Tree("prefix", n), _small),
    st.builds(lambda n: Tree("chunk", n), st.integers(2, 9)),
    st.builds(lambda n: Tree("dilated", n), st.integers(2, 4)),
)
_data = st.one_of(st.just(Tree("segment")), st.just(Tree("padding")))


def trees(leaves: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda x, y: Tree("And", 0, (x, y)), inner, inner),
            st.builds(lambda x, y: Tree("Or", 0, (x, y)), inner, inner),
            st.builds(lambda x: Tree("Not", 0, (x,)), inner),
        ),
        max_leaves=4,
    )


cases = st.builds(
    Case,
    st.integers(1, 3),
    st.one_of(st.just(1), st.integers(2, 24)),
    st.integers(7, 40),
    st.integers(0, 999),
) | st.builds(lambda b, n, s: Case(b, n, n, s), st.integers(1, 3), st.integers(7, 24), _small)


# -- spellings -------------------------------------------------------------------------------------


def _row(choose: Choose) -> str:
    return choose(
        [
            "torch.arange(M)[:, None]",
            "torch.arange(M).unsqueeze(1)",
            "torch.arange(M).unsqueeze(-1)",
            "torch.arange(M).view(-1, 1)",
            "torch.arange(M).reshape(M, 1)",
            "torch.arange(0, M, device=q.device)[:, None]",
            "torch.arange(M, dtype=torch.int32).view(M, 1)",
            "(torch.arange(1, M + 1) - 1)[:, None]",
            "torch.arange(M).view(M, 1).expand(M, N)",
            "(torch.ones(M, dtype=torch.long).cumsum(0) - 1)[:, None]",
            "torch.arange(M).float().unsqueeze(-1).long()",
            "torch.arange(q.shape[-2])[:, None]",
            "torch.arange(q.size(2))[None].transpose(0, 1)",
            "torch.arange(M)[None, None, :, None]",
        ]
    )


def _column(choose: Choose) -> str:
    return choose(
        [
            "torch.arange(N)[None, :]",
            "torch.arange(N).unsqueeze(0)",
            "torch.arange(N).view(1, -1)",
            "torch.arange(N)[None]",
            "torch.arange(0, N, 1, device=q.device).view(1, N)",
            "(torch.arange(N + 3)[3:] - 3)[None]",
            "torch.arange(N)[None, :].expand(M, N)",
            "torch.arange(N, dtype=torch.int32)[None]",
            "torch.arange(k.shape[2]).unsqueeze(0)",
            "torch.arange(N)[None, None, None, :]",
        ]
    )


def _at_least(x: str, y: str, choose: Choose) -> str:
    """x >= y, for integers."""
    return choose(
        [
            f"{x} >= {y}",
            f"{y} <= {x}",
            f"~({x} < {y})",
            f"{x} > {y} - 1",
            f"{x} - {y} >= 0",
            f"{y} - {x} < 1",
            f"torch.ge({x}, {y})",
            f"({x}).ge({y})",
            f"torch.logical_not(torch.lt({x}, {y}))",
            f"({x} - {y}).clamp(min=-1) + 1 > 0",
            f"torch.where({x} < {y}, False, True)",
        ]
    )


def _shifted(x: str, offset: int) -> str:
    return x if offset == 0 else f"({x} + {offset})" if offset > 0 else f"({x} - {-offset})"


def _causal(tree: Tree, choose: Choose) -> str:
    n = tree.number
    compared = _at_least(_shifted(_row(choose), n), _column(choose), choose)
    return choose(
        [
            compared,
            compared,
            f"torch.ones(M, N, dtype=torch.bool).tril({n})",
            f"torch.tril(torch.ones(M, N), diagonal={n}) > 0",
            f"torch.tril(torch.ones(M, N), {n}).bool()",
            f"torch.ones(M, N).triu({n + 1}) == 0",
            f"~torch.triu(torch.ones((M, N), dtype=torch.bool), diagonal={n + 1})",
            f"torch.full((M, N), 1.0).tril({n}) != 0",
            f"torch.full((M, N), float('-inf')).triu({n + 1}) == 0",
            f"torch.tril(q.new_ones(M, N), {n})[None, None].to(torch.bool)",
        ]
    )


def _window(tree: Tree, choose: Choose) -> str:
    n, row, column = tree.number, _row(choose), _column(choose)
    return choose(
        [
            f"{row} - {column} < {n}",
            f"{column} > {row} - {n}",
            f"{column} - {row} >= {1 - n}",
            f"({row} - {column}).lt({n})",
            f"~({row} >= {column} + {n})",
            f"torch.ones(M, N, dtype=torch.bool).triu({1 - n})",
            f"torch.tril(torch.ones(M, N), {-n}) == 0",
        ]
    )


def _prefix(tree: Tree, choose: Choose) -> str:
    n, column = tree.number, _column(choose)
    return choose(
        [f"{column} < {n}", f"{n} > {column}", f"{column} <= {n - 1}", f"~({column} >= {n})"]
    )


def _chunk(tree: Tree, choose: Choose) -> str:
    n, row, column = tree.number, _row(choose), _column(choose)
    return choose(
        [
            f"{row} // {n} == {column} // {n}",
            f"torch.eq({row} // {n}, {column} // {n})",
            f"torch.div({row}, {n}, rounding_mode='floor') "
            f"== torch.div({column}, {n}, rounding_mode='floor')",
            f"({row} // {n} - {column} // {n}) == 0",
            f"~(torch.floor_divide({row}, {n}) != torch.floor_divide({column}, {n}))",
            f"{row} - {row} % {n} == {column} - {column} % {n}",
            f"({row} // {n} - {column} // {n}).abs() < 1",
        ]
    )


def _dilated(tree: Tree, choose: Choose) -> str:
    n, row, column = tree.number, _row(choose), _column(choose)
    return choose(
        [
            f"({row} - {column}) % {n} == 0",
            f"({column} - {row}) % {n} == 0",
            f"torch.remainder({row} - {column}, {n}).eq(0)",
            f"{row} % {n} == {column} % {n}",
            f"~(({row} - {column}) % {n}).bool()",
            f"({row} - {column}) % {n} < 1",
        ]
    )


_BATCH = "torch.arange(B)[:, None, None, None]"
_ROW = "torch.arange(M)[None, None, :, None]"
_COLUMN = "torch.arange(N)[None, None, None, :]"


def _segment(tree: Tree, choose: Choose) -> str:
    row = choose(
        [
            "row_ids[:, None, :, None]",
            "row_ids.unsqueeze(1).unsqueeze(-1)",
            "row_ids.view(B, 1, M, 1)",
            "row_ids.unsqueeze(-1)[:, None]",
            f"row_ids[{_BATCH}, {_ROW}]",
        ]
    )
    column = choose(
        [
            "column_ids[:, None, None, :]",
            "column_ids[:, None, None]",
            "column_ids.view(B, 1, 1, N)",
            "column_ids.unsqueeze(1).unsqueeze(1)",
            f"column_ids[{_BATCH}, {_COLUMN}]",
        ]
    )
    return choose(
        [
            f"{row} == {column}",
            f"{column} == {row}",
            f"({row} - {column}) == 0",
            f"~torch.ne({row}, {column})",
            f"({row} == {column}).expand(B, 1, M, N)",
            f"({row} - {column}).abs() < 1",
        ]
    )


def _padding(tree: Tree, choose: Choose) -> str:
    shaped = choose(
        [
            "{}[:, None, None, :]",
            "{}.unsqueeze(1).unsqueeze(2)",
            "{}.view(B, 1, 1, N)",
            "{}[:, None, None]",
            "{}[:, None, None, :].expand(B, 1, M, N)",
            f"{{}}[{_BATCH}, {_COLUMN}]",
        ]
    )
    return choose(
        [
            shaped.format("pad_bool"),
            shaped.format("pad.bool()"),
            shaped.format("pad") + " != 0",
            shaped.format("pad") + " == 1",
            shaped.format("pad") + " > 0",
            f"(1 - {shaped.format('pad')}) == 0",
            f"~{shaped.format('(pad == 0)')}",
            f"1.0 - {shaped.format('pad.float()')} < 0.5",
        ]
    )


def _and(tree: Tree, choose: Choose) -> str:
    x, y = (part.written(choose) for part in tree.parts)
    return choose(
        [
            f"{x} & {y}",
            f"{x} & {y}",
            f"torch.logical_and({x}, {y})",
            f"{x} * {y}",
            f"{x}.logical_and({y})",
            f"~(~{x} | ~{y})",
            f"torch.where({x}, {y}, False)",
            f"q.new_ones((), dtype=torch.bool) & {x} & {y}",
            f"({x}.float() * {y}.float()).bool()",
            f"{x}.int() + {y}.int() == 2",
        ]
    )


def _or(tree: Tree, choose: Choose) -> str:
    x, y = (part.written(choose) for part in tree.parts)
    return choose(
        [
            f"{x} | {y}",
            f"{x} | {y}",
            f"torch.logical_or({x}, {y})",
            f"~(~{x} & ~{y})",
            f"torch.where({x}, True, {y})",
            f"q.new_zeros((), dtype=torch.bool) | {x} | {y}",
            f"{x}.int() + {y}.int() > 0",
            f"torch.maximum({x}.int(), {y}.int()) == 1",
        ]
    )


def _not(tree: Tree, choose: Choose) -> str:
    (x,) = (part.written(choose) for part in tree.parts)
    return choose(
        [
            f"~{x}",
            f"torch.logical_not({x})",
            f"{x} == False",
            f"{x} ^ True",
            f"1 - {x}.int() > 0",
            f"{x}.logical_not()",
        ]
    )


_WRITERS: dict[str, Callable[[Tree, Choose], str]] = {
    "causal": _causal,
    "window": _window,
    "prefix": _prefix,
    "chunk": _chunk,
    "dilated": _dilated,
    "segment": _segment,
    "padding": _padding,
    "And": _and,
    "Or": _or,
    "Not": _not,
}

# What a row without keys yields, by how the mask is applied.
_APPLIED: dict[str, EmptyRow] = {
    "F.scaled_dot_product_attention(q, k, v, attn_mask={mask})": EmptyRow.ZERO,
    "F.scaled_dot_product_attention(q, k, v, torch.where({mask}, 0.0, float('-inf')))": (
        EmptyRow.ZERO
    ),
    "torch.softmax(({scores}).masked_fill(~{mask}, float('-inf')), -1) @ v": EmptyRow.NAN,
    "({scores}).masked_fill({mask} == 0, -torch.inf).softmax(-1) @ v": EmptyRow.NAN,
    "torch.softmax(torch.where({mask}, {scores}, float('-inf')), -1) @ v": EmptyRow.NAN,
    "torch.softmax({scores} + torch.where({mask}, 0.0, float('-inf')), -1) @ v": EmptyRow.NAN,
    "torch.softmax({scores} + q.new_zeros({mask}.shape)"
    ".masked_fill({mask}.logical_not(), float('-inf')), -1) @ v": EmptyRow.NAN,
    "torch.softmax(({scores}).masked_fill(~{mask}, torch.finfo(q.dtype).min), -1) @ v": (
        EmptyRow.UNIFORM
    ),
    "F.softmax(torch.where({mask}, {scores}, torch.finfo(q.dtype).min), dim=-1) @ v": (
        EmptyRow.UNIFORM
    ),
    "torch.softmax({scores} + (1.0 - {mask}.to(q.dtype)) * torch.finfo(q.dtype).min, -1) @ v": (
        EmptyRow.UNIFORM
    ),
    "torch.softmax({scores} "
    "+ torch.where({mask}, q.new_zeros(()), torch.finfo(q.dtype).min), -1) @ v": (EmptyRow.UNIFORM),
}


@dataclass(frozen=True)
class Written:
    """A function that applies a tree, its source, and what an empty row must yield."""

    tree: Tree
    case: Case
    source: str
    empty_row: EmptyRow

    @staticmethod
    def of(tree: Tree, case: Case, seed: int) -> Written:
        drawn = random.Random(seed)
        template = drawn.choice(list(_APPLIED))
        mask = tree.written(drawn.choice)
        shaped = ["mask", "mask[(None,) * (4 - mask.dim())]"]
        shaped += ["mask.expand(B, 1, M, N)", "mask.expand(B, H, M, N)"]
        scores = drawn.choice(["q @ k.transpose(-2, -1) / 2", "0.5 * (q @ k.mT)"])
        names = ", ".join(case.inputs())
        sizes = ", ".join(str(n) for n in (case.batch, HEADS, case.rows, case.columns))
        source = (
            f"def attention({names}):\n"
            f"    B, H, M, N = {sizes}\n"
            f"    mask = {mask}\n"
            f"    mask = {drawn.choice(shaped)}\n"
            f"    return {template.format(mask='mask', scores=scores)}\n"
        )
        return Written(tree, case, source, _APPLIED[template])

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        scope: dict[str, Any] = {"torch": torch, "F": F}
        exec(self.source, scope)
        function: Callable[..., torch.Tensor] = scope["attention"]
        return function

    def checked(self, options: Options | None = None) -> Outcome:
        """The outcome of the passes, which must be accurate."""
        inputs = tuple(self.case.inputs().values())
        outcome = run(self.function, *inputs, options=options)
        exact = self.function(*in_float64(inputs))
        assert_as_accurate(outcome.result, outcome.eager, exact)
        return outcome


written = st.builds(Written.of, trees(_static), cases, st.integers(0, 10**6))
written_with_data = st.builds(
    Written.of,
    st.one_of(
        trees(st.one_of(_static, _data)),
        st.builds(lambda x, y: Tree("And", 0, (x, y)), trees(_static), _data),
    ),
    cases,
    st.integers(0, 10**6),
)


# Shrinking an example takes minutes of compiling; its source is printed and can be cut by hand.
PHASES = (Phase.explicit, Phase.generate)


def lowered(outcome: Outcome) -> Lowered:
    """The one site, which must have been lowered."""
    (record,) = outcome.sites
    assert record.lowered, record.reason
    (result,) = outcome.analyses[0].results
    assert isinstance(result, Lowered)
    return result


# -- properties ------------------------------------------------------------------------------------


@pytest.mark.untraced
@settings(max_examples=60, phases=PHASES)
@given(written)
def test_a_mask_without_data_is_recovered_as_a_predicate(example: Written) -> None:
    note(example.source)
    outcome = example.checked()
    case, wanted = example.case, example.tree.dense(example.case)
    if not wanted.any():  # nothing to attend to: may as well be left alone
        return
    site = lowered(outcome).site
    assert site.sides == ()
    values = positions((site.spec.mask,), torch.zeros(()), (1, 1, case.rows, case.columns))
    found = torch.as_tensor(evaluate_dense(site.spec.mask, values, ()))
    assert torch.equal(found.expand(case.rows, case.columns), wanted)
    if site.spec.empty_row is EmptyRow.IMPOSSIBLE:
        assert wanted.any(-1).all()
    else:
        assert site.spec.empty_row is example.empty_row


@pytest.mark.untraced
@settings(max_examples=60, phases=PHASES)
@given(written_with_data)
def test_a_mask_with_data_is_never_wrong(example: Written) -> None:
    note(example.source)
    outcome = example.checked()
    if example.tree.dense(example.case).any():
        lowered(outcome)


@pytest.mark.parametrize("template", _APPLIED, ids=[f"{i}" for i in range(len(_APPLIED))])
@pytest.mark.parametrize("rows", [1, 6])
def test_rows_without_keys_keep_their_meaning(template: str, rows: int) -> None:
    """Padding shuts every key out of one batch item, causal with a past out of the first row."""
    tree = Tree("And", 0, (Tree("padding"), Tree("causal", -1 if rows > 1 else 2)))
    case = Case(2, rows, 7, 5)
    triangle = f"torch.ones({rows}, 7).tril({tree.parts[1].number}).bool()"
    source = (
        f"def attention({', '.join(case.inputs())}):\n"
        f"    mask = pad_bool[:, None, None] & {triangle}\n"
        f"    return {template.format(mask='mask', scores='0.5 * (q @ k.mT)')}\n"
    )
    example = Written(tree, case, source, _APPLIED[template])
    inputs = case.inputs()
    inputs["pad_bool"][0] = False
    outcome = run(example.function, *inputs.values())
    assert_as_accurate(
        outcome.result, outcome.eager, example.function(*in_float64(tuple(inputs.values())))
    )
    spec = lowered(outcome).site.spec
    assert spec.empty_row is example.empty_row
    empty = outcome.result[0]
    if example.empty_row is EmptyRow.NAN:
        assert empty.isnan().all()
    elif example.empty_row is EmptyRow.ZERO:
        assert not empty.any()
    else:
        mean = inputs["v"][0].mean(-2, keepdim=True)
        torch.testing.assert_close(empty, mean.expand_as(empty))


@pytest.mark.parametrize(
    ("dtype", "filled"),
    [
        *itertools.product(
            (torch.float16, torch.bfloat16, torch.float32, torch.float64), ("fill", "add")
        ),
    ],
)
def test_rows_without_keys_are_uniform_in_every_dtype(dtype: torch.dtype, filled: str) -> None:
    def attention(q, k, v):
        mask = torch.ones(7, 7, dtype=torch.bool).tril(-1)
        low = torch.finfo(q.dtype).min
        scores = q @ k.mT
        scores = (
            scores.masked_fill(~mask, low)
            if filled == "fill"
            else scores + (1 - mask.to(q.dtype)) * low
        )
        return torch.softmax(scores, -1) @ v

    # Scores of some size, so that a minimum that does not absorb them is seen.
    q, k, v = (3 * torch.randn(2, 2, 7, 4).to(dtype) for _ in range(3))
    outcome = run(attention, q, k, v)
    lowered(outcome)
    exact = attention(q.double(), k.double(), v.double())
    assert_as_accurate(outcome.result, outcome.eager, exact)


def test_a_bias_that_shuts_out_a_row_keeps_its_meaning() -> None:
    """A mask that comes as a tensor of 0 and -inf is a bias; its empty rows stay NaN."""

    def attention(q, k, v, bias):
        return torch.softmax(q @ k.mT + bias, -1) @ v

    q, k, v = (torch.randn(2, 2, 7, 4) for _ in range(3))
    bias = torch.zeros(2, 1, 7, 7)
    bias[1, 0, 3] = -torch.inf
    outcome = run(attention, q, k, v, bias)
    exact = attention(*in_float64((q, k, v, bias)))
    assert exact[1, :, 3].isnan().all()
    assert_as_accurate(outcome.result, outcome.eager, exact)


# -- that these tests can fail ---------------------------------------------------------------------


MUTATED = Written(
    Tree("And", 0, (Tree("And", 0, (Tree("causal"), Tree("window", 4))), Tree("padding"))),
    Case(2, 12, 12, 3),
    """def attention(q, k, v, row_ids, column_ids, pad, pad_bool):
    r, c = torch.arange(12)[:, None], torch.arange(12)[None]
    mask = (c <= r) & (r - c < 4) & pad_bool[:, None, None]
    return torch.softmax((q @ k.mT).masked_fill(~mask, torch.finfo(q.dtype).min), -1) @ v
""",
    EmptyRow.UNIFORM,
)


def _accurate(mutate: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    outcome = MUTATED.checked()
    exact = MUTATED.function(*in_float64(tuple(MUTATED.case.inputs().values())))
    try:
        assert_as_accurate(mutate(outcome.result), outcome.eager, exact)
    except AssertionError:
        return False
    return True


def test_a_result_that_is_a_little_off_is_seen() -> None:
    assert _accurate(lambda result: result)
    assert not _accurate(lambda result: result * 1.5)
    assert not _accurate(lambda result: result + 1e-4 * torch.randn_like(result))
    assert not _accurate(lambda result: result.masked_fill(result == result.max(), torch.nan))


@pytest.mark.parametrize("dropped", range(3))
def test_a_dropped_conjunct_is_seen(dropped: int) -> None:
    spec = lowered(MUTATED.checked()).site.spec
    kept = [part for i, part in enumerate(spec.mask.args) if i != dropped]
    assert len(kept) == 2
    inputs = MUTATED.case.inputs()
    wrong = replace(spec, mask=sympy.And(*kept))
    operands = [inputs["pad_bool"]] * len(spec.operands)

    def computed(spec: AttentionSpec) -> torch.Tensor:
        return reference_attention(inputs["q"], inputs["k"], inputs["v"], operands, (), spec)

    right = computed(spec)
    assert _accurate(lambda result: right)
    assert not _accurate(lambda result: computed(wrong))


@pytest.mark.parametrize("dropped", range(3))
def test_a_matcher_that_drops_a_conjunct_is_refused(
    dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = match_product.score_parts

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        parts = original(*args, **kwargs)
        kept = [part for i, part in enumerate(parts.mask.args) if i != dropped]
        return replace(parts, mask=sympy.And(*kept))

    monkeypatch.setattr(match_product, "score_parts", forgetful)
    outcome = MUTATED.checked()
    (record,) = outcome.sites
    assert not record.lowered
    assert "validat" in (record.reason or "") or "mask" in (record.reason or "")
    with pytest.raises(AssertionError):
        MUTATED.checked(Options(validate=False))


def _two_causal_masks(q, k, v):
    low, row, column = torch.finfo(q.dtype).min, torch.arange(9)[:, None], torch.arange(9)
    masks = torch.where(column > row, low, 0.0) + torch.where(column < row - 2, low, 0.0)
    return masks


def test_masks_that_are_summed_before_they_are_added_are_taken_apart() -> None:
    def attention(q, k, v):
        return torch.softmax(q @ k.mT / 8 + _two_causal_masks(q, k, v), -1) @ v

    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    outcome = run(attention, q, k, v)
    assert describe(lowered(outcome).site.spec.mask) == "causal & window(3)"
    torch.testing.assert_close(outcome.result, outcome.eager)


def test_summed_masks_beside_a_sink() -> None:
    def attention(q, k, v, sink):
        scores = q @ k.mT / 8 + _two_causal_masks(q, k, v)
        scores = torch.cat([scores, sink.view(1, -1, 1, 1).expand(2, -1, 9, 1)], -1)
        return torch.softmax(scores, -1)[..., :-1] @ v

    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    outcome = run(attention, q, k, v, torch.randn(3))
    lowered(outcome)
    torch.testing.assert_close(outcome.result, outcome.eager)


def test_summed_masks_that_overflow_in_rows_without_keys_are_refused() -> None:
    def attention(q, k, v, first, second):
        low = torch.finfo(q.dtype).min
        masks = (~first)[:, None, None].float() * low + (~second)[:, None, None].float() * low
        return torch.softmax(q @ k.mT + masks, -1) @ v

    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    first, second = (torch.rand(2, 5) > 0.5 for _ in range(2))
    first[0] = second[0] = False
    outcome = run(attention, q, k, v, first, second)
    assert not outcome.sites[0].lowered
    assert "overflows" in str(outcome.sites[0].reason)
    torch.testing.assert_close(outcome.result, outcome.eager, equal_nan=True)


def test_infinite_score_that_is_no_mask_is_refused() -> None:
    def attention(q, k, v):
        scores = torch.tanh(q @ k.mT) * 5
        return torch.softmax(scores.masked_fill(torch.eye(9, dtype=torch.bool), torch.inf), -1) @ v

    q, k, v = (torch.randn(2, 3, 9, 8) for _ in range(3))
    outcome = run(attention, q, k, v)
    assert not outcome.sites[0].lowered
    torch.testing.assert_close(outcome.result, outcome.eager, equal_nan=True)
