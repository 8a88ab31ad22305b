"""Built libraries: what is kept and what of it is trusted; machines that cannot build any."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from check import assert_as_accurate
from torch._inductor import config

from adaattn_compiler.kernels.choose import choose
from adaattn_compiler.kernels.cpu import library as module
from adaattn_compiler.kernels.cpu.kernel import CppKernel
from adaattn_compiler.kernels.cpu.library import CannotBuild, compiler, library, start_building
from adaattn_compiler.kernels.problem import Problem, Shape, Sizes
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.strips import StripsKernel
from adaattn_compiler.options import Options
from adaattn_compiler.spec import AttentionSpec, S

_CACHED = ("_builds", "compiler", "_version", "_headers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where libraries are kept: a new folder, of which this process knows nothing yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    forget()
    yield tmp_path / "inductor" / "adaattn"
    monkeypatch.undo()
    forget()


def forget() -> None:
    """As a new process begins."""
    for name in _CACHED:
        getattr(module, name).cache_clear()


def source(number: int = 1) -> str:
    """Something that is built soon."""
    return f'#include "call.h"\nextern "C" int64_t number() {{ return {number}; }}\n'


def number_of(built: ctypes.CDLL) -> int:
    return int(built.number())


def built_again(text: str) -> ctypes.CDLL:
    forget()
    return library(text)


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


# -- what is kept ----------------------------------------------------------------------------------


def test_library_is_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert number_of(library(source(5))) == 5
    (path,) = libraries(folder)
    assert sorted(folder.iterdir()) == [path.with_suffix(".cpp"), path]
    assert path.with_suffix(".cpp").read_text() == source(5)
    monkeypatch.setattr(module, "_build", None)
    assert library(source(5)) is library(source(5))
    assert number_of(built_again(source(5))) == 5


def test_building_may_start_before_the_library_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_building(source(3))
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(library, source(3)) for _ in range(4)]
    assert len({id(built.result()) for built in asked}) == 1
    assert number_of(library(source(3))) == 3
    start_building("nonsense;\n")
    with pytest.raises(CannotBuild, match="nonsense"):
        library("nonsense;\n")
    with no_compiler(folder):
        start_building(source(4))
        with pytest.raises(CannotBuild, match=r"no C\+\+ compiler"):
            library(source(4))


def _truncated(content: bytes) -> bytes:
    return content[:-100]


def _shortened_to_its_header(content: bytes) -> bytes:
    return content[:64]


def _with_another_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _longer(content: bytes) -> bytes:
    return content + b"\0"


@pytest.mark.parametrize(
    "damaged",
    [
        _truncated,
        _shortened_to_its_header,
        _with_another_byte,
        _longer,
        lambda content: b"",
        lambda content: b"garbage" * 1000,
    ],
)
def test_damaged_library_is_built_again(damaged: Callable[[bytes], bytes], folder: Path) -> None:
    library(source())
    (path,) = libraries(folder)
    content = path.read_bytes()
    # A file of its own, as after a copy that was cut off: this process still has the old one open.
    path.unlink()
    path.write_bytes(damaged(content))
    assert number_of(built_again(source())) == 1
    assert libraries(folder) == [path]
    assert module._is_whole(path)


def test_what_changes_the_code_changes_the_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {module._key(source(), ("g++", "-O3"))}
    keys.add(module._key(source(2), ("g++", "-O3")))
    keys.add(module._key(source(), ("g++", "-O3", "-mavx2")))
    keys.add(module._key(source(), ("g++", "-O3 -mavx2")))
    monkeypatch.setattr(module, "_version", lambda command: "another")
    keys.add(module._key(source(), ("g++", "-O3")))
    monkeypatch.setattr(module, "_headers", lambda: "others")
    keys.add(module._key(source(), ("g++", "-O3")))
    assert len(keys) == 6


def test_another_compiler_builds_another_library(folder: Path, tmp_path: Path) -> None:
    library(source(9))
    other = tmp_path / "other-g++"
    other.symlink_to(shutil.which(compiler()) or compiler())
    forget()
    with config.patch({"cpp.cxx": (None, str(other))}):
        assert number_of(library(source(9))) == 9
    assert len(libraries(folder)) == 2


# -- other processes -------------------------------------------------------------------------------

_BUILD = """
import sys
from adaattn_compiler.kernels.cpu.library import library
print("ready", flush=True)
sys.stdin.readline()
print(library(sys.argv[1]).number(), flush=True)
"""


def _started(text: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, text],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder.parent), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _slow_compiler(folder: Path) -> Path:
    """A compiler that says when it has begun to write, and takes its time after that."""
    path = folder / "slow-g++"
    path.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *attention.cpp*) echo garbage > "$(dirname "$0")/begun"\n'
        'for last; do :; done; echo garbage > "$last"; sleep 600;; esac\n'
        f'exec {compiler()} "$@"\n'
    )
    path.chmod(0o755)
    return path


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_processes_may_build_at_once_and_die_building(folder: Path, tmp_path: Path) -> None:
    slow = _slow_compiler(tmp_path)
    dying, racing = _started(source(7), folder, CXX=str(slow)), _started(source(7), folder)
    try:
        for process in (dying, racing):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        _go(dying)
        while not (tmp_path / "begun").exists():
            assert dying.poll() is None
            time.sleep(0.01)
        _go(racing)
        assert number_of(library(source(7))) == 7
        assert racing.communicate()[0] == "7\n"
    finally:
        for process in (dying, racing):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    # What the dead one left is in nobody's way.
    (path,) = libraries(folder)
    assert number_of(built_again(source(7))) == 7
    assert libraries(folder) == [path]


_ATTENTION = """
import sys

import torch
from adaattn_compiler.kernels.cpu import library
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.strips import StripsKernel
from adaattn_compiler.spec import *
from adaattn_compiler.spec import k, q
from check import assert_as_accurate

print(" ".join(library.machine_flags()))
dtype = getattr(torch, sys.argv[1])
spec = AttentionSpec(0.25, 5 * sympy.tanh(S / 5), sympy.Ge(q - k, 0), group=2)
runner = cpp_runner(plan_of(Problem(spec, Shape(2, 4, 2, 1, 1, 33, 40), dtype, "cpu", False)))
for rows in (1, 64, 130):
    qkv = [torch.randn(2, h, rows, d).to(dtype) for h, d in ((4, 33), (2, 33), (2, 40))]
    eager = reference_attention(*qkv, [], (), spec)
    exact = reference_attention(*(t.double() for t in qkv), [], (), spec)
    assert_as_accurate(runner(*qkv, [], ()), eager, exact)
print("right")
"""


@pytest.mark.parametrize(("capability", "dtype"), [("avx2", "bfloat16"), ("default", "float32")])
def test_instruction_sets_are_those_that_torch_is_limited_to(
    capability: str, dtype: str, folder: Path
) -> None:
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-c", _ATTENTION, dtype],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder.parent),
            "ATEN_CPU_CAPABILITY": capability,
            "PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    flags, right = done.stdout.splitlines()
    assert right == "right"
    assert "avx512" not in flags
    assert capability == "avx2" or flags == ""


# -- what cannot be built --------------------------------------------------------------------------


def test_error_of_the_compiler_is_in_the_message(folder: Path) -> None:
    with pytest.raises(CannotBuild, match=r"error: .*nonsense"):
        library("nonsense;\n")
    assert list(folder.iterdir()) == []


def test_compiler_that_says_nothing_of_its_error_is_told_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "g++-failing"
    failing.write_text(
        f'#!/bin/sh\ncase "$*" in *attention.cpp*) exit 3;; esac\nexec {compiler()} "$@"\n'
    )
    failing.chmod(0o755)
    monkeypatch.setattr(module, "compiler", lambda: str(failing))
    with pytest.raises(CannotBuild, match=r"g\+\+-failing fails \(3\)"):
        library(source())


@pytest.mark.parametrize("kind", ["file", "no program"])
def test_compiler_that_does_not_run_is_told_of(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compiler"
    if kind == "file":
        path.write_text("no program")
    monkeypatch.setattr(module, "compiler", lambda: str(path))
    with pytest.raises(CannotBuild, match=f"cannot run {path}"):
        library(source())


def test_compiler_that_takes_too_long_is_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = _slow_compiler(tmp_path)
    monkeypatch.setattr(module, "compiler", lambda: str(slow))
    monkeypatch.setattr(module, "_BUILD_SECONDS", 0.2)
    with pytest.raises(CannotBuild, match=r"takes more than 0\.2 s"):
        library(source())


def test_folder_that_cannot_be_written_is_told_of(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("in the folder's place")  # root may write to any folder, but not to this
    with pytest.raises(CannotBuild, match="cannot write to"):
        library(source())


def test_folder_in_the_place_of_a_library_is_told_of(folder: Path) -> None:
    library(source())
    (path,) = libraries(folder)
    path.unlink()
    (path / "inside").mkdir(parents=True)
    with pytest.raises(CannotBuild, match="cannot write to"):
        built_again(source())


def test_library_that_does_not_load_is_told_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: str) -> Any:
        raise OSError("wrong ELF class")

    monkeypatch.setattr(ctypes, "CDLL", fails)
    with pytest.raises(CannotBuild, match="cannot be loaded: wrong ELF class"):
        library(source())


# -- attention where it cannot be built ------------------------------------------------------------


def problem(rows: int = 2048) -> Problem:
    shape = Shape(1, 8, 8, rows, rows, 64, 64, hints=(1, rows, rows))
    return Problem(AttentionSpec(0.125, S * 2), shape, torch.float32, "cpu", False)


@contextlib.contextmanager
def no_compiler(folder: Path) -> Iterator[None]:
    forget()
    with config.patch({"cpp.cxx": ("/no/such/compiler",)}):
        yield


@contextlib.contextmanager
def no_folder(folder: Path) -> Iterator[None]:
    folder.parent.mkdir()
    folder.write_text("in the folder's place")
    yield


def test_without_a_compiler_the_kernel_is_refused(folder: Path) -> None:
    assert CppKernel().refusal(problem()) is None
    with no_compiler(folder):
        refusal = CppKernel().refusal(problem())
    assert refusal == "no C++ compiler: install g++ or clang++, or set CXX"


@pytest.mark.parametrize(
    ("cause", "said"), [(no_compiler, "no C++ compiler"), (no_folder, "cannot write to")]
)
def test_attention_is_computed_by_another_kernel(
    cause: Callable[[Path], contextlib.AbstractContextManager[None]],
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The only other one is not ahead of it by estimate: it is tried, and left out.
    monkeypatch.setattr(StripsKernel, "cost", lambda self, problem: 1e30)
    options = Options(cache_dir=tmp_path / "adaattn", kernels=("cpp", "strips"), measure=False)
    asked = problem(300)
    with cause(folder):
        choice = choose(asked, options)
    assert choice.kernel.name == "strips"
    assert said in choice.why
    q, k, v = (torch.randn(1, 8, 300, 64) for _ in range(3))
    ours = choice.kernel.build(asked)(q, k, v, [], Sizes(1, 8, 300, 300))
    eager = reference_attention(q, k, v, [], (), asked.spec)
    exact = reference_attention(q.double(), k.double(), v.double(), [], (), asked.spec)
    assert_as_accurate(ours, eager, exact)


def test_folders_of_killed_builds_are_removed(folder: Path) -> None:
    folder.mkdir(parents=True)
    killed, running, kept = folder / "buildold", folder / "buildnew", folder / "others"
    for each in (killed, running, kept):
        each.mkdir()
        (each / "attention.cpp").write_text("")
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(killed, (long_ago, long_ago))
    os.utime(kept, (long_ago, long_ago))
    assert number_of(library(source())) == 1
    assert (killed.exists(), running.exists(), kept.exists()) == (False, True, True)
