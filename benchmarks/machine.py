"""The machine, the versions, and which code MKL runs.

MKL chooses its code by the processor's vendor as well as by what it can do: on AMD it runs AVX2
where AVX-512 is there. torch's SDPA on the CPU stands on MKL, so what is compared with is slower
there than it need be. Two switches make the other baselines, by starting the script again:

--mkl-unlocked  preloads a library of one function (`mkl_serv_intel_cpu_true`, which says yes),
                built with the C compiler: MKL takes what the processor has. Nothing changes on
                Intel.
--mkl-avx2      MKL_ENABLE_INSTRUCTIONS=AVX2: on Intel, what MKL does on AMD.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

_MODE = "ADAATTN_BENCH_MKL"
_SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def restart_with_mkl(mode: str, module: str) -> None:
    """Start this script again under `mode` ("unlocked" or "avx2"), unless it already was."""
    if os.environ.get(_MODE) == mode:
        return
    environment = {**os.environ, _MODE: mode}
    if mode == "avx2":
        environment["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"
        _run(module, environment)
    with tempfile.TemporaryDirectory() as folder:
        library = _unlocking_library(Path(folder))
        preload = os.environ.get("LD_PRELOAD")
        environment["LD_PRELOAD"] = f"{library}:{preload}" if preload else str(library)
        _run(module, environment)


def _run(module: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", module, *sys.argv[1:]]
    raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


def _unlocking_library(folder: Path) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("--mkl-unlocked needs a C compiler (cc, gcc, or CC in the environment)")
    source, library = folder / "unlock.c", folder / "libunlock.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def describe_machine() -> dict[str, str]:
    """What figures depend on, as the header prints it."""
    cores = len(os.sched_getaffinity(0))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "processor": f"{_processor()} ({_vendor()}), {torch.backends.cpu.get_cpu_capability()}"
        f"{', AMX' if 'amx_bf16' in _cpu_field('flags').split() else ''}",
        "cores": f"{cores} usable, {torch.get_num_threads()} thread(s); load when started {load}",
        "versions": f"torch {torch.__version__}, transformers {_version('transformers')}, "
        f"adaattn-compiler {_version('adaattn-compiler')}{_commit()}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}",
        "MKL": _mkl(),
    }


def _mkl() -> str:
    """The mode, and the code that MKL says it runs."""
    mode = {
        None: "as it comes",
        "unlocked": "unlocked (preloaded)",
        "avx2": "held to AVX2 (MKL_ENABLE_INSTRUCTIONS)",
    }[os.environ.get(_MODE)]
    script = "import torch; a = torch.ones(64, 64); a @ a"
    environment = {**os.environ, "MKL_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    first = done.stdout.partition("\n")[0].removeprefix("MKL_VERBOSE ")
    name, _, rest = first.partition(" for ")
    return f"{mode}; {name.strip()} for {rest.partition(', Lnx')[0]}" if rest else mode


def _processor() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _vendor() -> str:
    return _cpu_field("vendor_id") or "vendor unknown"


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit, and whether files differ from it."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""
