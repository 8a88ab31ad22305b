"""Runs what Inductor wrote for flex_attention on a GPU in Triton's interpreter, on the CPU.

A program, as Triton is either interpreted or compiled throughout a process:
TRITON_INTERPRET=1 python flex_interpreted.py WRITTEN RESULTS, both files of torch.save: by name of
a spec (length, text of the kernel, body of the function that calls it), and what comes out of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from flex_problems import problem_on_a_gpu
from specs import random_inputs

from adaattn_compiler.kernels import flex, flex_runner
from adaattn_compiler.kernels.flex_inductor import FlexVariant, _steps
from adaattn_compiler.kernels.problem import Problem


class _Launcher:
    """A kernel with the way to launch it that Inductor's have: arguments, then the grid."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def run(self, *args: Any, stream: int) -> None:
        self.kernel[args[-3:]](*args[:-3])


def result(problem: Problem, kernel: str, calls: str) -> torch.Tensor:
    """A problem's runner on random inputs on the CPU, its kernel interpreted."""

    def compiled(tensors: list[Any]) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's source as it runs
            body = _caller(calls, *_loaded(kernel, folder))
            (out,) = body([*tensors, *_steps(tensors)])
        return torch.as_tensor(out)

    first = mock.patch.object(
        flex_runner, "_first_variant", return_value=FlexVariant(torch.device("cpu"))
    )
    given = mock.patch.object(flex_runner, "compile_flex", return_value=compiled)
    unchecked = mock.patch.object(flex_runner.FlexRunner, "_check")  # that q is on a GPU
    tensors, operands = random_inputs(problem)
    with first, given, unchecked:
        runner = flex.flex_runner(flex.plan_of(problem))
        return runner(*tensors, operands, problem.param_hints)


def _loaded(kernel: str, folder: str) -> tuple[str, Any]:
    """The kernel's name, and the kernel without Inductor's launcher; it lies in a folder."""
    head, rest = kernel.split("@triton_heuristics", 1)
    head = head.replace("triton_helpers.set_driver_to_gpu()", "")
    (name,) = re.findall(r"def (triton_tem\w*)\(", rest)
    file = Path(folder) / "kernel.py"
    file.write_text(head + rest[rest.index("@triton.jit") :])
    spec = importlib.util.spec_from_file_location("kernel", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return name, getattr(module, name)


def _caller(calls: str, name: str, kernel: Any) -> Callable[[list[Any]], Any]:
    """The function that Inductor wrote around a kernel, for the CPU."""
    calls = re.sub(r"torch\.cuda\._DeviceGuard\(\d+\)", "no_device()", calls)
    calls = re.sub(r"torch\.cuda\.set_device\(\d+\)", "pass", calls)
    names: dict[str, Any] = {
        "torch": torch,
        "no_device": contextlib.nullcontext,
        "get_raw_stream": lambda index: 0,
        "assert_size_stride": torch._C._dynamo.guards.assert_size_stride,
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype
        ).fill_(float("nan")),
        name: _Launcher(kernel),
    }
    exec("def call(args):\n" + textwrap.indent(textwrap.dedent(calls), "    "), names)
    function: Callable[[list[Any]], Any] = names["call"]
    return function


if __name__ == "__main__":
    written = torch.load(sys.argv[1])
    torch.save(
        {
            name: result(problem_on_a_gpu(name, length, torch.float32), kernel, calls)
            for name, (length, kernel, calls) in written.items()
        },
        sys.argv[2],
    )
