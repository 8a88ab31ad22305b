"""Composite calls written out, and bodies of higher-order ops: what is lowered, and how exactly."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, in_float64, run
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager_decomp_partition
from torch.testing import FileCheck
from torch.utils.checkpoint import checkpoint

from adaattn_compiler.options import Options
from adaattn_compiler.passes.expand import expand
from adaattn_compiler.passes.pipeline import rewrite

E, HEADS = 16, 4
MHA = "multi_head_attention_forward"


def _spread(module: nn.Module) -> nn.Module:
    """Parameters that matter: biases are zero as torch initializes them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


class Attend(nn.Module):
    """nn.MultiheadAttention, of which only the output is used."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **kwargs})
        _spread(self)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor = self.attention(*args, **kwargs)[0]
        return out


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    empty = padding.clone()
    empty[1] = True
    mask = torch.rand(5, 7, generator=generator) > 0.6
    heads_mask = torch.rand(2 * HEADS, 5, 7, generator=generator) > 0.6
    mask[:, 0] = heads_mask[..., 0] = False
    return {
        "q": torch.randn(2, 5, E, generator=generator),
        "k": torch.randn(2, 7, E, generator=generator),
        "v": torch.randn(2, 7, E, generator=generator),
        "padding": padding,
        "empty": empty,
        "float_padding": torch.randn(2, 7, generator=generator),
        "mask": mask,
        "heads_mask": heads_mask,
        "float_mask": torch.randn(5, 7, generator=generator),
        "causal": torch.ones(5, 5, dtype=torch.bool).triu(1),
    }


# name -> how the module is made, names of query, key and value, names of masks, other arguments
CASES: dict[str, tuple[dict[str, Any], str, dict[str, str], dict[str, Any]]] = {
    "self": ({}, "qqq", {}, {}),
    "cross": ({}, "qkk", {}, {}),
    "three inputs": ({}, "qkv", {}, {}),
    "packed query and key": ({}, "kkv", {}, {}),
    "sequence first": ({"batch_first": False}, "qqq", {}, {}),
    "no bias": ({"bias": False}, "qkk", {}, {}),
    "padding": ({}, "qkk", {"key_padding_mask": "padding"}, {}),
    "empty rows": ({}, "qkk", {"key_padding_mask": "empty"}, {}),
    "float padding": ({}, "qkk", {"key_padding_mask": "float_padding"}, {}),
    "mask": ({}, "qkk", {"attn_mask": "mask"}, {}),
    "float mask": ({}, "qkk", {"attn_mask": "float_mask"}, {}),
    "mask of heads": ({}, "qkk", {"attn_mask": "heads_mask"}, {}),
    "both masks": ({}, "qkk", {"attn_mask": "heads_mask", "key_padding_mask": "padding"}, {}),
    "causal": ({}, "qqq", {"attn_mask": "causal"}, {"is_causal": True}),
    "bias rows": ({"add_bias_kv": True}, "qkk", {"attn_mask": "mask"}, {}),
    "zero row": ({"add_zero_attn": True}, "qkk", {"key_padding_mask": "padding"}, {}),
    "both rows": (
        {"add_bias_kv": True, "add_zero_attn": True},
        "qkk",
        {"attn_mask": "mask", "key_padding_mask": "padding"},
        {},
    ),
}


def _case(name: str) -> tuple[Attend, list[torch.Tensor], dict[str, Any]]:
    made, inputs, masks, others = CASES[name]
    tensors = _tensors()
    arguments: dict[str, Any] = {key: tensors[mask] for key, mask in masks.items()}
    named = {name: tensors[name] for name in "qkv"}  # one object for one input
    return Attend(**made).eval(), [named[name] for name in inputs], {**arguments, **others}


def _exact(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    same = {id(arg): in_float64(arg) for arg in args}  # what was one object stays one
    with torch.no_grad():
        out: torch.Tensor = in_float64(model)(
            *(same[id(arg)] for arg in args), **in_float64(kwargs)
        )
    return out


@pytest.mark.parametrize("weights", [False, True], ids=["sdpa", "weights asked for, unused"])
@pytest.mark.parametrize("name", CASES)
def test_multi_head_attention_is_lowered(name: str, weights: bool) -> None:
    model, args, kwargs = _case(name)
    kwargs["need_weights"] = weights
    outcome = run(model, *args, **kwargs)
    (site,) = outcome.sites
    assert site.lowered, site.reason
    assert site.name == "attention"
    assert site.spelling == ("softmax" if weights else "sdpa")
    FileCheck().check_not(MHA).check("scaled_dot_product_attention").check_not(MHA).run(
        outcome.graph
    )
    assert_as_accurate(outcome.result, outcome.eager, _exact(model, args, kwargs))


def test_padding_and_causality_are_understood() -> None:
    model, args, kwargs = _case("padding")
    assert run(model, *args, need_weights=False, **kwargs).sites[0].mask == "key padding"
    model, args, kwargs = _case("causal")
    assert run(model, *args, need_weights=False, **kwargs).sites[0].mask == "causal"


def test_empty_rows_stay_what_the_call_makes_of_them() -> None:
    model, args, kwargs = _case("empty rows")
    zeros = run(model, *args, need_weights=False, **kwargs)
    assert not zeros.result.isnan().any()
    nans = run(model, *args, need_weights=True, **kwargs)
    assert nans.eager[1].isnan().all()
    assert torch.equal(nans.result.isnan(), nans.eager.isnan())


@pytest.mark.parametrize("name", ["self", "both masks", "both rows", "empty rows"])
@pytest.mark.parametrize("grad", [False, True])
def test_dynamic_shapes_keep_the_site(name: str, grad: bool) -> None:
    model, args, kwargs = _case(name)
    kwargs["need_weights"] = False
    outcome = run(model, *args, dynamic=True, grad=grad, **kwargs)
    assert [site.lowered for site in outcome.sites] == [True]
    assert_as_accurate(outcome.result, outcome.eager, _exact(model, args, kwargs))


@pytest.mark.parametrize("weights", [False, True])
def test_separate_projections_are_lowered(weights: bool) -> None:
    model, t = Attend(kdim=E, vdim=8), _tensors()
    args = [t["q"], t["k"], t["v"][..., :8].contiguous()]
    outcome = run(model, *args, need_weights=weights)
    assert [site.lowered for site in outcome.sites] == [True]
    assert_as_accurate(
        outcome.result, outcome.eager, _exact(model, args, {"need_weights": weights})
    )


@pytest.mark.parametrize("weights", [False, True])
def test_unbatched_inputs_are_lowered(weights: bool) -> None:
    model, t = Attend(add_bias_kv=True, add_zero_attn=True), _tensors()
    args = [t["q"][0], t["k"][0], t["k"][0]]
    for mask in (t["mask"], t["heads_mask"][:HEADS]):
        kwargs = {
            "attn_mask": mask,
            "key_padding_mask": t["padding"][0],
            "need_weights": weights,
        }
        outcome = run(model, *args, **kwargs)
        assert [site.lowered for site in outcome.sites] == [True]
        assert_as_accurate(outcome.result, outcome.eager, _exact(model, args, kwargs))


def test_function_called_with_boolean_masks_is_lowered() -> None:
    t = _tensors()
    w, b = torch.randn(3 * E, E) / 4, torch.randn(3 * E)
    o = torch.randn(E, E) / 4

    def function(q: torch.Tensor, k: torch.Tensor, w: Any, b: Any, o: Any, padding: Any) -> Any:
        return F.multi_head_attention_forward(
            q, k, k, E, HEADS, w, b, None, None, False, 0.0, o, None,
            key_padding_mask=padding, attn_mask=t["mask"], need_weights=False,
        )[0].view(-1, E)  # fmt: skip

    args = [t["q"].transpose(0, 1), t["k"].transpose(0, 1), w, b, o, t["padding"]]
    outcome = run(function, *args)
    assert [site.lowered for site in outcome.sites] == [True]
    exact = function(*(in_float64(arg) for arg in args))
    assert_as_accurate(outcome.result, outcome.eager, exact)


@pytest.mark.parametrize(
    "name", ["self", "three inputs", "sequence first", "both masks", "both rows"]
)
@pytest.mark.parametrize("weights", [False, True])
def test_gradients_are_as_accurate_as_eager(name: str, weights: bool) -> None:
    model, args, kwargs = _case(name)
    kwargs["need_weights"] = weights
    model.train()
    # With weights it is written by hand, where a float mask that is given may fill whole rows: of
    # those SDPA's gradient is another.
    _assert_gradients(model, args, kwargs, lowered=not (weights and name == "both masks"))


def _assert_gradients(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], lowered: bool = True
) -> None:
    """Gradients of inputs and parameters, as rewritten and as eager, against float64."""
    same = {id(arg): arg.clone().requires_grad_() for arg in args}
    inputs = [same[id(arg)] for arg in args]
    outcome = run(model, *inputs, grad=True, **kwargs)
    assert outcome.sites
    assert all(site.lowered is lowered for site in outcome.sites), outcome.sites
    double = in_float64(model)
    same_double = {key: in_float64(arg.detach()).requires_grad_() for key, arg in same.items()}
    exact = double(*(same_double[id(arg)] for arg in args), **in_float64(kwargs))
    found = []
    for out, leaves in (
        (outcome.result, [*same.values(), *model.parameters()]),
        (outcome.eager, [*same.values(), *model.parameters()]),
        (exact, [*same_double.values(), *double.parameters()]),
    ):
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        found.append(torch.autograd.grad((out * weight).sum(), leaves))
    assert_as_accurate(outcome.result, outcome.eager, exact)
    for ours, eager, true in zip(*found, strict=True):
        assert_as_accurate(ours, eager, true)


# -- dropout ---------------------------------------------------------------------------------------

ROWS, P = 64, 0.3


def _revealing() -> tuple[Attend, torch.Tensor, torch.Tensor]:
    """A module, queries and values such that the output is the matrix of attention weights."""
    model = Attend()
    model.attention = nn.MultiheadAttention(ROWS, 1, dropout=P, bias=False, batch_first=True)
    with torch.no_grad():
        model.attention.in_proj_weight[2 * ROWS :] = torch.eye(ROWS)
        model.attention.out_proj.weight.copy_(torch.eye(ROWS))
    q = torch.randn(4, ROWS, ROWS)
    return model, q, torch.eye(ROWS).expand(4, ROWS, ROWS).contiguous()


def _assert_dropped(weights: torch.Tensor, kept: torch.Tensor) -> None:
    """Zero with probability P, else what there was without dropout, divided by 1 - P."""
    zero = weights == 0
    count = zero.numel()
    assert abs(zero.float().mean().item() - P) < 5 * (P * (1 - P) / count) ** 0.5
    expected = torch.where(zero, 0.0, kept / (1 - P))
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("weights", [False, True])
def test_dropout_has_its_distribution_and_one_mask(weights: bool, dynamic: bool | None) -> None:
    model, q, eye = _revealing()
    model.train()
    v = eye.requires_grad_()
    outcome = run(model, q, q, v, need_weights=weights, grad=True, dynamic=dynamic)
    assert [site.lowered for site in outcome.sites] == [True], outcome.sites
    kept = copy.deepcopy(model).eval()(q, q, v)
    _assert_dropped(outcome.result, kept)
    weight = torch.randn_like(q)
    (gradient,) = torch.autograd.grad((outcome.result * weight).sum(), v)
    expected = outcome.result.transpose(1, 2) @ weight
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_no_dropout_in_evaluation() -> None:
    model, q, v = _revealing()
    outcome = run(model.eval(), q, q, v, need_weights=False)
    assert (outcome.result > 0).all()


# -- layers ----------------------------------------------------------------------------------------


def _encoder(norm_first: bool, activation: str, layers: int = 2) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        E, HEADS, 32, dropout=0.0, batch_first=True, norm_first=norm_first, activation=activation
    )
    # A nested tensor in eager would leave zeros in padded rows, and does not get compiled.
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return _spread(encoder)


def _encoder_masks() -> dict[str, dict[str, Any]]:
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    empty = padding.clone()
    empty[1] = True
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "empty rows": {"src_key_padding_mask": empty},
        "causal": {"mask": causal, "is_causal": True},
        "both": {
            "mask": causal,
            "src_key_padding_mask": torch.zeros(2, 6).masked_fill(padding, float("-inf")),
            "is_causal": True,
        },
        "boolean": {"mask": causal != 0, "is_causal": True},
        # The fused layer takes every number but zero for "not attended".
        "numbers": {"mask": torch.randn(6, 6).tril(-1), "is_causal": True},
    }


@pytest.mark.parametrize("masks", _encoder_masks())
@pytest.mark.parametrize(("norm_first", "activation"), [(False, "relu"), (True, "gelu")])
def test_fused_encoder_layer_is_lowered(norm_first: bool, activation: str, masks: str) -> None:
    model = _encoder(norm_first, activation, 1 + norm_first).eval()
    x, kwargs = torch.randn(2, 6, E), _encoder_masks()[masks]
    outcome = run(model, x, **kwargs)
    names = [f"layers.{i}.self_attn" for i in range(1 + norm_first)]
    assert [(site.name, site.lowered) for site in outcome.sites] == [(name, True) for name in names]
    FileCheck().check_not("_transformer_encoder_layer_fwd").check_count(
        "target=torch._C._nn.scaled_dot_product_attention", len(names), exactly=True
    ).run(outcome.graph)
    assert_as_accurate(outcome.result, outcome.eager, _exact(model, [x], kwargs))


@pytest.mark.parametrize("masks", ["none", "padding", "causal"])
@pytest.mark.parametrize("train", [False, True])
def test_encoder_with_gradients_is_lowered(train: bool, masks: str) -> None:
    model = _encoder(True, "gelu", 1).train(train)
    _assert_gradients(model, [torch.randn(2, 6, E)], _encoder_masks()[masks])


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="it captures no graph of this, ours or another's"
)
@pytest.mark.parametrize("masks", ["none", "padding"])
def test_fused_encoder_layer_with_dynamic_shapes(masks: str) -> None:
    model = _encoder(False, "relu", 1).eval()
    x, kwargs = torch.randn(2, 6, E), _encoder_masks()[masks]
    outcome = run(model, x, dynamic=True, **kwargs)
    assert [site.lowered for site in outcome.sites] == [True]
    assert_as_accurate(outcome.result, outcome.eager, _exact(model, [x], kwargs))


@pytest.mark.parametrize("grad", [False, True])
def test_decoder_is_lowered(grad: bool) -> None:
    layer = nn.TransformerDecoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    model = _spread(nn.TransformerDecoder(layer, 1)).train(grad)
    args = [torch.randn(2, 6, E), torch.randn(2, 7, E)]
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    kwargs = {"tgt_mask": causal, "tgt_is_causal": True}
    if grad:
        _assert_gradients(model, args, kwargs)
        return
    outcome = run(model, *args, **kwargs)
    assert [(site.name, site.mask) for site in outcome.sites if site.lowered] == [
        ("layers.0.self_attn", "causal"),
        ("layers.0.multihead_attn", "none"),
    ]
    assert_as_accurate(outcome.result, outcome.eager, _exact(model, args, kwargs))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_kept(inside: bool) -> None:
    model = _encoder(True, "relu", 1)
    x = torch.randn(2, 6, E)

    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z: torch.Tensor = model(x + y.float())
        return z

    if inside:
        outcome = run(function, x, grad=True)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outcome = run(model, x, grad=True)
    assert all(site.lowered for site in outcome.sites)
    assert len(outcome.sites) == 1 + inside
    double = in_float64(model)
    x = x.double()
    exact = double(x + double(x)) if inside else double(x)
    assert_as_accurate(outcome.result, outcome.eager, exact)


# -- left alone ------------------------------------------------------------------------------------


def test_used_weights_leave_the_call_alone(caplog: pytest.LogCaptureFixture) -> None:
    attention = nn.MultiheadAttention(E, HEADS, batch_first=True)
    x = torch.randn(2, 5, E)
    with caplog.at_level(logging.INFO, "adaattn_compiler"):
        outcome = run(lambda x: attention(x, x, x), x)
    assert [site.lowered for site in outcome.sites] == [False]
    assert "outside the attention" in str(outcome.sites[0].reason)
    assert outcome.analyses[0].graph_module is None
    assert "attention weights are used" in caplog.text
    assert all(map(torch.equal, outcome.result, outcome.eager))


def test_keys_given_from_outside_leave_the_call_alone(caplog: pytest.LogCaptureFixture) -> None:
    attention = nn.MultiheadAttention(E, HEADS)
    x = torch.randn(5, 2, E)
    static = torch.randn(2 * HEADS, 9, E // HEADS)

    def function(x: torch.Tensor) -> Any:
        return F.multi_head_attention_forward(
            x, x, x, E, HEADS, attention.in_proj_weight, attention.in_proj_bias, None, None, False,
            0.0, attention.out_proj.weight, attention.out_proj.bias, need_weights=False,
            static_k=static, static_v=static,
        )[0]  # fmt: skip

    with caplog.at_level(logging.INFO, "adaattn_compiler"):
        outcome = run(function, x)
    assert "static_k" in caplog.text
    assert outcome.analyses[0].graph_module is None
    assert torch.equal(outcome.result, outcome.eager)


def _captured(function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph_module)
        return graph_module.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend, **kwargs)(*args)
    return graphs[0]


def test_graph_without_composites_is_returned_itself() -> None:
    graph_module = _captured(lambda x: x.relu() + 1, torch.randn(3))
    assert expand(graph_module) is graph_module


def test_original_is_not_edited_and_nothing_is_guarded() -> None:
    model, args, kwargs = _case("both rows")
    calls = lambda *args: model(*args, need_weights=False, **kwargs)  # noqa: E731
    graph_module = _captured(calls, *args, dynamic=True)
    before = str(graph_module.graph)
    values = [node.meta.get("example_value") for node in graph_module.graph.nodes]
    shape_env = next(v.fake_mode.shape_env for v in values if hasattr(v, "fake_mode"))
    guards, replaced = len(shape_env.guards), dict(shape_env.replacements)
    expanded = expand(graph_module)
    assert str(graph_module.graph) == before
    assert MHA in before
    assert MHA not in str(expanded.graph)
    assert len(shape_env.guards) == guards
    assert shape_env.replacements == replaced


def test_new_nodes_have_metadata() -> None:
    model, args, _ = _case("both rows")
    graph_module = _captured(model, *args)
    names = {node.name for node in graph_module.graph.nodes}
    expanded = expand(graph_module)
    new = [node for node in expanded.graph.nodes if node.name not in names]
    assert len(new) > 10
    for node in new:
        assert {"example_value", "nn_module_stack", "stack_trace"} <= set(node.meta), node


# -- bodies of higher-order ops --------------------------------------------------------------------


class Manual(nn.Module):
    """Causal attention by hand, its mask a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.register_buffer("keep", torch.ones(8, 8, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, rows, _ = x.shape
        q, k, v = self.qkv(x).view(batch, rows, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * 0.5
        scores = scores.masked_fill(~self.keep[:rows, :rows], float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, rows, E)
        out: torch.Tensor = self.out(mixed)
        return out


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Manual(), Attend(), Manual()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + checkpoint(self.first, x, use_reentrant=False)
        x = x + checkpoint(lambda x: self.second(x, x, x), x, use_reentrant=False)
        out: torch.Tensor = x + self.third(x)
        return out


@pytest.mark.parametrize("dynamic", [None, True])
def test_checkpointed_sites_are_lowered(dynamic: bool | None) -> None:
    model, x = Checkpointed(), torch.randn(2, 6, E)
    outcome = run(model, x, grad=True, dynamic=dynamic)
    assert [(site.name, site.lowered, site.mask) for site in outcome.sites] == [
        ("first", True, "causal"),
        ("second.attention", True, "none"),
        ("third", True, "causal"),
    ]
    assert len(outcome.analyses[0].assumes) == 2  # both buffers, as inputs of the outer graph
    assert_as_accurate(outcome.result, outcome.eager, _exact(model, [x], {}))


def _partitioned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rewritten, then split into a forward and a backward graph that computes bodies again."""

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        before = [str(m.graph) for m in graph_module.modules() if isinstance(m, fx.GraphModule)]
        analysis = rewrite(graph_module, inputs, Options())
        after = [str(m.graph) for m in graph_module.modules() if isinstance(m, fx.GraphModule)]
        assert before == after
        assert analysis.graph_module is not None
        compiled: Callable[..., Any] = aot_eager_decomp_partition(analysis.graph_module, inputs)
        return compiled

    torch.compiler.reset()
    return torch.compile(function, backend=backend)


def test_checkpointed_gradients_are_as_accurate_as_eager() -> None:
    model, x = Checkpointed(), torch.randn(2, 6, E)
    double = in_float64(model)
    found = []
    for run_model, leaf in (
        (_partitioned(model), x.clone().requires_grad_()),
        (model, x.clone().requires_grad_()),
        (double, x.double().requires_grad_()),
    ):
        parameters = (double if run_model is double else model).parameters()
        found.append(torch.autograd.grad(run_model(leaf).square().sum(), [leaf, *parameters]))
    for ours, eager, exact in zip(*found, strict=True):
        assert_as_accurate(ours, eager, exact)


class CheckpointedDropout(nn.Module):
    def forward(self, q: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> Any:
        def body(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q * scale, q, v, dropout_p=P)

        return checkpoint(body, q, v, use_reentrant=False)


@pytest.mark.parametrize("backend", ["partition", "adaattn"])
def test_recomputation_drops_the_same(backend: str) -> None:
    model = CheckpointedDropout()
    q = torch.randn(2, 2, ROWS, 8)
    v = torch.eye(ROWS).expand(2, 2, ROWS, ROWS).contiguous().requires_grad_()
    scale = torch.ones(8, requires_grad=True)
    compiled = (
        _partitioned(model) if backend == "partition" else torch.compile(model, backend="adaattn")
    )
    out = compiled(q, v, scale)
    _assert_dropped(out, F.scaled_dot_product_attention(q, q, v))
    weight = torch.randn_like(out)
    gradient, _ = torch.autograd.grad((out * weight).sum(), [v, scale])
    torch.testing.assert_close(gradient, out.transpose(-2, -1) @ weight, rtol=1e-4, atol=1e-4)


def test_body_knows_the_state_around_its_call() -> None:
    """Gradients are off where compiling starts; on, under autocast, where the body is called."""
    model = Checkpointed()

    def function(x: torch.Tensor) -> Any:
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    x = torch.randn(2, 6, E)
    outcome = run(function, x, grad=False)
    assert [site.lowered for site in outcome.sites] == [True] * 3
    sites = [result.site for result in outcome.analyses[0].results]  # type: ignore[union-attr]
    assert all(site.requires_grad for site in sites)
    assert_as_accurate(outcome.result, outcome.eager, _exact(model, [x], {}))


def test_two_bodies_of_one_module_are_two_sites() -> None:
    attend = Attend()

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = attend

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            body = lambda x: self.attend(x, x, x)  # noqa: E731
            x = x + checkpoint(body, x, use_reentrant=False)
            out: torch.Tensor = x + checkpoint(body, x, use_reentrant=False)
            return out

    outcome = run(Twice(), torch.randn(2, 6, E), grad=True)
    names = [(site.name, site.ordinal) for site in outcome.sites]
    assert names == [("attend.attention", 0), ("attend.attention", 1)]


def test_branches_are_lowered() -> None:
    def attend(q: torch.Tensor, factor: float) -> torch.Tensor:
        return (q @ q.transpose(-2, -1) * factor).softmax(-1) @ q

    def function(which: torch.Tensor, q: torch.Tensor) -> Any:
        return torch.cond(which, lambda q: attend(q, 1.0), lambda q: attend(q, 0.5), (q,))

    q = torch.randn(2, HEADS, 6, 8)
    for which in (True, False):
        outcome = run(function, torch.tensor(which), q)
        assert [site.lowered for site in outcome.sites] == [True, True]
        exact = function(torch.tensor(which), q.double())
        assert_as_accurate(outcome.result, outcome.eager, exact)


def test_graph_that_only_has_bodies_refers_to_new_ones() -> None:
    model = CheckpointedDropout()
    q = torch.randn(2, 2, 6, 8)
    graph_module = _captured(model, q, q, torch.ones(8))
    analysis = rewrite(graph_module, [q, q, torch.ones(8)], Options())
    assert analysis.graph_module is not None
    assert analysis.graph_module is not graph_module
    assert analysis.graph_module.wrap_body_0 is not graph_module.wrap_body_0
    assert str(analysis.graph_module.graph) == str(graph_module.graph)


def test_body_without_attention_leaves_the_graph_as_it_is() -> None:
    def function(x: torch.Tensor) -> Any:
        return checkpoint(lambda x: x.sin().cos(), x, use_reentrant=False)

    outcome = run(function, torch.randn(3), grad=True)
    assert outcome.sites == ()
    assert outcome.analyses[0].graph_module is None
