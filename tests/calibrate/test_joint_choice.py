"""Rank and precision are chosen together: choosing one after the other breaks budgets or wastes
time."""

from __future__ import annotations

import itertools

import pytest
import torch
from costs import bfloat16_is_rounded_to, cost
from specs import problem_of, random_inputs

from adaattn_compiler.calibrate.board import exactly
from adaattn_compiler.calibrate.measure import decided, unguarded
from adaattn_compiler.calibrate.select import Options, Selection, by_price, weighed, within
from adaattn_compiler.decision import HeadDecision, Pattern, Precision
from adaattn_compiler.kernels.audit import relative_error
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.passes.choices import SiteKey

# Candidates of the tables below: each representation in each precision.
WHOLE, WIDE, NARROW = range(3)
FULL, HALF = range(2)
PLACES = list(itertools.product((WHOLE, WIDE, NARROW), (FULL, HALF)))
# Time is a product of both; of relative errors of independent parts the squares add up.
KEYS_TAKE, BITS_TAKE = (1.0, 0.5, 0.25), (1.0, 0.4)


def table(of_keys: list[tuple[float, ...]], of_bits: list[tuple[float, ...]]) -> Options:
    """Errors [representations][heads] and [precisions][heads]; damage is the square."""
    error = torch.tensor(
        [
            [(a**2 + b**2) ** 0.5 for a, b in zip(of_keys[i], of_bits[j], strict=True)]
            for i, j in PLACES
        ]
    ).double()
    seconds = torch.tensor([KEYS_TAKE[i] * BITS_TAKE[j] for i, j in PLACES]).double()
    return Options(seconds[:, None], error, error.square())


def only(options: Options, which: list[int]) -> Options:
    """Some of the candidates."""
    return Options(options.seconds[which], options.error[which], options.damage[which])


REPRESENTATIONS = [i for i, (_, bits) in enumerate(PLACES) if bits == FULL]
PRECISIONS = [i for i, (keys, _) in enumerate(PLACES) if keys == WHOLE]


def apart(options: Options, limit: float) -> tuple[int, ...]:
    """Each head's representation by itself, and its precision by itself, each within a limit."""
    keys = within(only(options, REPRESENTATIONS), limit)
    bits = within(only(options, PRECISIONS), limit)
    return tuple(PLACES.index(place) for place in zip(keys, bits, strict=True))


def seconds(options: Options, chosen: tuple[int, ...]) -> float:
    return float(options.seconds[list(chosen)].sum())


def largest(options: Options, chosen: tuple[int, ...]) -> float:
    return float(options.error[list(chosen), range(len(chosen))].max())


# -- within a budget of each head ------------------------------------------------------------------

# Heads: bits cost little; keys cost little; both cost much; both cost nearly the whole budget of 1.
TABLE = table(
    [(0, 0, 0, 0), (0.8, 0.1, 2.0, 0.9), (0.95, 0.2, 3.0, 2.0)],
    [(0, 0, 0, 0), (0.1, 0.7, 1.5, 0.8)],
)


def test_each_with_the_whole_budget_breaks_it() -> None:
    assert largest(TABLE, apart(TABLE, 1.0)) > 1.0
    assert largest(TABLE, within(TABLE, 1.0)) <= 1.0


def test_each_with_half_the_budget_wastes_time() -> None:
    split, joint = apart(TABLE, 0.5), within(TABLE, 1.0)
    assert largest(TABLE, split) <= 1.0
    assert seconds(TABLE, joint) < 0.7 * seconds(TABLE, split)
    assert all(TABLE.seconds[a] <= TABLE.seconds[b] for a, b in zip(joint, split, strict=True))


def test_the_joint_choice_is_the_fastest_that_there_is() -> None:
    """Head by head, against all there are."""
    found = within(TABLE, 1.0)
    assert [PLACES[i] for i in found] == [
        (NARROW, HALF),
        (NARROW, HALF),
        (WHOLE, FULL),
        (WHOLE, HALF),
    ]


# -- within a budget of the model ------------------------------------------------------------------

KEY = SiteKey("a", 0)
# Keys of the first head may go for nothing, its bits at .95; the second is the other way around.
SHARED = table([(0, 0), (0, 0.85), (0, 0.9)], [(0, 0), (0.95, 0)])


def damage(options: Options, chosen: tuple[int, ...]) -> float:
    return float(options.damage[list(chosen), range(len(chosen))].sum())


def of_model(options: Options, limit: float) -> tuple[int, ...]:
    """By price, a selection holding while all its damage is within the limit."""

    def holds(selection: Selection) -> bool:
        return damage(options, selection[KEY]) <= limit

    return by_price({KEY: options}, holds, steps=30)[KEY]


def model_apart(limit: float) -> tuple[int, ...]:
    keys = of_model(only(SHARED, REPRESENTATIONS), limit)
    bits = of_model(only(SHARED, PRECISIONS), limit)
    return tuple(PLACES.index(place) for place in zip(keys, bits, strict=True))


def test_a_budget_of_the_model_is_broken_by_choosing_apart() -> None:
    assert damage(SHARED, model_apart(1.0)) > 1.0
    assert damage(SHARED, of_model(SHARED, 1.0)) <= 1.0


def test_a_budget_of_the_model_is_wasted_by_halves() -> None:
    halves, joint = model_apart(0.5), of_model(SHARED, 1.0)
    assert damage(SHARED, halves) <= 0.1
    assert damage(SHARED, joint) > 0.7
    assert seconds(SHARED, joint) < 0.8 * seconds(SHARED, halves)


def test_a_price_weighs_keys_and_bits_alike() -> None:
    """Of the candidates that a price could take, none is faster and does less damage."""
    for price in (1e-3, 0.1, 0.5, 1.0, 10.0):
        for head, chosen in enumerate(weighed(TABLE, price)):
            better = (TABLE.seconds[:, 0] <= TABLE.seconds[chosen, 0]) & (
                TABLE.damage[:, head] < TABLE.damage[chosen, head]
            )
            assert not bool(better.any())


# -- with errors as measured -----------------------------------------------------------------------

PATTERNS = (None, *(Pattern(window) for window in (384, 256, 192, 128, 64)))
STAGES = (Precision.FP32, Precision.BF16)
GRID = [
    HeadDecision(pattern=pattern, scores=bits, values=bits)
    for pattern, bits in itertools.product(PATTERNS, STAGES)
]


def measured(problem: Problem) -> Options:
    """Biases by distance: what windows leave out weighs about as much as rounding does."""
    tensors, _ = random_inputs(problem)
    slopes = [torch.tensor([0.02, 0.03, 0.04, 0.06])]
    given = (*tensors, slopes, [])
    exact = exactly(KEY, problem, given)
    errors = [
        relative_error(decided(unguarded(problem, [head] * 4), given), exact).amax(0)
        for head in GRID
    ]
    times = [cost(head, problem) for head in GRID]
    error = torch.stack(errors).double()
    return Options(torch.tensor(times).double()[:, None], error, error.square())


def measured_apart(options: Options, limit: float) -> tuple[int, ...]:
    dense = [i for i, head in enumerate(GRID) if head.pattern is None]
    exact_bits = [i for i, head in enumerate(GRID) if head.scores == Precision.FP32]
    keys = [GRID[exact_bits[i]].pattern for i in within(only(options, exact_bits), limit)]
    bits = [GRID[dense[i]].scores for i in within(only(options, dense), limit)]
    return tuple(
        GRID.index(HeadDecision(pattern=pattern, scores=stage, values=stage))
        for pattern, stage in zip(keys, bits, strict=True)
    )


@pytest.mark.skipif(not bfloat16_is_rounded_to(), reason="bfloat16 is not rounded to")
def test_measured_errors_show_both() -> None:
    options = measured(problem_of("alibi", rows=512, columns=512))
    over, slower = [], []
    for limit in torch.logspace(-4, -1, 60).tolist():
        joint = within(options, limit)
        assert largest(options, joint) <= limit
        over.append(largest(options, measured_apart(options, limit)) / limit)
        split = measured_apart(options, limit / 2)
        assert largest(options, split) <= limit
        assert all(
            options.seconds[a] <= options.seconds[b] for a, b in zip(joint, split, strict=True)
        )
        slower.append(seconds(options, split) / seconds(options, joint))
    assert max(over) > 1.05
    assert max(slower) > 1.2
