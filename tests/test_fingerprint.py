"""Fingerprints: the same for what is the same in any process, different for what differs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from adaattn_compiler.fingerprint import data_fingerprint, weights_fingerprint


def _weights(*tensors: torch.Tensor) -> str:
    return weights_fingerprint((f"p{i}", tensor) for i, tensor in enumerate(tensors))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = (
        "import torch; from adaattn_compiler.fingerprint import weights_fingerprint as w\n"
        "a, b = torch.arange(99999.0).view(3, -1), torch.tensor(2, dtype=torch.int8)\n"
        "print(w([('a', a), ('b', b)]))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tensors = {"b": torch.tensor(2, dtype=torch.int8), "a": torch.arange(99999.0).view(3, -1)}
    assert said.stdout.split()[-1] == weights_fingerprint(tensors.items())


def test_wrappers_and_order_make_no_difference() -> None:
    model = _model()
    expected = weights_fingerprint(model.named_parameters())
    assert len(expected) == 32
    assert weights_fingerprint(torch.compile(model).named_parameters()) == expected
    assert weights_fingerprint(list(model.named_parameters())[::-1]) == expected
    model[0] = torch.compile(model[0])  # type: ignore[operator]
    assert weights_fingerprint(model.named_parameters()) == expected


def test_strides_make_no_difference() -> None:
    big = torch.randn(300, 500)
    assert _weights(big) == _weights(big.t().contiguous().t())
    assert _weights(big[:, ::2]) == _weights(big[:, ::2].contiguous())
    assert _weights(big) != _weights(big.t())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.index_fill(0, torch.tensor(17), 0.0),
        lambda t: t * 1.0001,
        lambda t: t.view(-1, 100),
        lambda t: t.half(),
        lambda t: t.view(torch.int32),
        lambda t: -t,
        lambda t: t[:-1],
    ],
)
def test_change_of_values_shape_or_dtype_shows(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    for tensor in (torch.randn(40, 50), torch.randn(400, 500)):
        assert _weights(tensor) != _weights(change(tensor))


def test_every_element_of_a_small_tensor_counts() -> None:
    for at in range(0, 4096, 97):
        tensor = torch.zeros(64, 64)
        tensor.view(-1)[at] = 1e-30
        assert _weights(tensor) != _weights(torch.zeros(64, 64))


def test_sampled_positions_are_spread_over_rows_and_columns() -> None:
    shape = (256, 1024)
    rows = torch.arange(256).view(-1, 1).expand(shape)
    for axis, size in ((0, 256), (1, 1024)):
        seen = 0
        for at in range(0, size, size // 16):
            marked = torch.zeros(shape)
            marked.narrow(axis, at, size // 16).fill_(1)
            seen += _weights(marked) != _weights(torch.zeros(shape))
        assert seen == 16
    assert _weights(rows) == _weights(rows.contiguous())


def test_swapped_names_show() -> None:
    a, b = torch.zeros(3), torch.ones(3)
    assert _weights(a, b) != _weights(b, a)
    assert _weights(a) != _weights(a, b)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int64,
        torch.bfloat16,
        torch.float64,
        torch.complex64,
        torch.complex128,
        torch.float8_e4m3fn,
    ],
)
def test_all_dtypes_have_fingerprints(dtype: torch.dtype) -> None:
    for size in ((), (0,), (7,), (100, 100)):
        ones = torch.ones(size).to(dtype)
        assert _weights(ones) == _weights(ones.clone())
        assert (_weights(ones) == _weights(torch.zeros(size).to(dtype))) == (size == (0,))


def test_not_a_number_is_compared_by_its_bits() -> None:
    assert _weights(torch.full((9,), torch.nan)) == _weights(torch.full((9,), torch.nan))


def test_conjugated_tensor_is_read_as_it_is() -> None:
    tensor = torch.randn(3, dtype=torch.complex64)
    assert _weights(tensor.conj()) == _weights(tensor.conj().clone().resolve_conj())
    assert _weights(tensor.conj()) != _weights(tensor)


def test_weights_that_are_not_loaded_are_refused() -> None:
    with pytest.raises(ValueError, match="'p0' has no data"):
        _weights(torch.empty(3, device="meta"))


def test_parts_of_a_tensor_subclass_are_read() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.zeros(3), torch.ones(3)
    assert _weights(TwoTensor(a, b)) == _weights(TwoTensor(a.clone(), b.clone()))
    assert _weights(TwoTensor(a, b)) != _weights(TwoTensor(b, a))


# --------------------------------------------------------------------------------------------- data


def test_data_is_the_same_whatever_its_strides_and_order_of_names() -> None:
    tokens = torch.arange(12).view(3, 4)
    first = [{"input_ids": tokens, "labels": (tokens, None, 1.5)}]
    again = [{"labels": [tokens.t().contiguous().t(), None, 1.5], "input_ids": tokens.clone()}]
    assert data_fingerprint(first) == data_fingerprint(iter(again))
    assert len(data_fingerprint(first)) == 32


@pytest.mark.parametrize(
    "others",
    [
        [],
        [{"a": torch.tensor([1, 2])}],
        [{"b": torch.tensor([1, 2, 3])}],
        [{"a": torch.tensor([[1, 2, 3]])}],
        [{"a": torch.tensor([1, 2, 3], dtype=torch.int32)}],
        [{"a": torch.tensor([1, 2, 4])}],
        [torch.tensor([1, 2, 3])],
        [[{"a": torch.tensor([1, 2, 3])}]],
        [{"a": torch.tensor([1, 2, 3]), "b": None}],
        [{"a": torch.tensor([1, 2, 3])}] * 2,
    ],
)
def test_other_data_has_another_fingerprint(others: list[Any]) -> None:
    assert data_fingerprint(others) != data_fingerprint([{"a": torch.tensor([1, 2, 3])}])


def test_texts_cannot_pass_for_structure() -> None:
    assert data_fingerprint([["a', 'b"]]) != data_fingerprint([["a", "b"]])
    assert data_fingerprint(["1"]) != data_fingerprint([1])
    assert data_fingerprint(["a\nb"]) != data_fingerprint(["a", "b"])


def test_what_has_no_fingerprint_is_named() -> None:
    with pytest.raises(TypeError, match="holds a object"):
        data_fingerprint([{"a": object()}])
