"""Instructions for a score in the inner loops of generated kernels: counted, not measured.

    python -m benchmarks.instructions [--capability 80|90]

In bfloat16, with the likeliest tiles of plans and lengths that blocks divide: how many instructions
a multiprocessor issues for 32 scores, products included, where a block is wholly attended and where
the mask cuts it. No GPU is needed; what one makes of them, beside products and memory, is not said.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.triton.compile import Compiled, compiled_backward, compiled_forward
from adaattn_compiler.kernels.triton.disassembly import product_loops
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.launch_backward import GRAD_KV, GRAD_Q, backward_tiles
from adaattn_compiler.kernels.triton.plan import configuration_of, tiles_for
from adaattn_compiler.target import target_named
from benchmarks.gpu.forms import Form, alibi, causal, plain, sinks, softcap, windowed

_HEADS, _LENGTH = 32, 4096


def forms(dim: int) -> dict[str, Form]:
    """By name."""
    return {
        "plain": plain(dim),
        "causal": causal(dim),
        "window": windowed(dim, 1024),
        "sinks and window": sinks(dim, 8, 128),
        "softcap": softcap(dim, 2, 50.0),
        "ALiBi": alibi(dim),
    }


def rows(capability: int) -> Iterator[tuple[str, int, str, Tiles, list[float]]]:
    """(attention, head dimension, kernel, tiles, instructions for a score in each loop)."""
    for dim in (64, 128):
        for name, form in forms(dim).items():
            problem = _problem(form, dim)
            tiles = tiles_for(problem, target_named(f"sm_{capability}"))[0]
            made_for, dims = configuration_of(problem), (dim, dim)
            built = compiled_forward(
                made_for,
                "bfloat16",
                dims,
                tiles,
                capability,
                has_lse=False,
                has_statistics=False,
                ragged=False,
            )
            yield name, dim, "forward", tiles, _for_a_score(built, tiles)
        for kernel, its, loops in _backward(dim, capability):
            yield "causal", dim, kernel, its, loops


def _problem(form: Form, dim: int) -> Problem:
    groups = _HEADS // form.spec.group
    hints = (1, _LENGTH, _LENGTH)
    shape = Shape(1, _HEADS, groups, _LENGTH, _LENGTH, dim, dim, hints)
    shapes = ((_HEADS,),) * form.operands
    return Problem(form.spec, shape, torch.bfloat16, "cuda", False, shapes)


def _backward(dim: int, capability: int) -> Iterator[tuple[str, Tiles, list[float]]]:
    made_for, dims = configuration_of(_problem(causal(dim), dim)), (dim, dim)
    tiles = backward_tiles(*dims, torch.bfloat16, capability)
    found = compiled_backward(made_for, "bfloat16", dims, tiles, capability)
    for name, its in ((GRAD_Q, tiles.queries), (GRAD_KV, tiles.keys)):
        yield name, its, _for_a_score(found[name], its)


def _for_a_score(built: Compiled, tiles: Tiles) -> list[float]:
    scores = tiles.rows * tiles.keys / (32 * tiles.warps)  # of a thread
    return [loop.count / scores for loop in product_loops(built.cubin)]


def _line(cells: Sequence[str]) -> str:
    return "{:18} {:>4} {:18} {:>10} {:>8} {:>8}".format(*cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--capability", type=int, choices=(80, 90), default=90)
    capability = parser.parse_args().capability
    print(f"sm_{capability}, instructions for a score: in whole blocks, in blocks the mask cuts\n")
    print(_line(("attention", "D", "kernel", "tiles", "whole", "cut")))
    for name, dim, kernel, tiles, loops in rows(capability):
        figures = [f"{each:.1f}" for each in loops[:2]]
        if len(figures) != 2:
            raise RuntimeError(f"{name}, D {dim}, {kernel}: {len(loops)} loops of products, not 2")
        print(_line((name, str(dim), kernel, f"{tiles.rows}x{tiles.keys}", *figures)), flush=True)


if __name__ == "__main__":
    main()
