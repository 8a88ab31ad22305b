"""What statistics of heads cost, as a share of the exact C++ kernel for the same spec.

    python -m benchmarks.statistics_cost [--length 4096] [--rounds 11]

Both in turns, with one thread and with two; medians. Calibration takes 16 rows.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import sympy
import torch

from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.statistics import head_statistics
from adaattn_compiler.spec import AttentionSpec, k, q

DIM, ROWS = 64, (16, 32)
CAUSAL = sympy.Ge(q - k, 0)
# Name, query heads, query heads to a key head, mask.
CASES = (
    ("all keys, 6 heads", 6, 1, sympy.true),
    ("causal, 6 heads", 6, 1, CAUSAL),
    ("causal, 12 heads", 12, 1, CAUSAL),
    ("causal, 12 heads in groups of 4", 12, 4, CAUSAL),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=11)
    asked = parser.parse_args()
    for threads, case in itertools.product((1, 2), CASES):
        torch.set_num_threads(threads)
        exact, *others = _medians(_calls(asked.length, *case[1:]), asked.rounds)
        shares = ", ".join(
            f"{rows} rows {each / exact:.1%}" for rows, each in zip(ROWS, others, strict=True)
        )
        print(f"{threads} thread(s), {case[0]}: exact {1e3 * exact:.1f} ms, {shares}", flush=True)


def _calls(length: int, heads: int, group: int, mask: sympy.Basic) -> list[Callable[[], object]]:
    """The exact kernel, then statistics of so many rows."""
    spec = AttentionSpec(DIM**-0.5, mask=mask, group=group)
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(1, count, length, DIM, generator=generator)
        for count in (heads, heads // group, heads // group)
    ]
    shape = Shape(None, heads, heads // group, None, None, DIM, DIM)
    kernel = cpp_runner(plan_of(Problem(spec, shape, torch.float32, "cpu", False)))

    def of_rows(rows: int) -> Callable[[], object]:
        return lambda: head_statistics(*qkv, [], [], spec, rows=rows)

    return [lambda: kernel(*qkv, (), ()), *map(of_rows, ROWS)]


def _medians(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each, called in turns; two rounds go before those that count."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 2):
        for call, times in zip(calls, taken, strict=True):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return [statistics.median(times[2:]) for times in taken]


if __name__ == "__main__":
    main()
