"""Which buffers are read as masks, and that what is read is what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from adaattn_compiler import explain
from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.passes.buffers import as_expression
from adaattn_compiler.passes.resizing import Resizing
from adaattn_compiler.passes.slices import Slice
from adaattn_compiler.predicates import describe
from adaattn_compiler.spec import k, q

INF = float("inf")


def read(buffer: torch.Tensor) -> Any:
    return as_expression(buffer, q, k)


def held(expression: Any, buffer: torch.Tensor) -> torch.Tensor:
    """What the expression says of each element."""
    rows, columns = buffer.shape[-2:]
    values = positions((expression,), buffer, (1, 1, rows, columns))
    return torch.as_tensor(evaluate_dense(expression, values, ())).expand(rows, columns)


def assert_recognized(buffer: torch.Tensor, mask: str | None = None) -> None:
    expression = read(buffer)
    assert expression is not None
    found = held(expression, buffer).to(buffer.dtype)
    assert torch.equal(found, buffer.reshape(buffer.shape[-2:]))
    if mask is not None:
        assert describe(expression) == mask


def indices(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(rows)[:, None], torch.arange(columns)[None]


def triangle(rows: int = 8, columns: int = 8, diagonal: int = 0) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).tril(diagonal)


def band(rows: int, columns: int, before: int, after: int) -> torch.Tensor:
    r, c = indices(rows, columns)
    return (c >= r - before) & (c <= r + after)


def blocks(rows: int, columns: int, size: int) -> torch.Tensor:
    r, c = indices(rows, columns)
    return r // size == c // size


# -- recognized ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), (9, 5), (1, 7), (7, 1), (64, 64)])
@pytest.mark.parametrize("diagonal", [-2, -1, 0, 1, 3])
def test_triangles(shape: tuple[int, int], diagonal: int) -> None:
    for mask in (triangle(*shape, diagonal), ~triangle(*shape, diagonal)):
        if mask.all() or not mask.any():
            assert read(mask) is None
        else:
            assert_recognized(mask)


def test_names_of_recognized_buffers() -> None:
    assert_recognized(triangle(), "causal")
    assert_recognized(triangle(diagonal=2), "causal(+2)")
    assert_recognized(~triangle().T, "causal(-1)")
    assert_recognized(band(16, 16, 3, 0), "causal & window(4)")
    assert_recognized(blocks(16, 16, 4), "chunk(4)")
    assert_recognized(triangle(12, 20, 8), "causal(+8)")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ],
)
def test_dtypes(dtype: torch.dtype) -> None:
    for mask in (triangle(), ~triangle(), band(9, 7, 2, 1), blocks(9, 9, 3)):
        assert_recognized(mask.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("low", [-INF, -1e4, -0.5, "min"])
def test_additive_masks(dtype: torch.dtype, low: Any) -> None:
    # A scalar of torch.where is float32.
    number = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min) if low == "min" else low
    for mask in (triangle(), band(9, 7, 2, 1), blocks(9, 9, 3)):
        buffer = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, number)
        expression = read(buffer)
        assert torch.equal(held(expression, buffer).to(dtype), buffer)
        # Exactly the number: what is taken for -inf must be it.
        assert expression.has(sympy.S.NegativeInfinity) == (number == -INF)


def test_signs_of_zero_are_one_value() -> None:
    buffer = torch.zeros(6, 6).masked_fill(~triangle(6, 6), -INF)
    buffer[3, 1] = -0.0
    assert_recognized(buffer)


@pytest.mark.parametrize("lead", [(1,), (1, 1), (1, 1, 1)])
def test_leading_dimensions_of_one(lead: tuple[int, ...]) -> None:
    assert_recognized(triangle().reshape(*lead, 8, 8))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 13), st.integers(0, 13))
def test_bands(rows: int, columns: int, before: int, after: int) -> None:
    mask = band(rows, columns, before, after)
    for buffer in (mask, ~mask, mask.float(), torch.zeros(mask.shape).masked_fill(mask, -INF)):
        expression = read(buffer)
        if expression is not None:
            assert torch.equal(held(expression, buffer).to(buffer.dtype), buffer)
        elif mask.any() and not mask.all():
            raise AssertionError("a band was not recognized")


@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6))
def test_blocks(rows: int, columns: int, size: int) -> None:
    mask = blocks(rows, columns, size)
    if mask.all() or not mask.any():
        assert read(mask) is None
    else:
        assert_recognized(mask)
        assert_recognized(~mask)


@given(st.integers(0, 2**30), st.integers(1, 5), st.integers(1, 5), st.sampled_from([2, 3]))
def test_whatever_is_recognized_is_what_it_holds(
    seed: int, rows: int, columns: int, values: int
) -> None:
    drawn = torch.randint(0, values, (rows, columns), generator=torch.Generator().manual_seed(seed))
    for buffer in (drawn, drawn.bool(), -1e9 * drawn):
        expression = read(buffer)
        if expression is not None:
            assert torch.equal(held(expression, buffer).to(buffer.dtype), buffer)


def test_views_are_read_as_they_are_strided() -> None:
    whole = triangle(16, 16)
    assert_recognized(whole[::2, ::2], "causal")
    assert_recognized(whole[4:12, :12], "causal(+4)")
    assert_recognized(whole.T.contiguous().T, "causal")


def test_rows_and_columns_are_where_they_are_read() -> None:
    expression = as_expression(triangle(32, 32), q + 4, k)
    assert describe(expression) == "causal(+4)"


def test_parameters_are_read_without_a_graph() -> None:
    buffer = torch.nn.Parameter(torch.zeros(6, 6).masked_fill(~triangle(6, 6), -INF))
    assert read(buffer) is not None


# -- left alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask", [triangle(), ~triangle(), band(8, 8, 2, 1), blocks(8, 8, 4), triangle(5, 9, 2)]
)
def test_one_other_element_is_seen(mask: torch.Tensor) -> None:
    rows, columns = mask.shape
    for place in range(rows * columns):
        near = mask.clone()
        near.view(-1)[place] ^= True
        expression = read(near)
        # Some corners make another mask of it; none may pass for the one it is not.
        if expression is not None:
            assert torch.equal(held(expression, near), near)
            assert not torch.equal(held(expression, near), mask)


@pytest.mark.parametrize(
    "place", [(0, 0), (0, 127), (127, 0), (127, 127), (64, 64), (64, 65), (1, 100), (100, 1)]
)
def test_one_other_element_of_a_large_triangle_is_seen(place: tuple[int, int]) -> None:
    for buffer in (
        triangle(128, 128),
        torch.zeros(128, 128).masked_fill(~triangle(128, 128), -INF),
    ):
        near = buffer.clone()
        near[place] = ~near[place] if near.dtype == torch.bool else 0.0 - INF - near[place]
        if torch.equal(near.nan_to_num(), buffer.nan_to_num()):
            near[place] = 0
        expression = read(near)
        assert expression is None or torch.equal(held(expression, near).to(near.dtype), near)


@pytest.mark.parametrize(
    "buffer",
    [
        torch.tensor(True),
        torch.ones(8, dtype=torch.bool),
        torch.ones(1, 1, dtype=torch.bool),
        torch.ones(8, 8, dtype=torch.bool),
        torch.zeros(8, 8),
        torch.zeros(0, 8),
        torch.zeros(8, 0, dtype=torch.bool),
        torch.full((8, 8), float("nan")),
    ],
    ids=["scalar", "vector", "one", "true", "zero", "no rows", "no columns", "nan"],
)
def test_what_has_no_two_values_is_left_alone(buffer: torch.Tensor) -> None:
    assert read(buffer) is None


@pytest.mark.parametrize("lead", [(2,), (2, 1), (1, 3), (3, 1, 1)])
def test_more_than_one_mask_is_left_alone(lead: tuple[int, ...]) -> None:
    """Even where all are alike: what differs between them is not looked for."""
    assert read(triangle().expand(*lead, 8, 8)) is None


@pytest.mark.parametrize("other", [2.0, -1.0, -INF, float("nan")])
@pytest.mark.parametrize("place", [(0, 0), (3, 3), (7, 7), (0, 7), (7, 0)])
def test_a_third_value_is_left_alone(other: float, place: tuple[int, int]) -> None:
    buffer = triangle().float()
    buffer[place] = other
    assert read(buffer) is None


def test_numbers_that_are_no_mask_are_left_alone() -> None:
    assert read(torch.randn(8, 8)) is None
    assert read(torch.eye(8)[torch.randperm(8, generator=torch.Generator().manual_seed(1))]) is None
    random = torch.randint(0, 2, (16, 16), generator=torch.Generator().manual_seed(2)).bool()
    assert read(random) is None
    assert read(torch.complex(triangle().float(), torch.zeros(8, 8))) is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    assert read(triangle().to(dtype)) is None


def test_tensors_without_readable_memory_are_left_alone() -> None:
    assert read(triangle().to("meta")) is None
    assert read(triangle().float().to_sparse()) is None


def test_plus_infinity_is_itself() -> None:
    buffer = torch.zeros(8, 8).masked_fill(~triangle(), INF)
    assert read(buffer).has(sympy.oo)


def test_buffers_too_large_to_compare_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import adaattn_compiler.passes.buffers as buffers

    monkeypatch.setattr(buffers, "_MOST_ELEMENTS", 64)
    assert read(triangle(8, 8)) is not None
    assert read(triangle(8, 9)) is None


def test_large_buffers_are_read() -> None:
    assert_recognized(triangle(2048, 2048), "causal")
    assert_recognized(band(1500, 1500, 255, 0), "causal & window(256)")


@pytest.mark.parametrize("held_rows", [2304, 4096])
def test_buffer_as_long_as_the_sequence_is_validated_at_short_lengths(held_rows: int) -> None:
    """Where all of a buffer is taken there is no slice whose size could be made smaller."""
    rows = 2304

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mask = torch.ones(1, 1, held_rows, held_rows, dtype=torch.bool).tril()
            self.register_buffer("mask", mask)

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            scores = q @ k.mT / 2.0
            scores = scores.masked_fill(~self.mask[:, :, :rows, :rows], -INF)
            return scores.softmax(-1) @ v

    # More scores than are ever computed for a validation.
    explanation = explain(Causal(), *(torch.randn(1, 8, rows, 4) for _ in range(3)))
    assert [(site.lowered, site.mask) for site in explanation.sites] == [(True, "causal")]


class Elsewhere(torch.Tensor):
    """Stands for a tensor on a GPU: what is made of it stays there, but for `cpu`."""

    def cpu(self, *_: Any) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
def test_a_buffer_on_a_gpu_meets_random_inputs_on_the_cpu(dtype: torch.dtype) -> None:
    node = fx.Graph().placeholder("mask")
    buffer = triangle(4, 4).to(dtype).as_subclass(Elsewhere)
    assert type(buffer[:2] + 1) is Elsewhere
    sizes = dict.fromkeys("BMN", 4)
    values = Slice((node,), (), {node: buffer}).run({}, Resizing(sizes, sizes, {}))
    assert type(values[node]) is torch.Tensor
    assert torch.equal(values[node].bool(), triangle(4, 4))
