"""Attention on a GPU, beside what else computes it there, in one run.

    python -m benchmarks.gpu [--only SECTION ...] [--seconds S] [--dry-run]

`make gpu-check` runs it from a copy of the sources laid out as the package is installed. Sections
(plan.py) run one after the other, each in a process of its own (worker.py) that the first process
(supervisor.py) starts, times and, where it must, ends: a kernel that fails or hangs costs its
section and no more. What they find is written as JSON after each case (report.py).

Times are those of CUDA events around single calls (timing.py), each behind a cleared cache, all
subjects of a case in turns. Compilation comes first, in as many processes as there are cores.
"""
