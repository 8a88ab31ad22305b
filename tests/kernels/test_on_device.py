"""What is kept on a device: made once, given up when others are asked for, never while recorded."""

from __future__ import annotations

from unittest import mock

import torch

from adaattn_compiler.kernels import on_device
from adaattn_compiler.kernels.on_device import kept_on_device

CPU = torch.device("cpu")


class Counted:
    """Makes a tensor of a number, and knows how often."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, number: int) -> list[torch.Tensor]:
        self.calls.append(number)
        return [torch.full((3,), number)]


def test_result_is_made_once_and_kept() -> None:
    made = Counted()
    kept = kept_on_device(2, made)
    (first,), (again,) = kept(CPU)(7), kept(CPU)(7)
    assert first is again
    assert first.tolist() == [7, 7, 7]
    assert made.calls == [7]


def test_oldest_is_given_up() -> None:
    made = Counted()
    kept = kept_on_device(2, made)
    for number in (1, 2, 3, 1):
        kept(CPU)(number)
    assert made.calls == [1, 2, 3, 1]


def test_what_a_recorded_graph_reads_is_never_given_up() -> None:
    made = Counted()
    kept = kept_on_device(1, made)
    (warm,) = kept(CPU)(1)
    with mock.patch.object(on_device, "is_recording", return_value=True):
        (recorded,) = kept(CPU)(1)
        for number in range(2, 9):
            kept(CPU)(number)
        (after,) = kept(CPU)(1)
    assert warm is recorded is after
    assert made.calls == list(range(1, 9))


def test_nothing_is_recorded_where_there_is_no_gpu() -> None:
    if not torch.cuda.is_available():
        assert not on_device.is_recording()
