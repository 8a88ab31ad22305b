"""The check, on every call, that a mask kept as a buffer has the values that were compiled for."""

from __future__ import annotations

import gc
import logging
import threading
from typing import Any

import pytest
import torch

from adaattn_compiler.runtime.assumptions import Assumptions


class Calls:
    """Counts the calls of a compiled graph and of what stands in for it."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.compiled = self.other = self.made = 0

        def compiled(*inputs: Any) -> str:
            self.compiled += 1
            return "compiled"

        def other(*inputs: Any) -> str:
            self.other += 1
            return "other"

        def make() -> Any:
            self.made += 1
            return other

        self.graph = Assumptions.of([1], (None, buffer), compiled, make)

    def __call__(self, buffer: torch.Tensor) -> Any:
        return self.graph(None, buffer)


def test_unchanged_buffer_is_compiled_for() -> None:
    buffer = torch.ones(4, 4).tril()
    calls = Calls(buffer)
    assert [calls(buffer) for _ in range(3)] == ["compiled"] * 3
    assert calls.made == 0


def test_changed_buffer_takes_the_other_graph_made_once() -> None:
    buffer = torch.ones(4, 4).tril()
    calls = Calls(buffer)
    buffer[0, 1] = 1
    assert [calls(buffer) for _ in range(3)] == ["other"] * 3
    assert calls.made == 1


def test_values_are_compared_only_where_something_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import adaattn_compiler.runtime.assumptions as module

    buffer = torch.ones(4, 4).tril()
    calls = Calls(buffer)
    compared: list[torch.Tensor] = []
    digest = module._digest

    def counted(tensor: torch.Tensor) -> bytes:
        compared.append(tensor)
        return digest(tensor)

    monkeypatch.setattr(module, "_digest", counted)
    for _ in range(3):
        calls(buffer)
    assert len(compared) == 1
    buffer.copy_(buffer.clone())
    assert calls(buffer) == "compiled"
    assert len(compared) == 2


def test_buffer_that_takes_the_place_of_another_is_looked_at() -> None:
    """A tensor may get the id and the version of one that is gone."""
    buffer = torch.ones(4, 4).tril()
    calls = Calls(buffer)
    calls(buffer)
    del buffer
    gc.collect()
    for _ in range(16):
        assert calls(torch.ones(4, 4)) == "other"
        assert calls(torch.ones(4, 4).tril()) == "compiled"


@pytest.mark.parametrize(
    "other", [torch.ones(2, 8), torch.ones(4, 4, dtype=torch.float64).tril(), torch.ones(16)]
)
def test_other_shapes_and_types_are_changes(other: torch.Tensor) -> None:
    calls = Calls(torch.ones(4, 4))
    assert calls(other) == "other"


def test_strides_are_no_change() -> None:
    buffer = torch.ones(4, 4).tril()
    calls = Calls(buffer)
    assert calls(buffer.T.contiguous().T) == "compiled"
    assert calls(torch.ones(8, 8).tril()[::2, ::2]) == "compiled"


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64])
def test_any_dtype_can_be_assumed(dtype: torch.dtype) -> None:
    buffer = torch.ones(4, 4).tril().to(dtype)
    calls = Calls(buffer)
    assert calls(buffer) == "compiled"
    buffer.zero_()
    assert calls(buffer) == "other"


def test_inference_tensors_are_compared_on_every_call() -> None:
    with torch.inference_mode():
        buffer = torch.ones(4, 4).tril()
        calls = Calls(buffer)
        assert calls(buffer) == "compiled"
        buffer.fill_(1)
        assert calls(buffer) == "other"


def test_change_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    buffer = torch.ones(4, 4).tril()
    calls = Calls(buffer)
    with caplog.at_level(logging.WARNING, "adaattn_compiler"):
        for value in (1, 2, 3):
            buffer.fill_(value)
            calls(buffer)
    assert len(caplog.records) == 1
    assert "input 1" in caplog.records[0].getMessage()


def test_threads_make_one_other_graph() -> None:
    calls = Calls(torch.ones(4, 4).tril())
    changed = torch.ones(4, 4)
    threads = [threading.Thread(target=calls, args=(changed,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls.made == 1
