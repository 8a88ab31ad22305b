"""Settings of the whole suite: a private cache, no deadlines, GPU tests only with a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pauses
import pytest
import torch

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with its own cache folder, a reset Dynamo and the same random numbers."""
    monkeypatch.setenv("ADAATTN_CACHE_DIR", str(tmp_path / "adaattn"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


def pytest_collection_finish() -> None:
    pauses.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _mark_further_cases(items)
    _skip_without_gpu(items)


# Where nearly all time is spent in the Python of others: Triton's interpreter, Dynamo, Inductor.
TRACED_ONCE = (
    "tests/interpreted/",
    "tests/end_to_end/",
    "tests/passes/test_expand.py",
    "tests/passes/test_runtime_numbers.py",
)


def _mark_further_cases(items: list[pytest.Item]) -> None:
    """There coverage is taken of the first case of each test: tracing doubles what Python costs,
    and what further cases alone run, tests of the parts run as well."""
    seen = set()
    for item in items:
        test = item.nodeid.split("[")[0]
        if test in seen and test.startswith(TRACED_ONCE):
            item.add_marker("untraced")
        seen.add(test)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """The `no_cover` of pytest-cov 7 stops one of two tracers that a process of xdist has."""
    tracer = sys.gettrace()
    pause = item.get_closest_marker("untraced") and pauses.is_coverage(tracer)
    if pause:
        sys.settrace(None)
    try:
        return (yield)
    finally:
        if pause:
            sys.settrace(tracer)


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
