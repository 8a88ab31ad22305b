"""What Inductor writes for flex_attention on a GPU that is not there, and what Triton makes of it.

Private torch, checked with 2.11: the modules that Inductor writes and loads, the autotuner around a
kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from cuda_capture import _Driver
from inductor_without_gpu import _told
from torch._inductor import config
from torch._inductor.codecache import PyCodeCache
from torch._subclasses.fake_tensor import unset_fake_temporarily

from adaattn_compiler.kernels import flex_runner as flex_module
from adaattn_compiler.kernels.flex import flex_runner, plan_of
from adaattn_compiler.kernels.flex_inductor import FlexVariant
from adaattn_compiler.kernels.flex_runner import FlexRunner
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.triton.compile import Compiled, built_for

# Kernels are texts in the module that launches them.
_KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''\n(.*?)''', device_str", re.DOTALL)


@dataclass(frozen=True)
class Written:
    """A module that Inductor wrote."""

    code: str

    @property
    def calls(self) -> str:
        """The body of the function that runs the graph."""
        return self.code.split("    def call(self, args):", 1)[1].split("runner = ", 1)[0]

    @property
    def kernel(self) -> str:
        """The text of the one Triton kernel."""
        ((_, text),) = _KERNEL.findall(self.code)
        return str(text)

    @property
    def warps(self) -> int:
        (how,) = self._tuner().configs
        return int(how.num_warps)

    def _tuner(self) -> Any:
        ((name, text),) = _KERNEL.findall(self.code)
        with _gpu():
            return getattr(PyCodeCache.load(text), name)

    def compiled(self, capability: int) -> Compiled:
        """The kernel, compiled as Inductor would."""
        tuner = self._tuner()
        meta, (how,) = tuner.triton_meta, tuner.configs
        (aligned,) = meta["configs"]
        return built_for(
            capability,
            tuner.fn,
            meta["signature"],
            meta["constants"],
            aligned,
            (how.num_warps, how.num_stages),
        )


class _WrittenError(Exception):
    """Inductor has written the code that would launch."""


def flex_code(problem: Problem, *, wide: bool = False) -> Written:
    """What is compiled when a problem's runner is made; wide: for tensors beyond 32 bits."""
    found: list[str] = []
    load = PyCodeCache.load_by_key_path

    def keep(key: str, path: str, *args: Any, **kwargs: Any) -> Any:
        text = Path(path).read_text()
        if "def call(self, args)" not in text:
            return load(key, path, *args, **kwargs)
        found.append(text)
        raise _WrittenError

    kept = mock.patch.object(PyCodeCache, "load_by_key_path", keep)
    variant = FlexVariant(torch.device("cuda", 0), wide=wide)
    first = mock.patch.object(flex_module, "_first_variant", return_value=variant)
    with _gpu(), kept, first:
        try:
            flex_runner(plan_of(problem))
        except Exception:
            if not found:
                raise
    (code,) = found
    return Written(code)


@contextmanager
def _gpu() -> Iterator[None]:
    triton.runtime.driver.set_active(_Driver())
    with config.patch(fx_graph_cache=False, compile_threads=1), _told():
        yield


@contextmanager
def runner_without_code(problem: Problem) -> Iterator[tuple[FlexRunner, list[list[Any]]]]:
    """A problem's runner and what its kernel, which does nothing, was called with."""
    given: list[list[Any]] = []
    inputs = FlexRunner._inputs

    def call(tensors: list[Any]) -> Any:
        given.append(tensors)
        q, v = tensors[0], tensors[2]
        return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)

    def real(*args: Any) -> Any:
        with unset_fake_temporarily():  # the host's part is no fake
            return inputs(*args)

    told = mock.patch.object(flex_module, "compile_flex", return_value=call)
    with _told(), told, mock.patch.object(FlexRunner, "_inputs", real):
        yield flex_runner.__wrapped__(plan_of(problem)), given
