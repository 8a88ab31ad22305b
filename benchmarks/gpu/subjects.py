"""Who computes a case: our kernel, torch's, flex_attention, and compiled models.

A subject is made once, with all that a caller would keep (block masks, tables, compiled code), and
then called; making it may raise, which says why it cannot take the case. On a CPU, in a dry run,
what needs a GPU is stood in for.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Inputs
from benchmarks.gpu.ours import our_backward, our_decode, our_forward
from benchmarks.gpu.torchs import flash_window, flex, sdpa, sdpa_with_mask

Attention = Callable[..., Any]
OURS = "ours"


@dataclass(frozen=True)
class Subject:
    """A name, and how its attention is made: of a case and its inputs, a function of q, k, v and
    operands."""

    name: str
    make: Callable[[Case, Inputs], Attention]

    @property
    def ours(self) -> bool:
        return self.name.startswith((OURS, "adaattn"))

    @property
    def compiles(self) -> bool:
        """Whether caches on disk make the next call sooner."""
        return not self.name.startswith(("sdpa", "flash"))


def subjects(case: Case, dry: bool) -> tuple[Subject, ...]:
    """Those of a case, ours first."""
    direct = our_backward if case.training else our_decode if case.shape.rows == 1 else our_forward
    kernels = tuple(
        Subject(f"{OURS} {tiling}", _standing_in if dry else direct(tiling))
        for tiling in case.tilings
    )
    return (*kernels, *(Subject(name, _maker(name, dry)) for name in case.subjects))


def call_of(case: Case, attention: Attention, inputs: Inputs) -> Callable[[], Any]:
    """One call: forward, or forward and backward, giving the gradients of q, k and v."""
    if not case.training:

        def forward() -> Any:
            with torch.no_grad():
                return attention(*inputs.qkv, *inputs.operands)

        return forward

    def both_ways() -> Any:
        out = attention(*inputs.qkv, *inputs.operands)
        return torch.autograd.grad(out, inputs.qkv, inputs.grad_out)

    return both_ways


def _maker(name: str, dry: bool) -> Callable[[Case, Inputs], Attention]:
    if name in ("adaattn", "inductor"):
        return _compiled("eager" if dry else name)
    if name == "adaattn triton":
        return _compiled("eager") if dry else _compiled("adaattn", {"kernels": "triton"})
    if name == "flex":
        return flex(compiled=not dry)
    if name == "flash window":
        return flash_window
    backend = "any" if name == "sdpa" else name.split()[-1]
    return sdpa_with_mask(backend) if "mask" in name else sdpa(backend)


def _standing_in(case: Case, inputs: Inputs) -> Attention:
    """The oracle in place of our kernel."""
    from adaattn_compiler.kernels.reference import reference_attention

    return lambda q, k, v, *operands: reference_attention(q, k, v, operands, (), case.form.spec)


def _compiled(
    backend: str, options: dict[str, Any] | None = None
) -> Callable[[Case, Inputs], Attention]:
    def make(case: Case, inputs: Inputs) -> Attention:
        model = with_own_code(case.form.spelling)
        compiled: Attention = torch.compile(model, backend=backend, dynamic=False, options=options)
        return compiled

    return make


def with_own_code(function: Any) -> Any:
    """A copy that Dynamo, which goes by code objects, compiles and guards apart from others."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
