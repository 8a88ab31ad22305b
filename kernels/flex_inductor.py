"""Adapter: flex_attention's kernel, compiled by Inductor for one pair of modifiers.

The only module that touches the private parts of flex_attention and Inductor that this takes: the
higher-order op, the tuple form of a block mask, compile_fx_inner. Checked against torch 2.13 (the
arity of the tuple is read from BlockMask itself, so other versions need no change there); its
Triton template for GPUs against 2.11 and 2.13, in Triton's interpreter: it has not run on one.

The kernel is compiled apart from the graphs that use it, straight through Inductor: no Dynamo
cache fills up, no epilogue is fused into it and no view of a Linear's output reaches it (both are
errors in torch 2.13), and one compilation serves all layers. Sizes and strides are symbols, so one
kernel also serves every batch and length; heads, head dimensions, dtype, ranks of operands and
block sizes are constants.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_hop
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.nn.attention.flex_attention import BlockMask

# Inductor keeps settings and handlers in process-wide state: one compilation at a time.
_COMPILING = threading.RLock()

_OPTIONS = {
    "BACKEND": "AUTO",
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": False,
    "OUTPUT_MAX": False,
}

# On GPUs strides of q, k and v but the last are multiples of this: loads are as wide as they can be
# only where Triton knows. Head dimensions are, too.
GPU_STRIDES = 16


@dataclass(frozen=True)
class FlexConfig:
    """What a compiled kernel is specialized for; block is (rows, columns).

    whole: both lengths are multiples of the block, so that a GPU checks no bounds.
    """

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    block: tuple[int, int]
    whole: bool = False


@dataclass(frozen=True)
class FlexVariant:
    """Where a kernel runs, compiled for each anew.

    threads: on the CPU the template has scratch for just so many. wide: on a GPU some tensor takes
    offsets of 64 bits.
    """

    device: torch.device
    threads: int = 0
    wide: bool = False


ScoreMod = Callable[..., Any]
MaskMod = Callable[..., Any]


def compile_flex(
    config: FlexConfig,
    variant: FlexVariant,
    score_mod: ScoreMod,
    mask_mod: MaskMod,
    score_operands: Sequence[tuple[torch.dtype, int]],
    mask_operands: Sequence[tuple[torch.dtype, int]],
) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """A kernel called with [q, k, v, *block lists, *score operands, *mask operands], no gradients.

    score_mod(score, b, h, q, k, *score_operands) and mask_mod(b, h, q, k, *mask_operands). Operands
    are given by dtype and rank: 0 for a single number, 1 for a table [n] that is read by
    `read_table`; each must be used, and one that both read is given twice (the template loses track
    of it otherwise, and of every shape symbol inside a modifier). Block lists are int32:
    kv_num_blocks [1,1,Qb], kv_indices [1,1,Qb,Kb], and the same two for full blocks; on a GPU with
    the same Kb, as the template of torch 2.11 steps through both tables by the stride of the first.
    Returns [B,H,M,E], laid out as [B,M,H,E]. Raises what Inductor raises.
    """
    sizes = _Symbols(variant)
    options = _OPTIONS if variant.device.type == "cpu" else _gpu_options(config)
    operands = (*score_operands, *mask_operands)
    example = [*_example(config, sizes, operands), *sizes.steps]
    count = len(score_operands)

    def run(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        lists, tensors = rest[:4], tuple(rest[4 : 4 + len(operands)])
        for_score, for_mask = tensors[:count], tensors[count:]
        blocks = _block_tuple((q.size(2), k.size(2)), lists, config.block, mask_mod)
        out = flex_attention_hop(
            q, k, v, score_mod, blocks, config.scale, dict(options), for_score, for_mask
        )
        return (out[0],)

    with _COMPILING, torch.no_grad():
        with sizes.mode:
            graph_module = make_fx(run, decomposition_table=select_decomp_table())(*example)
        graph_module.graph.eliminate_dead_code()  # LSE and maximum, which the CPU kernel lacks
        graph_module.recompile()
        settings = _settings(variant)
        with tracing(TracingContext(sizes.mode)), inductor_config.patch(settings):
            compiled = compile_fx_inner(graph_module, example, is_inference=True)

    def call(tensors: list[torch.Tensor]) -> torch.Tensor:
        (out,) = compiled([*tensors, *(_steps(tensors) if sizes.steps else ())])
        result: torch.Tensor = out
        return result

    return call


def _steps(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The strides of q, k and v as `_Symbols.stride` has them."""
    return [stride // GPU_STRIDES for tensor in tensors[:3] for stride in tensor.stride()[:-1]]


def _gpu_options(config: FlexConfig) -> dict[str, Any]:
    """Options of the Triton template.

    Not the one for few rows: it wants a batch that is known when compiling. Products of float32 are
    not left to what the process says at this moment.
    """
    return {
        **_OPTIONS,
        "BACKEND": "TRITON",
        "FLOAT32_PRECISION": "'ieee'",
        "IS_DIVISIBLE": config.whole,
    }


def _settings(variant: FlexVariant) -> dict[str, Any]:
    """Settings of Inductor, whatever those of the graph around are."""
    common = {
        "epilogue_fusion": False,
        "cpp_wrapper": False,
        "freezing": False,
        "assert_indirect_indexing": False,
    }
    if variant.device.type == "cpu":
        # What the template takes anyway, said where Inductor's own caches take it for a part of the
        # key: code for other threads writes past its scratch.
        return {**common, "cpp.threads": variant.threads}
    # No graph inside of one that is being captured; one choice of tiles, so that nothing is timed.
    return {**common, "triton.cudagraphs": False, "max_autotune": False}


def read_table(table: Any, index: Any) -> Any:
    """The element of a table [n] at an index, as the template can generate it.

    This read is neither wrapped nor checked: for the CPU `table[index]` would mention the table's
    size, which the template does not declare; for GPUs it is just that, and no other read works.
    """
    index = torch.as_tensor(index).to(torch.int64)
    if table.device.type != "cpu":
        return table[index]
    return torch.ops.aten._unsafe_masked_index.default(table, index >= 0, [index], 0)


class _Symbols:
    """Shape symbols of a private ShapeEnv; their hints differ, so that no two are taken for one."""

    def __init__(self, variant: FlexVariant) -> None:
        self.env = ShapeEnv(duck_shape=False, specialize_zero_one=True)
        self.mode = FakeTensorMode(shape_env=self.env)
        self.variant = variant
        self.steps: list[Any] = []
        self._count = 0

    def size(self, hint: int) -> Any:
        self._count += 1
        source = ConstantSource(f"adaattn_size_{self._count}")
        symbol = self.env.create_symbol(hint, source, DimDynamic.DYNAMIC)
        return self.env.create_symintnode(symbol, hint=hint, source=source)

    def stride(self, hint: int) -> Any:
        """On a GPU a multiple of GPU_STRIDES that Triton sees to be one; how many times that are
        arguments of the kernel, which nothing else says."""
        if self.variant.device.type == "cpu":
            return self.size(hint)
        self.steps.append(self.size(-(-hint // GPU_STRIDES)))
        return GPU_STRIDES * self.steps[-1]

    def tensor(self, sizes: Sequence[Any], strides: Sequence[Any], dtype: torch.dtype) -> Any:
        with self.mode:
            return torch.empty_strided(
                tuple(sizes), tuple(strides), dtype=dtype, device=self.variant.device
            )

    def contiguous(self, sizes: Sequence[Any], dtype: torch.dtype) -> Any:
        strides: list[Any] = []
        step: Any = 1
        for size in reversed(sizes):
            strides.append(step)
            step = step * size
        return self.tensor(sizes, strides[::-1], dtype)


def _example(
    config: FlexConfig, sizes: _Symbols, operands: Sequence[tuple[torch.dtype, int]]
) -> list[Any]:
    """Fake arguments whose sizes and strides are all symbols; hints are far from 0 and 1."""
    # Inductor takes 32 bits for offsets where the hints allow it.
    batch = sizes.size(3 if not sizes.variant.wide else 1 << 20)
    rows, columns = sizes.size(1031), sizes.size(1153)

    def operand(heads: int, length: Any, dim: int) -> Any:
        # As if [B,N,H,D] lay in memory (the result is laid out like Q), with gaps: were it dense,
        # its strides would be taken for products of its sizes.
        row = heads * dim + 24
        strides = (
            sizes.stride(int(length.node.hint) * row + 40),
            sizes.stride(dim + 8),
            sizes.stride(row),
            1,
        )
        return sizes.tensor((batch, heads, length, dim), strides, config.dtype)

    mask_batch, mask_heads = sizes.size(5), sizes.size(7)
    row_blocks = sizes.size(2000 // config.block[0] + 3)
    some, full = (sizes.size(2000 // config.block[1] + extra) for extra in (5, 11))
    if sizes.variant.device.type != "cpu":
        full = some
    lead = (mask_batch, mask_heads, row_blocks)
    lists = [
        sizes.contiguous(shape, torch.int32) for shape in (lead, (*lead, some), lead, (*lead, full))
    ]
    extra = [sizes.contiguous([sizes.size(101)] if rank else [], dtype) for dtype, rank in operands]
    return [
        operand(config.heads, rows, config.head_dim),
        operand(config.kv_heads, columns, config.head_dim),
        operand(config.kv_heads, columns, config.value_dim),
        *lists,
        *extra,
    ]


def _block_tuple(
    lengths: tuple[Any, Any], lists: Sequence[Any], block: tuple[int, int], mask_mod: MaskMod
) -> Any:
    """The higher-order op's form of a block mask, in this torch's order."""
    code = BlockMask.__init__.__code__
    given = {
        "seq_lengths": lengths,
        "kv_num_blocks": lists[0],
        "kv_indices": lists[1],
        "full_kv_num_blocks": lists[2],
        "full_kv_indices": lists[3],
        "BLOCK_SIZE": block,
        "mask_mod": mask_mod,
    }
    names = code.co_varnames[1 : code.co_argcount]
    named: dict[str, Any] = {name: given.get(name) for name in names}
    return BlockMask(**named).as_tuple()
