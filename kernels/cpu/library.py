"""Build a generated source with the machine's C++ compiler, once, and load it.

Libraries lie in torch's own cache folder (TORCHINDUCTOR_CACHE_DIR), each under a hash of all that
it is made of: source, headers, flags, the compiler and its version. Instruction sets are named one
by one, never `-march=native`, so that what one machine built is not taken for another's. A file is
written aside, closed with a checksum and renamed: a reader sees all of it or none, processes may
race, and one that is damaged is built again.

Private torch, checked with 2.11 and 2.13: the compiler that Inductor would take
(torch._inductor.cpp_builder) and its cache folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from adaattn_compiler.kernels.cpu.source import HEADERS

_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fopenmp",
    # Vectors of loops: neither errno nor traps, and products that are not rounded before a sum.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
# GCC's -O3 takes half as long again to build for code that is no faster.
_GCC = ("-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic")
_CLANG = ("-O3",)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", *_AVX2),
    "-mprefer-vector-width=512",
)
_BUILD_SECONDS = 300
# A folder that has not changed for so long is of a process that was killed: no build takes as long.
_STALE_SECONDS = 24 * 3600
_BUILD_PREFIX = "build"


class CannotBuild(Exception):
    """There is no compiler, or it fails; says why."""


def library(source: str) -> ctypes.CDLL:
    """The library of a generated source, one for a process. CannotBuild where it cannot be made."""
    return _builds(os.getpid()).of(source).result()


def start_building(source: str) -> None:
    """Let a library be built beside what goes on; failures show where it is asked for."""
    with contextlib.suppress(CannotBuild):
        _builds(os.getpid()).of(source)


class _Builds:
    """The libraries of this process, each built once, two at a time."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(2, "adaattn-build")
        self._found: dict[Path, Future[ctypes.CDLL]] = {}
        self._lock = threading.Lock()

    def of(self, source: str) -> Future[ctypes.CDLL]:
        # Here, not where it is built: Inductor's settings may be those of a thread.
        command = (compiler(), *_optimization(compiler()), *_FLAGS, *machine_flags())
        path = _folder() / f"{_key(source, command)}.so"
        with self._lock:
            found = self._found.get(path)
            if found is None or (found.done() and found.exception() is not None):
                found = self._threads.submit(_loaded, source, command, path)
                self._found[path] = found
            return found


@functools.cache
def _builds(process: int) -> _Builds:
    """Those of a process: threads do not outlive a fork."""
    return _Builds()


def _loaded(source: str, command: tuple[str, ...], path: Path) -> ctypes.CDLL:
    if not _is_whole(path):
        _build(source, command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CannotBuild(f"the built library cannot be loaded: {error}") from error


def machine_flags() -> tuple[str, ...]:
    """The instruction sets that torch itself runs with here (ATEN_CPU_CAPABILITY limits them)."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ()
    if capability == "AVX512":
        # By its name: a method of torch.cpu that versions may lack.
        named = {"_is_avx512_bf16_supported": "-mavx512bf16", "_is_vnni_supported": "-mavx512vnni"}
        has = (flag for name, flag in named.items() if getattr(torch.cpu, name, lambda: False)())
        return (*_AVX512, *has)
    return _AVX2 if capability == "AVX2" else ()


@functools.cache
def compiler() -> str:
    """The C++ compiler that Inductor would take. CannotBuild where there is none, or MSVC."""
    from torch._inductor import cpp_builder

    try:
        found = str(cpp_builder.get_cpp_compiler())
    except Exception as error:
        raise CannotBuild("no C++ compiler: install g++ or clang++, or set CXX") from error
    if not (cpp_builder._is_gcc(found) or cpp_builder._is_clang(found)):
        raise CannotBuild(f"{found} is neither GCC nor Clang")
    return found


def _optimization(command: str) -> tuple[str, ...]:
    from torch._inductor import cpp_builder

    return _GCC if cpp_builder._is_gcc(command) else _CLANG


@functools.cache
def _version(command: str) -> str:
    return _run([command, "--version"]).stdout


@functools.cache
def _headers() -> str:
    return "".join(f"{path.name}\n{path.read_text()}" for path in sorted(HEADERS.glob("*.h")))


def _key(source: str, command: tuple[str, ...]) -> str:
    text = "\0".join((source, _headers(), *command, _version(command[0]), platform.machine()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "adaattn"


_CHECKSUM = 32


def _is_whole(path: Path) -> bool:
    """Whether a library is there and ends with its own checksum."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_CHECKSUM]).digest() == content[-_CHECKSUM:]


def _build(source: str, command: tuple[str, ...], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_BUILD_PREFIX) as folder:
            text, made = Path(folder) / "attention.cpp", Path(folder) / "attention.so"
            text.write_text(source)
            _compile([*command, f"-I{HEADERS}", str(text), "-o", str(made)])
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(text, path.with_suffix(".cpp"))
            os.replace(made, path)
    except OSError as error:
        raise CannotBuild(f"cannot write to {path.parent}: {error}") from error


def _remove_stale(parent: Path) -> None:
    """Remove the folders of builds that were killed. Others may be doing the same: what is gone or
    cannot be removed is left."""
    before = time.time() - _STALE_SECONDS
    for folder in parent.glob(f"{_BUILD_PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.is_symlink() and folder.stat().st_mtime < before:
                shutil.rmtree(folder, ignore_errors=True)


def _compile(command: list[str]) -> None:
    done = _run(command)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise CannotBuild(f"{command[0]} fails ({done.returncode}): {lines[0]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CannotBuild(f"{command[0]} takes more than {_BUILD_SECONDS} s") from error
    except OSError as error:
        raise CannotBuild(f"cannot run {command[0]}: {error}") from error
