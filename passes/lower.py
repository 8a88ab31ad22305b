"""Replace matched sites in a copy of the Dynamo graph by the kernels chosen for them.

The copy gets each site's operands (as they stand in the graph, or as views of what stands there),
the call of its kernel, and its result in the layout that the model wants; what only the replaced
attention needed is erased. The original graph is never edited.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from adaattn_compiler.kernels.choose import Choice
from adaattn_compiler.kernels.evaluate import evaluate_dense, positions, rank_of
from adaattn_compiler.kernels.problem import Problem, Shape, Sizes, number_type
from adaattn_compiler.options import Options
from adaattn_compiler.passes.canonical_view import CanonicalView, meta_of, origin_of
from adaattn_compiler.passes.choices import Choices, Chooser, SiteKey, keys_of
from adaattn_compiler.passes.dynamo_graph import copied, with_graph
from adaattn_compiler.passes.emit import Emitter
from adaattn_compiler.passes.index_map import Axis, Index, NotAffine, divide
from adaattn_compiler.passes.numbers import with_numbers_as_operands
from adaattn_compiler.passes.protect import protect
from adaattn_compiler.passes.relevance import writes
from adaattn_compiler.passes.resample import distance_vector
from adaattn_compiler.passes.site import Refused, SideTensor, Site
from adaattn_compiler.passes.symbols import size_hint
from adaattn_compiler.passes.views import Access, input_access
from adaattn_compiler.runtime.state import StateForm, new_state
from adaattn_compiler.spec import Refusal

aten = torch.ops.aten

log = logging.getLogger("adaattn_compiler")


@dataclass(frozen=True)
class Lowered:
    """A site and the kernel that computes it now; seconds spent on choosing and building it."""

    site: Site
    problem: Problem
    choice: Choice
    key: SiteKey
    seconds: float = 0.0


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph (None where nothing was rewritten) and what became of each site.

    states: of which sites, in order, it takes the state (runtime/state.py) after its other inputs.
    """

    graph_module: fx.GraphModule | None
    results: tuple[Lowered | Refused, ...] = field(default=())
    states: tuple[Lowered, ...] = ()


def lower(
    graph_module: fx.GraphModule,
    view: CanonicalView,
    found: Sequence[Site | Refused],
    options: Options,
    chooser: Chooser | None = None,
) -> Rewritten:
    """See the module's docstring; chooser: asked first for each site."""
    graph, copies = copied(graph_module.graph)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    memo: dict[Any, Any] = {}
    # As they stand in the graph: what one writes (a mask), the next may read.
    place = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    found = [with_numbers_as_operands(i) if isinstance(i, Site) else i for i in found]
    sites = [item for item in found if isinstance(item, Site)]
    sites.sort(key=lambda site: place[origin_of(site.output)])
    choices = Choices(options, chooser)
    choices.prepare(_problems_of(sites))
    numbered = zip(found, keys_of(found), strict=True)
    keys = {item.output: key for item, key in numbered if isinstance(item, Site)}
    lowered = {
        site.output: _lowered(view, tracer, copies, site, keys[site.output], memo, choices)
        for site in sites
    }
    results = [item if isinstance(item, Refused) else lowered[item.output] for item in found]
    done = [result for result in lowered.values() if isinstance(result, Lowered)]
    live = view.live_without({result.site.output: result.site.inputs for result in done})
    protected = protect(view, tracer, copies, live)
    if not done and not protected:
        return Rewritten(None, tuple(results))
    _erase_dead(view, graph, copies, live)
    graph.lint()
    states = tuple(result for result in done if result.choice.stateful)
    return Rewritten(with_graph(graph_module, graph), tuple(results), states)


def _problems_of(sites: Sequence[Site]) -> list[Problem]:
    """Of those sites that have one; what is wrong with another is said in its turn."""
    problems: list[Problem] = []
    for site in sites:
        with contextlib.suppress(Exception):
            problems.append(problem_of(site))
    return problems


def _lowered(
    view: CanonicalView,
    tracer: fx.proxy.GraphAppendingTracer,
    copies: dict[fx.Node, fx.Node],
    site: Site,
    key: SiteKey,
    memo: dict[Any, Any],
    choices: Choices,
) -> Lowered | Refused:
    before = origin_of(site.output)
    emitter = Emitter(view, tracer, copies, before)
    shared = dict(memo)
    try:
        if writes(before):
            raise Refusal("a product whose call also writes it somewhere", site.output)
        problem = problem_of(site)
        begin = time.perf_counter()
        choice = choices.of(key, site, problem)
        seconds = time.perf_counter() - begin
        result = _call(emitter, site, problem, choice, memo)
        _replace(emitter, site, result)
    except Exception as error:
        expected = isinstance(error, (Refusal, NotAffine))
        if not expected:
            log.warning("a site could not be written, it is left to Inductor: %r", error)
            log.debug("where it failed", exc_info=True)
        for node in reversed([*emitter.inputs, *emitter.new]):
            tracer.graph.erase_node(node)
        memo.clear()
        memo.update(shared)
        reason = str(error) if expected else f"writing it failed: {error!r}"
        return site.refused(reason)
    _annotate(emitter, before)
    return Lowered(site, problem, choice, key, seconds)


def problem_of(site: Site) -> Problem:
    """What the kernels are offered for a site."""
    sizes = site.sizes
    fixed = [name for name in ("H", "G", "D", "E") if not sizes[name].is_Integer]
    if fixed:
        raise Refusal(f"{fixed[0]} is not a fixed number", site.anchor)
    known = {name: int(s) if s.is_Integer else None for name, s in sizes.items()}
    q_node, v_node = site.q.access.node, site.v.access.node
    shape = Shape(
        known["B"],
        int(sizes["H"]),
        int(sizes["G"]),
        known["M"],
        known["N"],
        int(sizes["D"]),
        int(sizes["E"]),
        hints=tuple(size_hint(sizes[name], site.fake) for name in ("B", "M", "N")),
    )
    dtypes = [meta_of(node).dtype for node in (q_node, site.k.access.node, v_node)]
    dtype = torch.promote_types(torch.promote_types(dtypes[0], dtypes[1]), dtypes[2])
    result = meta_of(site.output).dtype
    if site.spelling == "sdpa" and result.itemsize < dtype.itemsize:
        dtype = result  # autocast rounds what SDPA is given
    return Problem(
        site.spec,
        shape,
        dtype,
        meta_of(q_node).device.type,
        site.requires_grad,
        (*(_side_shape(side, site) for side in site.sides), *(() for _ in site.numbers)),
        tuple(size_hint(value, site.fake) for value in site.params),
        (
            *(meta_of(side.node).dtype for side in site.sides),
            *(number_type(dtype) for _ in site.numbers),
        ),
    )


def _side_shape(side: SideTensor, site: Site) -> tuple[int, ...]:
    if side.distance is None:
        return tuple(size_hint(size, site.fake) for size in meta_of(side.node).shape)
    sizes = site.sizes
    sizes_of = (sizes["H"], sizes["M"] + sizes["N"] - 1)
    return tuple(size_hint(size, site.fake) for size in sizes_of)


def _call(
    emitter: Emitter, site: Site, problem: Problem, choice: Choice, memo: dict[Any, Any]
) -> fx.Node:
    sizes = Sizes(
        emitter.size(site.sizes["B"]),
        problem.shape.heads,
        emitter.size(site.sizes["M"]),
        emitter.size(site.sizes["N"]),
        tuple(emitter.size(param) for param in site.params),
        memo,
        _state_input(emitter, problem, choice.form) if choice.stateful else None,
    )
    operands = [
        emitter.tensor(side.node)
        if side.distance is None
        else _distance_operand(emitter, site, side.distance, sizes)
        for side in site.sides
    ]
    device = meta_of(site.q.access.node).device
    operands = [  # numbers on the CPU may stand beside tensors elsewhere
        operand
        if operand.meta["example_value"].device == device
        else emitter.method("to", operand, device)
        for operand in operands
    ]
    dtype = number_type(problem.dtype)
    operands += [emitter.number(number, device, dtype, memo) for number in site.numbers]
    tensors = []
    for operand in (site.q, site.k, site.v):
        node = emitter.operand(operand)
        if meta_of(operand.access.node).dtype != problem.dtype:
            node = emitter.method("to", node, problem.dtype)
        tensors.append(node)
    if site.scale_factor is not None:
        tensors[0] = emitter.call(_scaled, tensors[0], site, operands, sizes)
    attention = choice.kernel.build(problem)
    result: fx.Node = emitter.call(attention, *tensors, operands, sizes)
    dtype = meta_of(site.output).dtype
    if dtype != problem.dtype:
        result = emitter.method("to", result, dtype)
    return result


def _state_input(emitter: Emitter, problem: Problem, form: StateForm) -> fx.Node:
    """The state of a site's heads (runtime/state.py), after all inputs that the graph has."""
    count = len(emitter.graph.find_nodes(op="placeholder"))
    with emitter.fake_mode:
        state = new_state(problem.shape.heads, problem.device, form)
    return emitter.input(f"adaattn_state_{count}", state)


def _distance_operand(emitter: Emitter, site: Site, access: Access, sizes: Sizes) -> fx.Node:
    key = ("distance", access, str(sizes.scores))
    if key not in sizes.memo:
        sizes.memo[key] = distance_vector(emitter, access, site.axes, sizes)
    node: fx.Node = sizes.memo[key]
    return node


def _scaled(q_BHMD: Any, site: Site, operands: Sequence[Any], sizes: Sizes) -> Any:
    """Q times a factor that is a tensor."""
    factor = site.scale_factor
    values = positions((factor,), q_BHMD, sizes.scores)
    tensor = evaluate_dense(factor, values, operands, sizes.params)
    rank = rank_of(factor)
    if rank:  # its last axis is that of the keys, which it does not depend on
        tensor = tensor[(None,) * (4 - rank) + (...,)]
    return q_BHMD * tensor


# -- the result ------------------------------------------------------------------------------------


def _replace(emitter: Emitter, site: Site, result: fx.Node) -> None:
    """Let the site's result stand where the product (or SDPA call) did."""
    dynamo = origin_of(site.output)
    value = emitter.view.values.get(dynamo)
    if not isinstance(value, fx.Node):
        raise Refusal("a product inside a call with several results", site.output)
    index = _index_from(value, site.output)
    if index is None:
        emitter.written[site.output] = _in_layout_of(emitter, site, site.output, None, result)
        new = emitter.tensor_of_origin(value)
    else:
        new = _in_layout_of(emitter, site, value, index, result)
    copy = emitter.copies[dynamo]
    if _viewed_as_dense(copy):
        new = emitter.method("contiguous", new)
    copy.replace_all_uses_with(new)
    emitter.copies[dynamo] = new
    emitter.graph.erase_node(copy)


def _viewed_as_dense(node: fx.Node, depth: int = 4) -> bool:
    """Whether a `view` follows, which needs the strides that the product had."""
    views = ("view", aten.view.default)
    steps = ("transpose", "permute", "squeeze", "unsqueeze", "detach", "mT", "unflatten")
    return any(
        user.target in views
        or (depth > 0 and user.target in steps and _viewed_as_dense(user, depth - 1))
        for user in node.users
    )


def _index_from(value: fx.Node, output: fx.Node) -> tuple[list[Axis], tuple[Index, ...]] | None:
    """The output's index of each element of a view of it; None where it is no view."""
    axes = [Axis(f"y{d}", size) for d, size in enumerate(meta_of(value).shape)]
    access: Access | None = Access(value, tuple(Index.of_axis(axis) for axis in axes))
    while access is not None and access.node is not output:
        if meta_of(access.node).dtype != meta_of(output).dtype:
            return None
        try:
            access = input_access(access)
        except NotAffine:
            return None
    return None if access is None else (axes, access.index)


def _in_layout_of(
    emitter: Emitter,
    site: Site,
    value: fx.Node,
    found: tuple[list[Axis], tuple[Index, ...]] | None,
    result: fx.Node,
) -> fx.Node:
    """The result [B,H,M,E] as the tensor `value`, whose elements are the product's at an index."""
    if found is None:
        axes = [Axis(f"y{d}", size) for d, size in enumerate(meta_of(value).shape)]
        index = tuple(Index.of_axis(axis) for axis in axes)
    else:
        axes, index = found
    loops: dict[Axis, Index] = {}
    for position, at in zip(site.result, index, strict=True):
        _assign(loops, position, at)
    canonical = [
        _canonical(site, axis, loops) for axis in (site.axes.batch, site.axes.head, site.axes.query)
    ]
    columns = loops.get(site.value_axis, Index())
    sizes = [site.sizes[name] for name in ("B", "H", "M", "E")]
    return emitter.arranged(
        result, [*canonical, columns], sizes, [Index.of_axis(axis) for axis in axes]
    )


def _assign(loops: dict[Axis, Index], position: Index, at: Index) -> None:
    """The product's index along one dimension is `at`: what that says of the axes in it."""
    left = at
    for digit, coef in sorted(position.terms, key=lambda t: sympy.default_sort_key(t[1])):
        _, rest = (
            divide(left, sympy.expand(coef * digit.extent))
            if len(position.terms) > 1
            else (
                None,
                left,
            )
        )
        value, _ = divide(rest, coef)
        loops[digit.axis] = loops.get(digit.axis, Index()).plus(value.scaled(digit.div))


def _canonical(site: Site, axis: Axis, loops: dict[Axis, Index]) -> Index:
    """A canonical axis in terms of the axes of the value that is written."""
    total = Index()
    for atom, canonical in site.axes.atoms:
        for digit, coef in canonical.terms:
            if digit.axis != axis or atom.axis not in loops:
                continue
            quotient, _ = divide(loops[atom.axis], atom.div)
            ends_axis = sympy.expand(atom.div * atom.extent - atom.axis.size) == 0
            value = quotient if ends_axis else divide(quotient, atom.extent)[1]
            total = total.plus(value.scaled(sympy.expand(digit.div * coef)))
    return total


# -- what is left ----------------------------------------------------------------------------------


def _erase_dead(
    view: CanonicalView,
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    live: frozenset[fx.Node],
) -> None:
    """Erase the calls that only the replaced attentions needed."""
    needed = {origin_of(node) for node in live if "origin" in node.meta}
    recorded = {origin_of(node) for node in view.graph.nodes if "origin" in node.meta}
    for dynamo in reversed(list(copies)):
        copy = copies[dynamo]
        if (
            dynamo in recorded
            and dynamo not in needed
            and dynamo.op in ("call_function", "call_method")
            and copy.graph is graph
            and not copy.users
            and not copy.is_impure(impure_random=False)
            and copy in graph.nodes
        ):
            graph.erase_node(copy)


def _annotate(emitter: Emitter, origin: fx.Node) -> None:
    """Give new nodes the metadata that passes after us look for."""
    for node in emitter.new:
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in origin.meta:
                node.meta.setdefault(key, origin.meta[key])
