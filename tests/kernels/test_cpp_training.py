"""The generated kernel's backward pass, against autograd of the oracle in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import sympy
import torch
import torch.nn.functional as F
from check import assert_as_accurate
from torch.utils.checkpoint import checkpoint

from adaattn_compiler.kernels.cpu import runner as module
from adaattn_compiler.kernels.cpu.dropout import dropped_by_hash
from adaattn_compiler.kernels.cpu.kernel import CppKernel
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.derivatives import derivative
from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.kernels.problem import Problem, Shape, Sizes
from adaattn_compiler.kernels.reference import attention_by_rows, reference_attention
from adaattn_compiler.spec import (
    AttentionSpec,
    EmptyRow,
    Load,
    M,
    OperandSpec,
    S,
    Where,
    b,
    h,
    k,
    q,
)

CAUSAL = sympy.Ge(q - k, 0)
WINDOW = sympy.And(CAUSAL, sympy.Ge(k - q + 39, 0))
VECTOR, TABLE = OperandSpec("float", 1), OperandSpec("float", 2)

SPECS: dict[str, tuple[AttentionSpec, tuple[tuple[int, ...], ...]]] = {
    "window, grouped": (AttentionSpec(0.3, mask=WINDOW, group=2), ()),
    "padding": (
        AttentionSpec(
            0.3,
            mask=sympy.Ne(Load(0, b, k), 0),
            empty_row=EmptyRow.ZERO,
            operands=(OperandSpec("bool", 2),),
        ),
        ((2, 90),),
    ),
    "softcap": (AttentionSpec(0.1, 5 * sympy.tanh(S / 5), CAUSAL), ()),
    "slopes": (AttentionSpec(0.3, S + (k - q) * Load(0, h), CAUSAL, operands=(VECTOR,)), ((4,),)),
    "distances": (
        AttentionSpec(0.3, S + Load(0, h, k - q + M - 1), CAUSAL, group=2, operands=(TABLE,)),
        ((4, 179),),
    ),
    "dense bias": (
        AttentionSpec(0.3, S + Load(0, 0, h, q, k), operands=(OperandSpec("float", 4),)),
        ((1, 4, 90, 90),),
    ),
    "transposed bias": (
        AttentionSpec(
            0.3,
            S + Load(0, h, q, k) + Load(0, h, k, q),
            CAUSAL,
            operands=(OperandSpec("float", 3),),
        ),
        ((4, 90, 90),),
    ),
    "bias that a choice reads": (
        AttentionSpec(
            0.3,
            S + Where(sympy.Ge(k - 2, 0), Load(0, h, k - 2), Load(1, h)),
            operands=(TABLE, VECTOR),
        ),
        ((4, 88), (4,)),
    ),
    "factor of the product": (
        AttentionSpec(0.3, S * Load(0, h) + Load(0, h), operands=(VECTOR,)),
        ((4,),),
    ),
    "sink": (AttentionSpec(0.3, mask=WINDOW, sink=Load(0, h), operands=(VECTOR,)), ((4,),)),
}


# Those that are run in half precision, too.
HALF = ("window, grouped", "slopes", "sink")


def problem_of(
    spec: AttentionSpec,
    shapes: Sequence[tuple[int, ...]] = (),
    dtype: torch.dtype = torch.float32,
    rows: int = 90,
) -> Problem:
    shape = Shape(2, 4, 4 // spec.group, rows, rows, 16, 24, (2, rows, rows))
    return Problem(spec, shape, dtype, "cpu", True, tuple(shapes))


def inputs_of(problem: Problem, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = problem.shape
    batch, rows, columns = shape.hints

    def random(heads: int, length: int, dim: int) -> torch.Tensor:
        data = torch.randn(batch, length, heads, dim, generator=generator)
        return data.transpose(1, 2).to(problem.dtype)

    tensors = [
        random(shape.heads, rows, shape.head_dim),
        random(shape.kv_heads, columns, shape.head_dim),
        random(shape.kv_heads, columns, shape.value_dim),
    ]
    operands = [
        torch.randn(size, generator=generator) / 8
        if kind.kind == "float"
        else torch.rand(size, generator=generator) > 0.3
        for kind, size in zip(problem.spec.operands, problem.operand_shapes, strict=True)
    ]
    return tensors, operands


def gradients(problem: Problem, dtype: torch.dtype, ours: bool) -> list[torch.Tensor]:
    """The result and the gradients of q, k, v and of the float operands."""
    tensors, operands = inputs_of(problem)
    qkv = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    extra = [o.to(wide).requires_grad_() if o.is_floating_point() else o for o in operands]
    batch, rows, columns = problem.shape.hints
    if ours:
        sizes = Sizes(batch, problem.shape.heads, rows, columns)
        out = CppKernel().build(problem)(*qkv, extra, sizes)
    else:
        out = reference_attention(*qkv, extra, (), problem.spec)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    inputs = [*qkv, *(operand for operand in extra if operand.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.fixture(scope="module", autouse=True)
def _building() -> None:
    """Libraries are built in threads, in the order of the tests."""
    for spec in SPECS.values():
        CppKernel().prepare(problem_of(*spec))
    for dtype in (torch.bfloat16, torch.float16):
        for name in HALF:
            CppKernel().prepare(problem_of(*SPECS[name], dtype=dtype))


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_as_accurate_as_eager(name: str) -> None:
    problem = problem_of(*SPECS[name])
    found = zip(
        gradients(problem, torch.float32, True),
        gradients(problem, torch.float32, False),
        gradients(problem, torch.float64, False),
        strict=True,
    )
    for ours, eager, exact in found:
        assert_as_accurate(ours, eager, exact)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(name: str, dtype: torch.dtype) -> None:
    problem = problem_of(*SPECS[name], dtype=dtype)
    found = zip(
        gradients(problem, dtype, True),
        gradients(problem, dtype, False),
        gradients(problem, torch.float64, False),
        strict=True,
    )
    for ours, eager, exact in found:
        assert_as_accurate(ours, eager, exact)


@pytest.mark.parametrize("rows", [1, 3, 63, 64, 65, 200])
def test_gradients_at_any_length(rows: int) -> None:
    """Where a row has one key its score has no gradient: eager's cancels to 0, to the last bit, and
    ours to the rounding of what cancels, which is as large as V's gradient times K."""
    problem = problem_of(*SPECS["window, grouped"], rows=rows)
    ours, eager, exact = (
        gradients(problem, dtype, is_ours)
        for dtype, is_ours in (
            (torch.float32, True),
            (torch.float32, False),
            (torch.float64, False),
        )
    )
    cancels = 4 * torch.finfo(torch.float32).eps * exact[3].abs().max() if rows < 4 else 0.0
    for x, y, truth in zip(ours, eager, exact, strict=True):
        assert_as_accurate(x, y + cancels, truth)


def test_gradients_are_the_same_each_time_and_for_any_number_of_threads_nearly() -> None:
    problem = problem_of(*SPECS["distances"])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = gradients(problem, torch.float32, True)
        again = gradients(problem, torch.float32, True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        torch.set_num_threads(7)  # more than key heads: keys are shared out
        other = gradients(problem, torch.float32, True)
    finally:
        torch.set_num_threads(threads)
    exact = gradients(problem, torch.float64, False)
    for x, y, truth in zip(other, first, exact, strict=True):
        assert_as_accurate(x, y, truth)


def test_large_biases_share_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(*SPECS["dense bias"])
    copied = gradients(problem, torch.float32, True)
    monkeypatch.setattr(module, "_COPIED_ELEMENTS", 0)
    shared = gradients(problem, torch.float32, True)
    exact = gradients(problem, torch.float64, False)
    for x, y, truth in zip(shared, copied, exact, strict=True):
        assert_as_accurate(x, y, truth)


def test_nan_flows_as_in_eager() -> None:
    spec = SPECS["window, grouped"][0]
    problem = problem_of(spec)
    tensors, _ = inputs_of(problem)
    tensors[2][0, 1, 70, 3] = float("nan")
    found = []
    for ours in (True, False):
        qkv = [tensor.clone().requires_grad_() for tensor in tensors]
        sizes = Sizes(2, 4, 90, 90)
        out = (
            CppKernel().build(problem)(*qkv, [], sizes)
            if ours
            else reference_attention(*qkv, [], (), spec)
        )
        found.append([out, *torch.autograd.grad(out.sum(), qkv)])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x.isnan(), y.isnan())


def test_rows_without_a_key_have_no_gradient() -> None:
    spec = AttentionSpec(0.3, mask=sympy.Ge(q - k - 10, 0), empty_row=EmptyRow.ZERO)
    problem = problem_of(spec)
    out, grad_q, _, _ = gradients(problem, torch.float32, True)
    assert not out[:, :, :10].any()
    assert not grad_q[:, :, :10].any()
    assert grad_q[:, :, 10:].any()


def test_gradient_of_rows_filled_with_a_number_is_refused() -> None:
    spec = AttentionSpec(0.3, mask=CAUSAL, empty_row=EmptyRow.UNIFORM)
    reason = CppKernel().refusal(problem_of(spec))
    assert reason is not None
    assert "row without a key" in reason


def test_score_without_a_known_derivative_is_refused_in_training_only() -> None:
    spec = AttentionSpec(0.3, sympy.Max(S, 0))
    training = problem_of(spec)
    assert "no derivative of Max" in (CppKernel().refusal(training) or "")
    assert CppKernel().refusal(dataclasses.replace(training, requires_grad=False)) is None
    with pytest.raises(NoCode, match="no derivative of floor"):
        derivative(sympy.floor(S) * S, S)


# -- dropout ---------------------------------------------------------------------------------------


def dropped_weights(seed: int, p: float = 0.25, rows: int = 96) -> tuple[torch.Tensor, Problem]:
    """P after dropout, by attention over the identity."""
    spec = AttentionSpec(0.3, mask=CAUSAL, dropout_p=p)
    shape = Shape(1, 2, 2, rows, rows, 16, rows, (1, rows, rows))
    problem = Problem(spec, shape, torch.float32, "cpu", True)
    tensors, _ = inputs_of(problem)
    eye = torch.eye(rows).expand(1, 2, rows, rows)
    runner = cpp_runner(plan_of(problem))
    return runner(tensors[0], tensors[1], eye, [], (), seed=seed), problem


def test_dropout_leaves_out_its_share_and_scales_the_rest() -> None:
    weights, problem = dropped_weights(seed=3)
    tensors, _ = inputs_of(problem)
    spec = dataclasses.replace(problem.spec, dropout_p=0.0)
    eye = torch.eye(96).expand(1, 2, 96, 96)
    whole = reference_attention(tensors[0], tensors[1], eye, [], (), spec)
    kept = weights != 0
    below = torch.ones(96, 96).tril().bool()
    share = 1 - kept[..., below].float().mean()
    deviation = (0.25 * 0.75 / kept[..., below].numel()) ** 0.5
    assert abs(share - 0.25) < 5 * deviation
    assert torch.allclose(weights[kept], (whole / 0.75)[kept], rtol=1e-5)
    assert not torch.equal(weights[:, 0] != 0, weights[:, 1] != 0)
    assert torch.equal(weights, dropped_weights(seed=3)[0])
    assert not torch.equal(weights, dropped_weights(seed=4)[0])


def test_gradients_see_what_dropout_left() -> None:
    weights, problem = dropped_weights(seed=5)
    keep = (weights != 0).double() / 0.75
    tensors, _ = inputs_of(problem)
    plan = plan_of(problem)
    seed = torch.tensor([5])
    qkv = [tensor.requires_grad_() for tensor in tensors]
    out, _ = torch.ops.adaattn.attention_training(*qkv, [], [], seed, plan)
    ours = torch.autograd.grad(out.square().sum(), qkv)

    def written_out(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        x, y, z = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
        scores = (x @ y.mT * 0.3).masked_fill(~torch.ones(96, 96).tril().bool(), float("-inf"))
        result = (scores.softmax(-1) * keep.to(dtype)) @ z
        return torch.autograd.grad(result.square().sum(), (x, y, z))

    for found, eager, exact in zip(
        ours, written_out(torch.float32), written_out(torch.float64), strict=True
    ):
        assert_as_accurate(found, eager, exact)


def test_what_is_written_out_leaves_out_the_same_weights() -> None:
    weights, problem = dropped_weights(seed=(1 << 62) - 3, rows=300)
    tensors, _ = inputs_of(problem)
    dropped = dropped_by_hash(0.25, (1 << 62) - 3, 300)
    eye = torch.eye(300).expand(1, 2, 300, 300)
    found = attention_by_rows(*tensors[:2], eye, [], (), problem.spec, dropped=dropped)
    assert torch.equal(found != 0, weights != 0)
    assert torch.allclose(found, weights, rtol=1e-5, atol=1e-7)


def test_dropout_is_the_same_beside_a_gradient_that_is_not_finite() -> None:
    spec = AttentionSpec(0.3, mask=CAUSAL, dropout_p=0.5)
    problem = problem_of(spec)
    tensors, _ = inputs_of(problem)
    seed, plan = torch.tensor([5]), plan_of(problem)
    found = []
    for value in (1.0, float("inf")):
        qkv = [tensor.detach().requires_grad_() for tensor in tensors]
        out, _ = torch.ops.adaattn.attention_training(*qkv, [], [], seed, plan)
        grad = torch.ones_like(out)
        grad[0, 0, 5, 3] = value
        found.append(torch.autograd.grad(out, qkv, grad))
    for finite, other in zip(*found, strict=True):
        assert torch.allclose(finite[1], other[1], rtol=1e-4, atol=1e-6)


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("amplitude", [1.0, 100.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_few_rows_with_large_scores(
    rows: int, amplitude: float, dtype: torch.dtype
) -> None:
    """Weights are recomputed in the backward pass: their products must be the forward's."""
    spec = AttentionSpec(0.3)
    plan = plan_of(problem_of(spec, dtype=dtype))
    tensors, _ = inputs_of(problem_of(spec, dtype=dtype))
    queries = tensors[0][:, :, :rows] * amplitude

    def found(dtype: torch.dtype, ours: bool) -> torch.Tensor:
        qkv = [t.detach().to(dtype).requires_grad_() for t in (queries, *tensors[1:])]
        if ours:
            out, _ = torch.ops.adaattn.attention_training(*qkv, [], [], None, plan)
        else:
            out = reference_attention(*qkv, [], (), spec)
        return torch.autograd.grad(out.sum(), qkv[2])[0]

    exact = found(torch.float64, ours=False)
    assert_as_accurate(found(dtype, ours=True), found(dtype, ours=False), exact)


@pytest.mark.parametrize("rows", [4, 16])
def test_gradients_beside_an_overflow_under_the_mask_are_finite(rows: int) -> None:
    spec = AttentionSpec(0.3, mask=CAUSAL)
    problem = problem_of(spec)
    tensors, _ = inputs_of(problem)
    tensors[0][:, :, 0] = tensors[1][:, :, 7] = 1e20
    qkv = [
        tensors[0][:, :, :rows].clone().requires_grad_(),
        *(t.requires_grad_() for t in tensors[1:]),
    ]
    out, _ = torch.ops.adaattn.attention_training(*qkv, [], [], None, plan_of(problem))
    exact = reference_attention(*qkv, [], (), spec)
    assert torch.allclose(out, exact, rtol=1e-4, atol=1e-5)
    for ours, eager in zip(
        torch.autograd.grad(out.sum(), qkv), torch.autograd.grad(exact.sum(), qkv), strict=True
    ):
        assert torch.equal(ours.isfinite(), eager.isfinite())


@pytest.mark.parametrize("place", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("name", ["window, grouped", "dense bias"])
def test_gradients_lie_as_promised_where_something_is_not_finite(place: str, name: str) -> None:
    """In any layout of the inputs, which autograd's own gradients would follow."""
    problem = problem_of(*SPECS[name])
    tensors, operands = inputs_of(problem)
    qkv = [tensor.contiguous() for tensor in tensors]
    biases = [bias.mT.contiguous().mT for bias in operands]
    plan = plan_of(problem)
    out, statistics = torch.ops.adaattn.attention_training(*qkv, biases, [], None, plan)
    grad = torch.ones_like(out)
    dict(zip(("q", "k", "v", "grad"), (*qkv, grad), strict=True))[place][0, 0, 3, 2] = float("nan")
    wanted = [True] * len(biases)
    given = (grad, *qkv, out, statistics, biases, [], None, wanted, plan)
    torch.library.opcheck(
        torch.ops.adaattn.attention_backward.default,
        given,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_gradient_that_overflows_reaches_the_parameters() -> None:
    """What a GradScaler looks for, and skips the step."""
    compiled = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        backend="adaattn",
        options=OPTIONS,
    )
    qkv = [torch.randn(2, 4, 64, 16).requires_grad_() for _ in range(3)]
    out = compiled(*qkv)
    weights = torch.ones_like(out)
    weights[0, 0, 0, 0] = float("inf")
    out.backward(weights)
    assert all(tensor.grad is not None and not tensor.grad[0, 0].isfinite().all() for tensor in qkv)
    assert all(tensor.grad is not None and tensor.grad[1].isfinite().all() for tensor in qkv)


def test_gradient_of_what_many_scores_read_keeps_its_digits() -> None:
    """One slope for each head is a sum over all queries and keys."""
    spec, _ = SPECS["slopes"]
    shape = Shape(1, 4, 4, 2048, 2048, 16, 16, (1, 2048, 2048))
    problem = Problem(spec, shape, torch.float32, "cpu", True, ((4,),))
    eager, exact, ours = (
        gradients(problem, dtype, mine)
        for dtype, mine in ((torch.float32, False), (torch.float64, False), (torch.float32, True))
    )
    assert_as_accurate(ours[-1], eager[-1], exact[-1])


# -- under torch.compile ---------------------------------------------------------------------------


class Windowed(torch.nn.Module):
    """A projection, attention in a window with a bias by distance, dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(32, 96)
        self.bias = torch.nn.Parameter(torch.randn(2, 96, 96) / 8)
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.project(x).view(batch, length, 3, 2, 16)
        queries, keys, values = (part.transpose(1, 2) for part in heads.unbind(2))
        place = torch.arange(length)
        distance = place[:, None] - place
        scores = queries @ keys.mT / 4 + self.bias[:, :length, :length]
        scores = scores.masked_fill((distance < 0) | (distance >= 20), float("-inf"))
        weights = torch.nn.functional.dropout(scores.softmax(-1), self.dropout, self.training)
        return (weights @ values).transpose(1, 2).flatten(2)


OPTIONS = {"kernels": "cpp", "measure": False}


def test_a_model_trains_as_in_eager() -> None:
    x = torch.randn(2, 96, 32)
    found = []
    for dtype, compiled in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        model = Windowed().to(dtype)
        call = torch.compile(model, backend="adaattn", options=OPTIONS) if compiled else model
        call(x.to(dtype)).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, eager, exact in zip(*found, strict=True):
        assert_as_accurate(ours, eager, exact)


def test_dropout_follows_the_seed_under_compile() -> None:
    model = torch.compile(Windowed(0.5), backend="adaattn", options=OPTIONS)
    x = torch.randn(2, 96, 32)

    def result(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        out: torch.Tensor = model(x)
        return out.detach()

    assert torch.equal(result(1), result(1))
    assert not torch.equal(result(1), result(2))


def test_checkpointing_recomputes_the_same_dropout() -> None:
    """The gradient of a sum by V's share is the result itself, whatever dropout left out."""
    model = Windowed(0.5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]

    x = torch.randn(2, 96, 32)
    compiled = torch.compile(loss, backend="adaattn", options=OPTIONS)
    torch.manual_seed(7)
    out = compiled(x)
    towards = torch.randn_like(out)
    grad = torch.autograd.grad((out * towards).sum(), model.project.bias)[0][64:]
    # out is linear in V's bias: the gradient times the bias' change is the change of the result.
    with torch.no_grad():
        model.project.bias[64:] += 1.0
    torch.manual_seed(7)
    moved = compiled(x)
    change = ((moved - out) * towards).sum()
    assert torch.allclose(grad.sum(), change, rtol=1e-3)


def test_the_ops_keep_to_their_contract() -> None:
    problem = problem_of(*SPECS["slopes"])
    tensors, operands = inputs_of(problem)
    plan = plan_of(problem)
    given = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(
        torch.ops.adaattn.attention_training.default,
        (*given, [operand.requires_grad_() for operand in operands], [], None, plan),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    with torch.no_grad():
        out, statistics = torch.ops.adaattn.attention_training(*given, operands, [], None, plan)
    torch.library.opcheck(
        torch.ops.adaattn.attention_backward.default,
        (out, *(t.detach() for t in given), out, statistics, operands, [], None, [True], plan),
        test_utils=("test_schema", "test_faketensor"),
    )
