"""Dynamic shapes: every site is kept, one compilation serves all lengths, and no guard is added."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, in_float64
from families import attended, bert, gpt2, llama, output, t5, tokens
from torch import fx

from adaattn_compiler.explain import SiteRecord, records
from adaattn_compiler.options import Options
from adaattn_compiler.passes.pipeline import rewrite

LENGTHS = (32, 23, 65)


@dataclass
class Guards:
    """What the shape environment held before and after the passes of each compilation."""

    before: list[tuple[int, int]] = field(default_factory=list)
    after: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class CountingBackend:
    """Rewrites and runs without Inductor, and keeps what it saw of each compilation."""

    sites: list[tuple[SiteRecord, ...]] = field(default_factory=list)
    guards: Guards = field(default_factory=Guards)

    def __call__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.guards.before.append(_held(graph_module))
        analysis = rewrite(graph_module, inputs, Options())
        self.guards.after.append(_held(graph_module))
        assert analysis.failure is None, analysis.failure
        self.sites.append(records(analysis))
        return (analysis.graph_module or graph_module).forward


def _held(graph_module: fx.GraphModule) -> tuple[int, int]:
    """How many guards and replacements the graph's shape environment holds."""
    values = (node.meta.get("example_value") for node in graph_module.graph.nodes)
    fake_mode = next(value.fake_mode for value in values if hasattr(value, "fake_mode"))
    if fake_mode.shape_env is None:
        return 0, 0
    return len(fake_mode.shape_env.guards), len(fake_mode.shape_env.replacements)


class CausalByHand(torch.nn.Module):
    """nanoGPT's attention, its triangle a buffer."""

    def __init__(self, heads: int = 4, width: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.register_buffer("triangle", torch.ones(256, 256).tril().view(1, 1, 256, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / (width // self.heads) ** 0.5)
        scores = scores.masked_fill(self.triangle[:, :, :length, :length] == 0, float("-inf"))
        out = torch.softmax(scores, -1) @ v
        return out.transpose(1, 2).contiguous().view(batch, length, width)


class CausalMadeAnew(CausalByHand):
    """The same with a triangle made in the graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        above = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        scores = (q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5).masked_fill(
            above, float("-inf")
        )
        out = torch.softmax(scores, -1) @ v
        return out.transpose(1, 2).contiguous().view(batch, length, width)


def _embedded(length: int, batch: int) -> dict[str, Any]:
    return {"x": torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(length))}


def _text(length: int, batch: int) -> dict[str, Any]:
    return {"input_ids": tokens(length, batch), "use_cache": False}


def _seq2seq(length: int, batch: int) -> dict[str, Any]:
    ids = tokens(length, batch)
    return {"input_ids": ids, "decoder_input_ids": ids[:, : length - 5], "use_cache": False}


def _padded(length: int, batch: int) -> dict[str, Any]:
    return {"input_ids": tokens(length, batch), "attention_mask": attended("right", length, batch)}


@dataclass(frozen=True)
class Case:
    """A model, its inputs for a length and batch size, and the masks expected."""

    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int, int], dict[str, Any]]
    masks: tuple[str, ...]


_T5_MASKS = ("none", "none", "causal", "none", "causal", "none")
CASES = {
    "causal buffer": Case(CausalByHand, _embedded, ("causal",)),
    "causal made anew": Case(CausalMadeAnew, _embedded, ("causal",)),
    "gpt2 eager": Case(lambda: gpt2("eager"), _text, ("causal", "causal")),
    "llama eager": Case(lambda: llama("eager"), _text, ("causal", "causal")),
    "llama sdpa": Case(lambda: llama("sdpa"), _text, ("causal", "causal")),
    "t5 eager": Case(lambda: t5("eager"), _seq2seq, _T5_MASKS),
    "bert padded eager": Case(lambda: bert("eager"), _padded, ("key padding",) * 2),
    "bert padded sdpa": Case(lambda: bert("sdpa"), _padded, ("key padding",) * 2),
}


def _value(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    return model(**inputs) if "x" in inputs else output(model, inputs)


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@contextlib.contextmanager
def _no_more_compilations() -> Iterator[None]:
    """Dynamo's own count of graphs stays."""
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    yield
    assert stats["unique_graphs"] == before


def _check_all_lengths(case: Case, backend: CountingBackend, compiled: Any, model: Any) -> None:
    """Results at several lengths and batch sizes, from the one compilation that was made."""
    exact_model = in_float64(model)
    for batch, length in zip((2, 3, 5), LENGTHS, strict=True):
        inputs = case.inputs(length, batch)
        ours, eager = _value(compiled, inputs), _value(model, inputs)
        exact = _value(exact_model, in_float64(inputs))
        assert_as_accurate(ours, eager, exact)
    assert len(backend.sites) == 1


@torch.no_grad()
def test_dynamic_compilation_keeps_all_sites_for_every_length(case: Case) -> None:
    model = case.make().eval()
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    _value(compiled, case.inputs(40, 4))
    assert [site.reason for site in backend.sites[0]] == [None] * len(case.masks)
    assert tuple(site.mask for site in backend.sites[0]) == case.masks
    with _no_more_compilations():
        _check_all_lengths(case, backend, compiled, model)


@torch.no_grad()
def test_marked_dimensions_keep_all_sites_for_every_length(case: Case) -> None:
    model = case.make().eval()
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    inputs = case.inputs(40, 4)
    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            torch._dynamo.mark_dynamic(value, 0)
            torch._dynamo.mark_dynamic(value, 1)
    _value(compiled, inputs)
    assert [site.lowered for site in backend.sites[0]] == [True] * len(case.masks)
    assert tuple(site.mask for site in backend.sites[0]) == case.masks
    with _no_more_compilations():
        _check_all_lengths(case, backend, compiled, model)


@pytest.mark.parametrize("name", ["causal made anew", "llama sdpa", "bert padded sdpa"])
@pytest.mark.parametrize(
    ("dynamic", "training", "autocast"),
    [(True, False, False), (True, True, True), (False, True, True)],
    ids=["dynamic", "dynamic-training-autocast", "static-training-autocast"],
)
def test_passes_add_no_guards(name: str, dynamic: bool, training: bool, autocast: bool) -> None:
    case = CASES[name]
    model = case.make().train(training)
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with (
        torch.set_grad_enabled(training),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        _value(compiled, case.inputs(40, 4))
    assert [site.reason for site in backend.sites[0]] == [None] * len(case.masks)
    assert backend.guards.after == backend.guards.before


@torch.no_grad()
def test_automatic_dynamic_compiles_twice_at_most() -> None:
    model = gpt2("eager").eval()
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    for length in (16, *LENGTHS):
        inputs = _text(length, 2)
        torch.testing.assert_close(_value(compiled, inputs), _value(model, inputs))
    assert len(backend.sites) == 2
    assert all(site.lowered and site.mask == "causal" for sites in backend.sites for site in sites)


@torch.no_grad()
def test_inductor_compiles_once_for_every_length() -> None:
    model = CausalMadeAnew().eval()
    compiled = torch.compile(model, backend="adaattn", dynamic=True)
    compiled(**_embedded(40, 4))
    with _no_more_compilations():
        for length in LENGTHS:
            inputs = _embedded(length, 2)
            ours, eager = compiled(**inputs), model(**inputs)
            assert_as_accurate(ours, eager, in_float64(model)(**in_float64(inputs)))


# -- functions of q, k, v, every size of which is a symbol -----------------------------------------


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))).softmax(-1) @ v


def causal_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    above = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    return scores.masked_fill(above, -torch.inf).softmax(-1) @ v


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


FUNCTIONS = (by_hand, causal_by_hand, sdpa, sdpa_causal)
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _random(batch: int, length: int, heads: int = 4, dim: int = 16) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, length, dim) for _ in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("marked", [False, True], ids=["dynamic", "marked"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_tensors_of_unknown_sizes_keep_their_site(function: Function, marked: bool) -> None:
    backend = CountingBackend()
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, dynamic=None if marked else True)
    for batch, length in ((2, 37), (3, 65), (5, 9)):
        tensors = _random(batch, length)
        if marked:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)
                torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert [[site.lowered for site in sites] for sites in backend.sites] == [[True]]


@torch.no_grad()
@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_heads_are_compiled_for_themselves(function: Function) -> None:
    """Heads and head dimension are guards: right for any, and lowered for each."""
    backend = CountingBackend()
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, dynamic=True)
    for heads, dim in ((4, 16), (6, 16), (4, 24)):
        tensors = _random(2, 37, heads, dim)
        torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert [[site.lowered for site in sites] for sites in backend.sites] == [[True]] * 3


@torch.no_grad()
@pytest.mark.parametrize("function", FUNCTIONS)
def test_heads_that_are_marked_as_dynamic_stay_so(function: Function) -> None:
    """They cannot become numbers: refused, and no error of torch's about the mark."""
    backend = CountingBackend()
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend)
    for heads in (4, 6):
        tensors = _random(2, 37, heads)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 1)
        torch.testing.assert_close(compiled(*tensors), function(*tensors))
    assert len(backend.sites) == 1
    assert [site.reason for site in backend.sites[0]] != [None]
