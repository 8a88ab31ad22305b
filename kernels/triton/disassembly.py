"""The loops of a compiled kernel, and what they are made of: what a GPU does all the time.

A multiprocessor of sm_80 or sm_90 issues four instructions in a cycle, each for 32 threads, so that
what a score takes bounds the time of attention as its products do: on sm_90 those of a head
dimension of 128 take as long as 16 instructions.

By the tools in Triton's package (checked with Triton 3.6 and 3.7).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)[^;]*;")
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
# Of tiles, on sm_80 and on sm_90.
PRODUCTS = ("HMMA", "HGMMA")
_OF_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class Loop:
    """An innermost loop: how many instructions of each name a thread executes in a turn."""

    instructions: Mapping[str, int]

    @property
    def count(self) -> int:
        return sum(self.instructions.values())

    @property
    def spills(self) -> int:
        """Registers stored to memory, or loaded from there."""
        return sum(self.instructions.get(name, 0) for name in _OF_MEMORY)


def product_loops(cubin: bytes) -> tuple[Loop, ...]:
    """The innermost loops that multiply tiles, as they stand in the code."""
    names, labels, jumps = _read(said_of(cubin, "nvdisasm", "-c"))
    spans = [(labels[to], at) for at, to in jumps if labels.get(to, at + 1) <= at]
    innermost = [
        (start, stop)
        for start, stop in spans
        if not any(start <= a and b <= stop and (a, b) != (start, stop) for a, b in spans)
    ]
    loops = (Loop(Counter(names[start : stop + 1])) for start, stop in sorted(innermost))
    return tuple(loop for loop in loops if any(name in loop.instructions for name in PRODUCTS))


def _read(text: str) -> tuple[list[str], dict[str, int], list[tuple[int, str]]]:
    """The names of all instructions, the place of each label, and (place, label) of jumps."""
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(names)
        elif found := _INSTRUCTION.search(line):
            if jump := _JUMP.search(line):
                jumps.append((len(names), jump[1]))
            names.append(found[1])
    return names, labels, jumps


def said_of(cubin: bytes, tool: str, option: str) -> str:
    """What a tool of Triton's package prints of a compiled kernel."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(path), option, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
