"""Peak memory of attention: what one call of a compiled model takes beyond what it holds already.

    python -m benchmarks.memory [--smoke] [--length N]

Each figure is of a fresh process. It compiles the model, calls it twice, gives free memory back to
the system, reads its resident set (VmRSS), resets the kernel's record of its peak (writing 5 to
/proc/self/clear_refs), calls the model once more and reads the peak (VmHWM): the difference is the
call's. Compiling is thereby left out, which takes hundreds of MB that have nothing to do with
attention; the peak of the whole process, compiling included, is printed beside. Where the record
cannot be reset, the growth of VmHWM over all calls is taken, compiling included, and said so.
(ru_maxrss would do neither: it cannot be reset, and a new process begins with its parent's.)

The models have no MLP (families.py), so that attention is the peak. What is left beside it is
measured as well and subtracted, in two ways. `scores to values`: the same model with q + k + v in
place of what lies between the projections, so that what is left is what attention itself takes.
`with projections`: the same model whose attention is the identity, so that Q, K, V and their
layouts count too. Allocations from 64 KiB up are mapped singly (MALLOC_MMAP_THRESHOLD_), so that
the resident set follows what tensors take rather than what the allocator keeps.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import families

MODELS = {"bloom": families.bloom, "t5": families.t5}
# What is subtracted, and what it leaves.
_BASELINES = {"no scores": "scores to values", "no attention": "with projections"}
_SUBJECTS = (*_BASELINES, "inductor", "adaattn")


@dataclass(frozen=True)
class Peak:
    """Bytes: of one call; of the whole process; whether the kernel's record could be reset."""

    call: int
    process: int
    reset: bool


@dataclass(frozen=True)
class AttentionMemory:
    """The peaks of one model, by subject; what attention takes is a difference of two."""

    model: str
    length: int
    peaks: dict[str, Peak]

    def of(self, subject: str, baseline: str) -> int:
        """Bytes that a call takes beyond those of the baseline."""
        return max(self.peaks[subject].call - self.peaks[baseline].call, 0)

    def share(self, baseline: str) -> float:
        """Ours as a part of Inductor's."""
        return self.of("adaattn", baseline) / max(self.of("inductor", baseline), 1)


def attention_memory(model: str, length: int, threads: int) -> AttentionMemory:
    """Measured in fresh processes; RuntimeError with a process's last words if one fails."""
    peaks = {subject: _in_process(model, subject, length, threads) for subject in _SUBJECTS}
    return AttentionMemory(model, length, peaks)


def memory_lines(rows: list[AttentionMemory]) -> list[str]:
    """A table in Markdown."""
    lines = [
        "| peak memory of attention | N | inductor | adaattn | adaattn / inductor |"
        " whole process, compiling included: inductor, adaattn |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_memory_line(row, baseline) for row in rows for baseline in _BASELINES]
    if not all(peak.reset for row in rows for peak in row.peaks.values()):
        lines.append("\nThe kernel's record of peaks could not be reset: compiling is included.")
    return lines


def _memory_line(row: AttentionMemory, baseline: str) -> str:
    share = row.share(baseline)
    cells = (
        f"{row.model} (eager, fp32), {_BASELINES[baseline]}",
        str(row.length),
        *(_megabytes(row.of(subject, baseline)) for subject in ("inductor", "adaattn")),
        "under 1/100" if share < 0.01 else f"{share:.3f} (1/{1 / share:.1f})",
        ", ".join(_megabytes(row.peaks[subject].process) for subject in ("inductor", "adaattn")),
    )
    return "| " + " | ".join(cells) + " |"


def as_json(row: AttentionMemory) -> dict[str, Any]:
    return asdict(row) | {"shares": {name: row.share(name) for name in _BASELINES}}


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"


def _in_process(model: str, subject: str, length: int, threads: int) -> Peak:
    command = [sys.executable, "-m", "benchmarks.memory", "--length", str(length)]
    command += ["--threads", str(threads), "--child", model, subject]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 16),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{model}, {subject}: {done.stderr.strip()[-400:]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


# -- in the process that is measured ---------------------------------------------------------------


def _child(model_name: str, subject: str, length: int) -> Peak:
    torch.manual_seed(0)
    model = families.without_mlp(MODELS[model_name]())
    if subject in _BASELINES:
        reduced = {"no attention": families.without_attention, "no scores": families.without_scores}
        model = reduced[subject](model)
    compiled = torch.compile(model, backend="adaattn" if subject == "adaattn" else "inductor")
    ids = torch.randint(families.VOCABULARY, (1, length))
    kwargs: dict[str, Any] = {"input_ids": ids}
    if model_name == "bloom":
        kwargs["use_cache"] = False
    before = _status("VmHWM")
    with torch.no_grad():
        for _ in range(2):
            compiled(**kwargs)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        held, highest = _status("VmRSS"), _status("VmHWM")
        reset = _reset_peak()
        compiled(**kwargs)
    peak = _status("VmHWM")
    return Peak(peak - (held if reset else before), max(peak, highest), reset)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of attention.")
    parser.add_argument("--smoke", action="store_true", help="a small length, to see that it runs")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.child:
        print(json.dumps(asdict(_child(*given.child, given.length))))
        return
    length = 256 if given.smoke else given.length
    rows = [attention_memory(model, length, given.threads) for model in MODELS]
    print("\n".join(memory_lines(rows)))


if __name__ == "__main__":
    main()
