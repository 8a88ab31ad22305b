"""Coverage pauses in the Python of others that calls none of ours: tracing doubles what it costs.

What the report says of our sources stays the same: bodies of Triton's functions, which its
interpreter runs, are no part of it (pyproject.toml), and where Dynamo calls a backend coverage goes
on. A function that pauses goes on before it returns, so that the tracer sees as many returns as
calls. Private names: one that a version lacks is left alone, and takes longer.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

# (module, class or "", function)
PAUSED = (
    ("triton", "", "compile"),
    ("triton.runtime.interpreter", "GridExecutor", "__call__"),
    ("torch._dynamo.convert_frame", "", "_compile"),
)
RESUMED = (("torch._dynamo.output_graph", "OutputGraph", "call_user_compiler"),)


def is_coverage(tracer: object) -> bool:
    return type(tracer).__module__.startswith("coverage")


def install() -> None:
    """Wrap them. Only where coverage is taken by tracing."""
    if not is_coverage(sys.gettrace()):
        return
    stopped: list[Any] = []
    for place in PAUSED:
        _wrap(place, lambda function: _paused(function, stopped))
    for place in RESUMED:
        _wrap(place, lambda function: _resumed(function, stopped))


def _wrap(place: tuple[str, str, str], wrapper: Callable[[Any], Any]) -> None:
    module, owner, name = place
    try:
        holder = importlib.import_module(module)
        holder = getattr(holder, owner) if owner else holder
        setattr(holder, name, wrapper(getattr(holder, name)))
    except (ImportError, AttributeError):
        return


def _paused(function: Callable[..., Any], stopped: list[Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = sys.gettrace()
        if not is_coverage(tracer):
            return function(*args, **kwargs)
        stopped.append(tracer)
        sys.settrace(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(stopped.pop())

    return call


def _resumed(function: Callable[..., Any], stopped: list[Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not stopped or sys.gettrace() is not None:
            return function(*args, **kwargs)
        sys.settrace(stopped[-1])
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(None)

    return call
