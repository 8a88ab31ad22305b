"""The code that Inductor would write for CUDA, on a machine without a GPU.

Inductor asks torch for a device before it writes a line; here it is told of an H100. What it writes
is kept and not run. Private torch throughout, checked with 2.11 alone; a test that needs another
answer of the device says so by failing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from cuda_capture import fake_gpu
from torch import fx
from torch._inductor import config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from adaattn_compiler.kernels.triton.compile import Compiled, built_for
from adaattn_compiler.options import Options
from adaattn_compiler.passes.pipeline import rewrite

_H100 = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    gcnArchName="",
)
_INTERFACE = "torch._dynamo.device_interface.CudaInterface"


class _WrittenError(Exception):
    """Inductor has written its code."""


def inductor_code(
    function: Callable[..., Any], make: Callable[[], Sequence[Any]], options: Options
) -> str:
    """The module that Inductor writes for what our passes make of a function of CUDA tensors."""
    written: list[str] = []

    def keep(key: str, path: str, *args: Any, **kwargs: Any) -> None:
        written.append(Path(path).read_text())
        raise _WrittenError

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with unset_fake_temporarily():
            analysis = rewrite(graph_module, inputs, options)
        compiled: Callable[..., Any] = compile_fx(analysis.graph_module or graph_module, inputs)
        return compiled

    torch.compiler.reset()
    settings = config.patch(fx_graph_cache=False, compile_threads=1)
    kept = mock.patch.object(PyCodeCache, "load_by_key_path", keep)
    with fake_gpu(), torch.no_grad(), settings, _told(), kept, contextlib.suppress(Exception):
        torch.compile(function, backend=backend)(*make())
    (code,) = written
    return code


def compiled_launches(code: str, folder: Path) -> dict[str, Compiled]:
    """Our kernels in a module that Inductor has written, compiled for sm_90 as it would do when it
    loads them: from the text that it copied, with what it knows of the arguments."""
    found = {}
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''',", code, re.DOTALL)
    for name, text in kernels:
        if "user_autotune" in text:
            tuner = _loaded(folder / f"{name}.py", text, name)
            given, (config,) = tuner.triton_meta, tuner.configs
            how = (config.num_warps, config.num_stages)
            known = (given["signature"], given["constants"], given["configs"][0])
            found[name] = built_for(90, tuner.fn, *known, how)
    return found


def _loaded(file: Path, text: str, name: str) -> Any:
    file.write_text(text)
    spec: Any = importlib.util.spec_from_file_location(f"written_{name}", file)
    module = importlib.util.module_from_spec(spec)
    with _told():
        spec.loader.exec_module(module)
    return getattr(module, name)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """torch, told of a device."""
    answers: dict[str, Callable[..., Any]] = {
        "torch.cuda.get_device_properties": lambda *a: _H100,
        "torch.cuda.get_device_capability": lambda *a: (9, 0),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda *a: None,
        "torch.cuda.synchronize": lambda *a: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch._C._cuda_hasPrimaryContext": lambda index: True,
        "torch._inductor.scheduler.has_triton": lambda *a: True,
        "torch.utils._triton.has_triton": lambda *a: True,
        f"{_INTERFACE}.get_device_properties": staticmethod(lambda *a: _H100),
        f"{_INTERFACE}.is_bf16_supported": staticmethod(lambda *a, **k: True),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        yield
