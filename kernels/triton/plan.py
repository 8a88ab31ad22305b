"""What one Triton kernel is for, in full: as a value, and as the text that an op carries."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.triton.gradient_source import backward_source
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.launch_backward import (
    BackwardTiles,
    backward_tables,
    backward_tiles,
)
from adaattn_compiler.kernels.triton.launch_decode import splits_for, tiles_for_few_rows
from adaattn_compiler.kernels.triton.ranges import ranges_are_exact
from adaattn_compiler.kernels.triton.source import (
    Configuration,
    decode_source,
    forward_source,
)
from adaattn_compiler.kernels.triton.tables import BlockTable, block_table
from adaattn_compiler.spec import AttentionSpec, Load, k, q
from adaattn_compiler.target import DeviceTarget


@dataclass(frozen=True)
class TritonPlan:
    """A kernel with its tiles.

    listed: the blocks that rows attend to stand in a table, not in a closed form (ranges.py).
    precision: of products of float32. backward: the tiles of the backward pass, where there is one.
    splits: programs that share the keys of few rows (decode.py); 0 where rows are many.
    """

    made_for: Configuration
    tiles: Tiles
    listed: bool = False
    precision: str = "ieee"
    backward: BackwardTiles | None = None
    splits: int = 0

    def serialize(self) -> str:
        """One line of text from which `deserialize` makes an equal plan, in any process.

        It holds what generates the code as a digest: torch's caches keep what they compiled for a
        graph by the graph alone.
        """
        return repr(
            {
                "kernel": "triton",
                "spec": self.made_for.spec.serialize(),
                "operands": self.made_for.dtypes,
                "halves": self.made_for.halves,
                "tiles": dataclasses.astuple(self.tiles),
                "listed": self.listed,
                "precision": self.precision,
                "backward": None if self.backward is None else self.backward.numbers(),
                "splits": self.splits,
                "code": digest_of_code(),
            }
        )

    def sources(self) -> list[str]:
        """The modules that it runs."""
        if self.splits:
            return [decode_source(self.made_for)]
        backward = [backward_source(self.made_for)] if self.backward else []
        return [forward_source(self.made_for), *backward]

    @staticmethod
    @functools.cache
    def deserialize(text: str) -> TritonPlan:
        """ValueError where the text is not of that form."""
        try:
            fields = ast.literal_eval(text)
            spec = AttentionSpec.deserialize(fields["spec"])
            return TritonPlan(
                Configuration(spec, fields["operands"], fields["halves"]),
                Tiles(*fields["tiles"]),
                fields["listed"],
                fields["precision"],
                None if fields["backward"] is None else BackwardTiles.of(fields["backward"]),
                fields["splits"],
            )
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"not a plan of a Triton kernel: {text[:80]!r}") from error


@functools.cache
def digest_of_code() -> str:
    """Of all that generates kernels."""
    folder = Path(__file__).parent
    beside = (folder.parent / name for name in ("derivatives.py", "printing.py"))
    files = (path for path in sorted(folder.iterdir()) if path.suffix == ".py")
    text = b"".join(path.read_bytes() for path in (*beside, *files))
    return hashlib.sha256(text).hexdigest()[:12]


def configuration_of(problem: Problem) -> Configuration:
    """What a problem's kernel is generated for."""
    names = (str(dtype).removeprefix("torch.") for dtype in problem.dtypes_of_operands())
    return Configuration(problem.spec, tuple(names), problem.dtype.itemsize == 2)


def plan_of(problem: Problem, tiles: Tiles, target: DeviceTarget) -> TritonPlan:
    """The plan of a problem with such tiles on a device.

    Where sizes are known only at run time, closed forms serve: they hold for any.
    """
    made_for, shape = configuration_of(problem), problem.shape
    if _has_few_rows(problem):
        batch, _, columns = shape.hints
        splits = splits_for(batch, shape.kv_heads, columns, target.multiprocessors)
        return TritonPlan(made_for, tiles, splits=splits)
    backward = None
    if problem.requires_grad:
        dims = (shape.head_dim, shape.value_dim)
        backward = backward_tiles(*dims, problem.dtype, _generation(target))
    return TritonPlan(made_for, tiles, _is_listed(problem, tiles), backward=backward)


def _has_few_rows(problem: Problem) -> bool:
    rows = problem.shape.rows
    return rows is not None and rows <= FEW_ROWS and not problem.requires_grad


@functools.lru_cache(maxsize=256)
def _is_listed(problem: Problem, tiles: Tiles) -> bool:
    shape = problem.shape
    if shape.rows is None or shape.columns is None or problem.spec.params:
        return False
    block = (tiles.rows, tiles.keys)
    return not ranges_are_exact(problem.spec.mask, (shape.rows, shape.columns), block)


@functools.lru_cache(maxsize=64)
def tables_of(plan: TritonPlan, rows: int, columns: int) -> tuple[BlockTable, ...]:
    """The blocks of a plan's mask, on the CPU: of the forward pass, then `backward_tables`."""
    tiles, spec = plan.tiles, plan.made_for.spec
    with _disable_current_modes():  # while torch traces an op, too, it is made of numbers
        structure = block_structure(spec.mask, rows, columns, tiles.rows, tiles.keys)
        forward = block_table(structure, ragged=columns % tiles.keys != 0)
        if plan.backward is None:
            return (forward,)
        return (forward, *backward_tables(spec, rows, columns, plan.backward))


# -- tiles -----------------------------------------------------------------------------------------

# At most so many rows count as few: the keys are then divided among programs.
FEW_ROWS = 16

# By capability and by the wider of the head dimensions, for tensors of 16 bits: what compiles
# without spills, the likeliest first.
_TILES: dict[int, Sequence[tuple[int, tuple[Tiles, ...]]]] = {
    80: (
        (64, (Tiles(128, 64, 8, 3), Tiles(128, 32, 4, 4), Tiles(64, 64, 4, 3))),
        (128, (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 2))),
        (256, (Tiles(64, 32, 8, 2),)),
    ),
    90: (
        (64, (Tiles(128, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3))),
        (128, (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3))),
        (256, (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2))),
    ),
}
# Where the score or mask reads a tensor for each row and key: its addresses take registers.
_ELEMENT_TILES: dict[int, Sequence[tuple[int, tuple[Tiles, ...]]]] = {
    80: (
        (64, (Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2))),
        (128, (Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2))),
        (256, (Tiles(64, 32, 8, 2),)),
    ),
    90: (
        (64, (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2))),
        (128, (Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2))),
        (256, (Tiles(64, 32, 8, 2),)),
    ),
}
# float32 takes twice the memory, and its products by ordinary instructions many registers.
_WIDE_TILES = (
    (64, (Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2))),
    (128, (Tiles(32, 16, 4, 2),)),
    (256, (Tiles(32, 16, 8, 2),)),
)


def tiles_for(problem: Problem, target: DeviceTarget) -> tuple[Tiles, ...]:
    """Tiles that a problem may take on a device, the likeliest first.

    Tiles of more rows than there are would be empty for the most part.
    """
    halves = problem.dtype in (torch.float16, torch.bfloat16)
    shape = problem.shape
    widest = max(shape.head_dim, shape.value_dim)
    if _has_few_rows(problem):
        pairs = problem.spec.group * shape.hints[1]
        return (tiles_for_few_rows(pairs, widest, problem.dtype.itemsize),)
    by_capability = _ELEMENT_TILES if _reads_elements(problem.spec) else _TILES
    table = by_capability[_generation(target)] if halves else _WIDE_TILES
    found = next(tiles for width, tiles in table if widest <= width)
    if halves and target.capability == (8, 9) and widest > 64:
        found = (Tiles(64, 32, 8, 2),)  # less shared memory than sm_80
    fitting = tuple(tiles for tiles in found if tiles.rows < 2 * max(shape.hints[1], 32))
    return fitting or found[-1:]


def _generation(target: DeviceTarget) -> int:
    """The capability whose tiles a device takes: 80 or 90."""
    assert target.capability is not None
    return 90 if target.capability >= (9, 0) else 80


def _reads_elements(spec: AttentionSpec) -> bool:
    loads = spec.score.atoms(Load) | spec.mask.atoms(Load)
    return any(load.has(q) and load.has(k) for load in loads)
