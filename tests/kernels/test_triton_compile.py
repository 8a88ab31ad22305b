"""Generated Triton, compiled for GPUs that need not be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from forms import SQUARE
from forms_as_triton import FIXED, GROUPS, operand_arguments, write_module
from specs import SPECS, WINDOW

from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.kernels.triton.compile import TYPES, Compiled, compiled_forward
from adaattn_compiler.kernels.triton.expressions import Tile
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.spec import AttentionSpec, Load, OperandSpec, S, h, k, q

# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# Products of tiles, of 16-bit factors.
PRODUCTS = {
    80: r"mma\.sync\S*\.(\w+)\.b?f16\.b?f16",
    90: r"wgmma\.mma_async\S*\.(\w+)\.b?f16\.b?f16",
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("group", GROUPS)
def test_every_form_compiles(group: str, capability: int, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = write_module(tmp_path / "forms.py")
    signature = dict.fromkeys(FIXED, "i32") | {
        "out_ptr": "*fp64",
        "products_ptr": "*fp32",
        "p1": "i64",
    }
    for name, value in operand_arguments():
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = f"*{TYPES[str(value.dtype)[6:]]}" if is_tensor else "i32"
    sizes = {"SQUARE": SQUARE, "BLOCK": 16}
    signature |= dict.fromkeys(sizes, "constexpr")
    source = ASTSource(getattr(module, group), signature, constexprs=sizes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


def test_operand_without_a_form_is_refused() -> None:
    with pytest.raises(NoCode, match=r"no Triton type for torch\.uint16"):
        Tile(["uint16"]).printed(Load(0, k))


def assert_good_code(compiled: Compiled, capability: int) -> None:
    assert compiled.spills == 0
    assert compiled.shared_memory <= SHARED[capability]
    products = re.findall(PRODUCTS[capability], compiled.ptx)
    assert products
    assert set(products) == {"f32"}  # what products are added up in


# Tiles that public kernels of this kind take, and as many stages.
@pytest.mark.parametrize(
    ("capability", "head_dim", "tiles", "dtype"),
    [
        (80, 64, Tiles(128, 64, 4, 3), "bfloat16"),
        (80, 128, Tiles(128, 64, 8, 2), "float16"),
        (90, 64, Tiles(128, 128, 8, 3), "bfloat16"),
        (90, 128, Tiles(128, 64, 8, 3), "bfloat16"),
        (90, 128, Tiles(128, 128, 8, 2), "float16"),
    ],
    ids=str,
)
def test_tiles_of_public_kernels_fit(
    capability: int, head_dim: int, tiles: Tiles, dtype: str
) -> None:
    pytest.importorskip("triton")
    causal = Configuration(SPECS["causal"][0])
    for listed in (False, True):
        compiled = compiled_forward(
            causal, dtype, (head_dim, head_dim), tiles, capability, listed=listed
        )
        assert_good_code(compiled, capability)


ALIBI = AttentionSpec(0.125, S + (k - q) * Load(0, h), WINDOW, operands=(OperandSpec("float", 1),))
FEATURES = {name: spec for name, (spec, _, _) in SPECS.items()} | {"alibi in a window": ALIBI}


def reads_tile(spec: AttentionSpec) -> bool:
    return any(load.has(q) and load.has(k) for load in spec.score.atoms(Load))


@pytest.mark.parametrize(
    ("name", "capability"),
    [*((name, 90) for name in FEATURES), ("causal distance", 80), ("sink", 80), ("softcap", 80)],
)
def test_feature_compiles_without_spills(name: str, capability: int) -> None:
    pytest.importorskip("triton")
    spec = FEATURES[name]
    usual = {"bool": "bool", "int": "int64", "float": "float32"}
    made_for = Configuration(spec, tuple(usual[operand.kind] for operand in spec.operands))
    # A bias for each row and key is a tile more.
    tiles = Tiles(64, 32, 4, 2) if reads_tile(spec) else Tiles(128, 64, 8, 2)
    compiled = compiled_forward(made_for, "bfloat16", (128, 128), tiles, capability)
    assert_good_code(compiled, capability)


@pytest.mark.parametrize(
    ("head_dim", "tiles"), [(80, Tiles(128, 64, 8, 2)), (128, Tiles(128, 128, 8, 2))], ids=str
)
def test_tiles_by_descriptors_come_by_the_accelerator(head_dim: int, tiles: Tiles) -> None:
    pytest.importorskip("triton")
    causal = Configuration(SPECS["causal"][0])
    given = (causal, "bfloat16", (head_dim, head_dim), tiles, 90)
    assert "cp.async.bulk.tensor" not in compiled_forward(*given).ptx
    for persistent in (False, True):
        compiled = compiled_forward(*given, by_descriptor=True, persistent=persistent)
        assert "cp.async.bulk.tensor" in compiled.ptx
        assert_good_code(compiled, 90)
