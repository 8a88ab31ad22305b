"""The timed cases: which attention, at which size, computed by which subjects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu import forms
from benchmarks.gpu.forms import Form


@dataclass(frozen=True)
class Shape:
    """q [B,H,M,D], k [B,G,N,D], v [B,G,N,D]."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    columns: int
    dim: int


@dataclass(frozen=True)
class Tiling:
    """Rows and keys of a tile, warps, and stages of the pipeline: one build of our kernel.

    lazy: it rescales its sums only when the maximum has grown by much. by_descriptor: keys and
    values come by the tensor memory accelerator. persistent: each program takes tiles in turn.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    lazy: bool = False
    by_descriptor: bool = False
    persistent: bool = False

    def __str__(self) -> str:
        how = " lazy" * self.lazy + " tma" * self.by_descriptor + " persistent" * self.persistent
        return f"{self.rows}x{self.keys} w{self.warps} s{self.stages}{how}"


@dataclass(frozen=True)
class Case:
    """subjects: names of subjects.py, beside our kernel in each tiling."""

    name: str
    form: Form
    shape: Shape
    subjects: tuple[str, ...]
    tilings: tuple[Tiling, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    training: bool = False

    @property
    def flop(self) -> float:
        """Of the products with attended keys: two forward, and five more backward."""
        shape = self.shape
        pairs = shape.rows * shape.columns * self.form.attended(shape.rows, shape.columns)
        forward = 4.0 * shape.batch * shape.heads * pairs * shape.dim
        return 3.5 * forward if self.training else forward

    @property
    def bytes_of_keys(self) -> int:
        """Of k and v, each read once."""
        shape = self.shape
        elements = 2 * shape.batch * shape.kv_heads * shape.columns * shape.dim
        return elements * self.dtype.itemsize

    def tiny(self) -> Case:
        """The same at a size for a CPU."""
        small = replace(
            self.shape,
            batch=min(self.shape.batch, 2),
            heads=2 * self.shape.heads // self.shape.kv_heads,
            kv_heads=2,
            rows=min(self.shape.rows, 32),
            columns=min(self.shape.columns, 32),
        )
        return replace(self, shape=small, tilings=self.tilings[:1], dtype=torch.float32)


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case, laid out [B, M, H, D] as projections leave them."""

    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    operands: tuple[torch.Tensor, ...]
    grad_out: torch.Tensor | None

    @staticmethod
    def of(case: Case, device: str) -> Inputs:
        torch.manual_seed(0)
        shape = case.shape

        def random(length: int, heads: int) -> torch.Tensor:
            size = (shape.batch, length, heads, shape.dim)
            data = torch.randn(size, dtype=case.dtype, device=device).transpose(1, 2)
            return data.requires_grad_() if case.training else data

        qkv = (
            random(shape.rows, shape.heads),
            random(shape.columns, shape.kv_heads),
            random(shape.columns, shape.kv_heads),
        )
        # Between 1/256 and 1: slopes of ALiBi, and logits of sinks.
        each = torch.logspace(-8, 0, shape.heads, 2.0, device=device)
        grad = torch.randn_like(qkv[0]) if case.training else None
        return Inputs(qkv, (each,) * case.form.operands, grad)


_TILINGS = {
    64: (
        Tiling(128, 128, 8, 3),
        Tiling(128, 64, 4, 3),
        Tiling(64, 64, 4, 3),
        Tiling(128, 64, 4, 3, lazy=True),
        Tiling(128, 128, 8, 3, by_descriptor=True),
    ),
    128: (
        Tiling(128, 128, 8, 2),
        Tiling(128, 64, 8, 3),
        Tiling(64, 64, 4, 3),
        Tiling(128, 128, 8, 2, lazy=True),
        Tiling(128, 128, 8, 2, by_descriptor=True),
        Tiling(128, 128, 8, 2, by_descriptor=True, persistent=True),
    ),
    256: (Tiling(128, 64, 8, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 4, 3)),
}
_NARROW = (Tiling(64, 64, 4, 3), Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 3))
_DECODE = (Tiling(16, 64, 4, 3), Tiling(16, 128, 4, 3))
# As a user has it, which kernel it may be; and the same with our kernel, whatever it is beside.
USERS = ("adaattn", "adaattn triton")
SDPA = ("sdpa cudnn", "sdpa flash", "sdpa efficient")
_TOKENS = 32 << 10


def dense() -> tuple[Case, ...]:
    """Plain and causal, 32k tokens, what matters most first."""
    points = [
        *((128, kind, n) for kind in ("causal", "plain") for n in (4096, 16384, 1024)),
        *((64, kind, n) for kind in ("causal", "plain") for n in (4096, 16384, 1024)),
        (256, "causal", 4096),
        *(
            (dim, kind, n)
            for n in (8192, 2048)
            for kind in ("causal", "plain")
            for dim in (128, 64)
        ),
    ]
    return tuple(_dense(*point) for point in points)


def _dense(dim: int, kind: str, length: int) -> Case:
    heads = 2048 // dim if dim == 256 else 16
    shape = Shape(_TOKENS // length, heads, heads, length, length, dim)
    form = {"plain": forms.plain, "causal": forms.causal}[kind](dim)
    subjects = (*SDPA, *USERS, "flex")
    return Case(f"{kind}_d{dim}_{length}", form, shape, subjects, _TILINGS[dim])


def window() -> tuple[Case, ...]:
    shape = Shape(1, 16, 16, _TOKENS, _TOKENS, 128)
    masked = tuple(name.replace("sdpa", "sdpa mask") for name in SDPA)
    subjects = ("flash window", "flex", *USERS, *masked)
    form = forms.windowed(128, 4096)
    return (Case("window_4096_of_32768", form, shape, subjects, _TILINGS[128]),)


def modified() -> tuple[Case, ...]:
    """Scores and masks that SDPA has not, by hand in the model."""
    subjects = ("flex", *USERS, "inductor")
    gpt_oss, gemma = Shape(1, 64, 8, 4096, 4096, 64), Shape(1, 32, 16, 8192, 8192, 128)
    bloom = Shape(4, 32, 32, 2048, 2048, 128)
    return (
        Case("gpt_oss_sinks_window_128", forms.sinks(64, 8, 128), gpt_oss, subjects, _NARROW),
        Case("gemma2_softcap", forms.softcap(128, 2, 50.0), gemma, subjects, _NARROW),
        Case("gemma2_softcap_window", forms.softcap(128, 2, 50.0, 4096), gemma, subjects, _NARROW),
        Case("bloom_alibi", forms.alibi(128), bloom, subjects, _NARROW),
    )


def backward() -> tuple[Case, ...]:
    """Forward and backward, causal."""

    def found() -> Iterator[Case]:
        for length in (2048, 8192):
            shape = Shape(_TOKENS // length, 16, 16, length, length, 128)
            subjects = (*SDPA, *USERS, "flex")
            name = f"training_causal_d128_{length}"
            tilings = _TILINGS[128][:2]
            yield Case(name, forms.causal(128), shape, subjects, tilings, training=True)

    return tuple(found())


def decode() -> tuple[Case, ...]:
    """One query row, eight query heads to a key head."""

    def case(length: int) -> Case:
        shape = Shape(8, 32, 4, 1, length, 128)
        subjects = ("sdpa", *SDPA, *USERS, "flex")
        return Case(f"decode_{length}", forms.plain(128, 8), shape, subjects, _DECODE)

    return tuple(case(length) for length in (16384, 65536, 4096))
