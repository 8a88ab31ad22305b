"""Moving averages against their closed formula in fractions, and through a file."""

from __future__ import annotations

import json
import math
import struct
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaattn_compiler.runtime.averages import Average, MovingAverages

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
decays = st.floats(0, 1, exclude_max=True)
streams = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20)


def of(decay: float, values: list[tuple[float, ...]]) -> MovingAverages:
    averages = MovingAverages(decay)
    for value in values:
        averages = averages.updated({"entropy": value})
    return averages


def closed(decay: float, values: list[float]) -> Fraction:
    """sum_i d^(t-i) x_i / sum_i d^(t-i)"""
    weights = [Fraction(decay) ** i for i in reversed(range(len(values)))]
    return sum(w * Fraction(x) for w, x in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.75])
def test_sums_are_exact_where_floats_are(decay: float) -> None:
    """Few bits: nothing is rounded before the last division."""
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0]
    averages = of(decay, [(v, -v) for v in values])
    share = 1 - Fraction(decay) ** len(values)
    expected = closed(decay, values)
    assert [Fraction(s) for s in averages.averages["entropy"].sums] == [
        expected * share,
        -expected * share,
    ]
    assert averages.means()["entropy"] == (float(expected), -float(expected))


@given(decays, streams)
def test_means_are_those_of_the_closed_formula(
    decay: float, values: list[tuple[float, ...]]
) -> None:
    means = of(decay, values).means()["entropy"]
    for head, mean in enumerate(means):
        stream = [value[head] for value in values]
        largest = max(abs(x) for x in stream)
        share = 1 - decay ** len(values)
        # Each step rounds by an ulp of a sum of at most that size; the share divides it.
        bound = 4 * len(values) * 2.0**-53 * largest / max(share, 2.0**-53) + 1e-300
        assert abs(Fraction(mean) - closed(decay, stream)) <= bound


def test_the_first_mean_is_the_first_value() -> None:
    assert of(0.5, [(0.3, -7.25)]).means() == {"entropy": (0.3, -7.25)}


def test_updates_leave_the_value_they_start_from() -> None:
    empty = MovingAverages()
    one = empty.updated({"entropy": [1.0]})
    two = one.updated({"entropy": [2.0], "q_max": [5.0, 6.0]})
    assert empty.averages == {}
    assert one.averages["entropy"].count == 1
    assert two.averages["entropy"].count == 2
    assert two.averages["q_max"].count == 1


@given(decays, streams)
def test_averages_survive_a_file_to_the_bit(decay: float, values: list[tuple[float, ...]]) -> None:
    averages = of(decay, values)
    again = MovingAverages.from_json(averages.to_json())
    assert again == averages
    assert [struct.pack("<d", s) for s in again.averages["entropy"].sums] == [
        struct.pack("<d", s) for s in averages.averages["entropy"].sums
    ]
    # And go on as if nothing had happened.
    more = {"entropy": (1.5, -2.5)}
    assert again.updated(more) == averages.updated(more)


def test_averages_are_read_from_disk(tmp_path: Path) -> None:
    averages = of(0.99, [(0.1, 1e-310, -0.0), (math.pi, 1e308, 5e-324)])
    path = tmp_path / "averages.json"
    path.write_text(averages.to_json())
    assert MovingAverages.from_json(path.read_text()) == averages


def test_counts_of_merged_streams_add_up_and_means_lie_between() -> None:
    one, other = of(0.9, [(1.0,)] * 30), of(0.9, [(2.0,)] * 3)
    merged = one.merged(other)
    weights = (1 - 0.9**30, 1 - 0.9**3)
    assert merged.averages["entropy"].count == 33
    assert merged.means()["entropy"][0] == pytest.approx(
        (weights[0] + 2 * weights[1]) / sum(weights)
    )
    assert merged.means()["entropy"] == other.merged(one).means()["entropy"]


def test_merging_with_nothing_changes_nothing() -> None:
    averages = of(0.9, [(0.3, 0.7), (0.1, 0.2)])
    assert averages.merged(MovingAverages(0.9)) == averages
    assert MovingAverages(0.9).merged(averages) == averages


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="entropy of head 1"):
        MovingAverages().updated({"entropy": [1.0, value]})


def test_other_numbers_of_heads_and_decays_are_refused() -> None:
    one = of(0.5, [(1.0, 2.0)])
    with pytest.raises(ValueError, match="entropy of 1 heads, after 2"):
        one.updated({"entropy": [1.0]})
    with pytest.raises(ValueError, match="of 3 heads, after 2"):
        one.merged(of(0.5, [(1.0, 2.0, 3.0)]))
    with pytest.raises(ValueError, match="decays differ"):
        one.merged(MovingAverages(0.9))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_decays_that_forget_nothing_or_alternate_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay is"):
        MovingAverages(decay)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"decay": None},
        {"averages": {"entropy": {"sums": [1.0]}}},
        {"averages": {"entropy": {"sums": [1.0], "count": 0}}},
        {"averages": {"entropy": {"sums": ["x"], "count": 1}}},
        {"averages": {"entropy": {"sums": [float("nan")], "count": 1}}},
        {"averages": [1]},
    ],
)
def test_text_that_is_no_averages_is_refused(change: dict[str, object]) -> None:
    fields = json.loads(of(0.5, [(1.0,)]).to_json()) | change
    with pytest.raises(ValueError, match=r"averages|entropy|float"):
        MovingAverages.from_json(json.dumps(fields))
    with pytest.raises(ValueError, match=r"."):
        MovingAverages.from_json("[]")


def test_average_is_a_value() -> None:
    assert Average((1.0,), 1) == Average((1.0,), 1)
