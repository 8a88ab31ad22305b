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
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.launch_backward import (
    BackwardTiles,
    backward_tables,
    backward_tiles,
)
from adaattn_compiler.kernels.triton.ranges import ranges_are_exact
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.kernels.triton.tables import BlockTable, block_table
from adaattn_compiler.spec import AttentionSpec
from adaattn_compiler.target import DeviceTarget


@dataclass(frozen=True)
class TritonPlan:
    """A kernel with its tiles.

    listed: the blocks that rows attend to stand in a table, not in a closed form (ranges.py).
    precision: of products of float32. backward: the tiles of the backward pass, where there is one.
    """

    made_for: Configuration
    tiles: Tiles
    listed: bool = False
    precision: str = "ieee"
    backward: BackwardTiles | None = None

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
                "tiles": dataclasses.astuple(self.tiles),
                "listed": self.listed,
                "precision": self.precision,
                "backward": None if self.backward is None else self.backward.numbers(),
                "code": digest_of_code(),
            }
        )

    @staticmethod
    @functools.cache
    def deserialize(text: str) -> TritonPlan:
        """ValueError where the text is not of that form."""
        try:
            fields = ast.literal_eval(text)
            spec = AttentionSpec.deserialize(fields["spec"])
            return TritonPlan(
                Configuration(spec, fields["operands"]),
                Tiles(*fields["tiles"]),
                fields["listed"],
                fields["precision"],
                None if fields["backward"] is None else BackwardTiles.of(fields["backward"]),
            )
        except (KeyError, TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"not a plan of a Triton kernel: {text[:80]!r}") from error


@functools.cache
def digest_of_code() -> str:
    """Of all that generates kernels."""
    files = [Path(__file__).parent.parent / "printing.py", *sorted(Path(__file__).parent.iterdir())]
    text = b"".join(path.read_bytes() for path in files if path.suffix == ".py")
    return hashlib.sha256(text).hexdigest()[:12]


def configuration_of(problem: Problem) -> Configuration:
    """What a problem's kernel is generated for."""
    names = (str(dtype).removeprefix("torch.") for dtype in problem.dtypes_of_operands())
    return Configuration(problem.spec, tuple(names))


def plan_of(problem: Problem, tiles: Tiles) -> TritonPlan:
    """The plan of a problem with such tiles.

    Where sizes are known only at run time, closed forms serve: they hold for any.
    """
    made_for, shape = configuration_of(problem), problem.shape
    backward = None
    if problem.requires_grad:
        backward = backward_tiles(shape.head_dim, shape.value_dim, problem.dtype)
    return TritonPlan(made_for, tiles, _is_listed(problem, tiles), backward=backward)


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

# By capability and by the wider of the head dimensions, for tensors of 16 bits: what compiles
# without spills, the likeliest first.
_TILES: dict[int, Sequence[tuple[int, tuple[Tiles, ...]]]] = {
    8: (
        (64, (Tiles(128, 64, 4, 3), Tiles(128, 32, 4, 4), Tiles(64, 64, 4, 3))),
        (128, (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 3), Tiles(64, 64, 4, 2))),
        (256, (Tiles(64, 32, 8, 2),)),
    ),
    9: (
        (64, (Tiles(128, 128, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3))),
        (128, (Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3))),
        (256, (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2))),
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
    assert target.capability is not None
    halves = problem.dtype in (torch.float16, torch.bfloat16)
    table = _TILES[9 if target.capability[0] == 9 else 8] if halves else _WIDE_TILES
    widest = max(problem.shape.head_dim, problem.shape.value_dim)
    found = next(tiles for width, tiles in table if widest <= width)
    if halves and target.capability == (8, 9) and widest > 64:
        found = (Tiles(64, 32, 8, 2),)  # less shared memory than sm_80
    rows = problem.shape.hints[1]
    fitting = tuple(tiles for tiles in found if tiles.rows < 2 * max(rows, 32))
    return fitting or found[-1:]
