"""What torch has: SDPA by each of its backends, its flash kernel with a window, flex_attention."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.cases import Case, Inputs

Attention = Callable[..., Any]


class Unavailable(RuntimeError):
    """What a subject cannot take, by its own account."""


_BACKENDS = {
    "any": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(name: str) -> Callable[[Case, Inputs], Attention]:
    """The model's own call, by one backend; "any" leaves the choice to torch."""

    def make(case: Case, inputs: Inputs) -> Attention:
        return _with_backend(case.form.spelling, _BACKENDS[name], inputs)

    return make


def sdpa_with_mask(name: str) -> Callable[[Case, Inputs], Attention]:
    """With a mask of all pairs, made once."""

    def make(case: Case, inputs: Inputs) -> Attention:
        place = torch.arange(case.shape.rows, device=inputs.qkv[0].device)
        assert case.form.flex_mask is not None
        mask = case.form.flex_mask(0, 0, place[:, None], place[None, :])

        def attention(q: Any, k: Any, v: Any) -> Any:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return _with_backend(attention, _BACKENDS[name], inputs)

    return make


def _with_backend(attention: Attention, backend: SDPBackend | None, inputs: Inputs) -> Attention:
    """The attention, by that backend only; Unavailable with torch's own reasons if it cannot."""
    if backend is None:
        return attention

    def chosen(*given: Any) -> Any:
        with sdpa_kernel(backend):
            return attention(*given)

    with _reasons(), torch.no_grad():
        chosen(*inputs.qkv, *inputs.operands)
    return chosen


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Put what torch warns of before it fails into the error."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            said = "; ".join(str(warning.message).split(" (Triggered")[0] for warning in seen)
            raise Unavailable(f"{error} {said}".strip()) from error


def flash_window(case: Case, inputs: Inputs) -> Attention:
    """The flash kernel with a window, which SDPA does not offer."""
    width = case.form.window
    assert width is not None

    def attention(q: Any, k: Any, v: Any) -> Any:
        out = torch.ops.aten._flash_attention_forward(
            *(tensor.transpose(1, 2) for tensor in (q, k, v)),
            *(None, None, q.shape[2], k.shape[2], 0.0, True, False),
            scale=1.0 / math.sqrt(q.shape[-1]),
            window_size_left=width - 1,
            window_size_right=0,
        )[0]
        return out.transpose(1, 2)

    return attention


def flex(compiled: bool) -> Callable[[Case, Inputs], Attention]:
    """flex_attention with a block mask that is made once, by all pairs (at 64k four gigabytes):
    compiling that would take longer. What sinks do to its result is done by its log-sum-exp."""

    def make(case: Case, inputs: Inputs) -> Attention:
        from torch.nn.attention.flex_attention import create_block_mask

        form, shape = case.form, case.shape
        mask = form.flex_mask and create_block_mask(
            form.flex_mask,
            *(None, None, shape.rows, shape.columns),
            device=str(inputs.qkv[0].device),
        )
        score = None if form.flex_score is None else form.flex_score(*inputs.operands)
        fixed = {"score_mod": score, "block_mask": mask, "enable_gqa": form.spec.group > 1}
        attention = _flex_with_sinks(fixed) if form.sinks else _flex_alone(fixed)
        return torch.compile(attention, dynamic=False) if compiled else attention

    return make


def _flex_alone(fixed: dict[str, Any]) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    return lambda q, k, v, *operands: flex_attention(q, k, v, **fixed)


def _flex_with_sinks(fixed: dict[str, Any]) -> Attention:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def attention(q: Any, k: Any, v: Any, sink: Any) -> Any:
        out, aux = flex_attention(q, k, v, **fixed, return_aux=AuxRequest(lse=True))
        share = torch.sigmoid(aux.lse - sink[None, :, None])
        return (out * share[..., None]).to(out.dtype)

    return attention
