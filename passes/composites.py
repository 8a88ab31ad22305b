"""What the composite calls of torch.nn stand for, in calls of torch.nn.functional.

`F.multi_head_attention_forward` is what nn.MultiheadAttention arrives as;
`torch._transformer_encoder_layer_fwd` what nn.TransformerEncoderLayer becomes in evaluation without
gradients. What is written computes the same to rounding, a fully masked row's NaN or zero included;
dropout draws other numbers of the same distribution.

Refused: a call whose attention weights are used (computing them beside a kernel's output would cost
more than the call does), and what is not understood.

The functions work on proxies of expand.py's writer, whose nodes have an `example_value`.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from adaattn_compiler.spec import Refusal

Replace = Callable[[fx.Node], None]


# -- torch.nn.functional.multi_head_attention_forward ----------------------------------------------


def _by_signature(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of a Python function by name, with defaults."""
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _multi_head_attention(node: fx.Node, named: Mapping[str, Any]) -> Replace:
    outputs = _only_first_item_used(node)
    _check_understood(named)
    batched = _value(named["query"]).dim() == 3
    read_transposed = all(_is_read_transposed(output) for output in outputs)
    batch_first = not batched or (_is_transposed(named["query"]) and read_transposed)
    q, k, v = _projected(named, batched, batch_first)
    k, v = _with_extra_rows(named, k, v)
    mask = _merged_mask(named, batched)
    dropout_p = named["dropout_p"] if named["training"] else 0.0
    if named["need_weights"]:
        attended = _by_formula(q, k, v, mask, dropout_p)
    else:
        causal = mask is None and bool(named["is_causal"])
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal
        )
    rows = attended.transpose(1, 2) if batch_first else attended.permute(2, 0, 1, 3)
    out: Any = F.linear(rows.flatten(2), named["out_proj_weight"], named["out_proj_bias"])
    if not batched:
        out = out.squeeze(0)
    elif batch_first:
        out = out.transpose(0, 1)

    def replace(copy: fx.Node) -> None:
        for item in list(copy.users):
            if item in outputs:
                item.replace_all_uses_with(out.node)
            copy.graph.erase_node(item)
        copy.graph.erase_node(copy)

    return replace


def _only_first_item_used(node: fx.Node) -> list[fx.Node]:
    """The nodes that take the output; Refusal where the weights (or the pair) are used."""
    outputs = []
    for user in node.users:
        if user.target is not operator.getitem or (user.args[1] == 1 and user.users):
            raise Refusal("its attention weights are used")
        if user.args[1] == 0:
            outputs.append(user)
    return outputs


def _check_understood(named: Mapping[str, Any]) -> None:
    if named["static_k"] is not None or named["static_v"] is not None:
        raise Refusal("keys or values given from outside (static_k, static_v)")
    values = [_value(item) for item in named.values() if isinstance(item, fx.Proxy)]
    if any(isinstance(v, torch.Tensor) and v.layout is not torch.strided for v in values):
        raise Refusal("a tensor that is not strided (nested, or sparse)")


def _is_transposed(query: fx.Proxy) -> bool:
    """Whether [L,B,E] lies in memory as [B,L,E]."""
    value = _value(query)
    return not value.is_contiguous() and bool(value.transpose(0, 1).is_contiguous())


def _is_read_transposed(output: fx.Node) -> bool:
    """Whether the model reads [L,B,E] as [B,L,E] only."""
    return all(
        user.op == "call_method" and user.target == "transpose" and sorted(user.args[1:]) == [0, 1]  # type: ignore[type-var]
        for user in output.users
    )


def _projected(named: Mapping[str, Any], batched: bool, batch_first: bool) -> tuple[Any, Any, Any]:
    """Q, K, V as [B,H,L,D]."""
    proxies = [named["query"], named["key"], named["value"]]
    rows: dict[fx.Node, Any] = {}
    for proxy in proxies:
        if proxy.node not in rows:
            if not batched:
                rows[proxy.node] = proxy.unsqueeze(0)
            else:
                rows[proxy.node] = proxy.transpose(0, 1) if batch_first else proxy
    heads = named["num_heads"]

    def split(x: Any) -> Any:
        x = x.unflatten(-1, (heads, _value(x).shape[-1] // heads))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    if named["use_separate_proj_weight"]:
        weights = [named[f"{name}_proj_weight"] for name in "qkv"]
        biases = [None] * 3 if named["in_proj_bias"] is None else _chunks(named["in_proj_bias"], 0)
        parts = [
            F.linear(rows[proxy.node], weight, bias)
            for proxy, weight, bias in zip(proxies, weights, biases, strict=True)
        ]
    else:
        nodes = [proxy.node for proxy in proxies]
        parts = _packed_linear(
            [rows[n] for n in nodes], named["in_proj_weight"], named["in_proj_bias"]
        )
    q, k, v = (split(part) for part in parts)
    return q, k, v


def _packed_linear(inputs: list[Any], weight: Any, bias: Any) -> list[Any]:
    """Three projections of which weight and bias hold the parts; neighbors of one input as one."""
    width = _value(weight).shape[0] // len(inputs)
    parts: list[Any] = []
    while len(parts) < len(inputs):
        first = len(parts)
        last = first + 1
        while last < len(inputs) and inputs[last] is inputs[first]:
            last += 1
        if last - first == len(inputs):
            out = F.linear(inputs[first], weight, bias)
        else:
            own = slice(first * width, last * width)
            out = F.linear(inputs[first], weight[own], None if bias is None else bias[own])
        parts += [out] if last - first == 1 else _chunks(out, -1, last - first)
    return parts


def _chunks(x: Any, dim: int, number: int = 3) -> list[Any]:
    """Equal parts."""
    chunks = x.chunk(number, dim)
    return [chunks[i] for i in range(number)]


def _with_extra_rows(named: Mapping[str, Any], k: Any, v: Any) -> tuple[Any, Any]:
    """A learned row after the last key and value, and a row of zeros after that."""
    if named["bias_k"] is not None:
        k, v = (
            torch.cat([x, _bias_row(bias, x)], 2)
            for x, bias in ((k, named["bias_k"]), (v, named["bias_v"]))
        )
    if named["add_zero_attn"]:
        k, v = (torch.cat([x, _zero_row(x)], 2) for x in (k, v))
    return k, v


def _bias_row(bias: Any, like: Any) -> Any:
    """[1,1,E] as [B,H,1,D] (in the dtype that a cat of both has)."""
    _, heads, _, head_dim = _value(like).shape
    row = bias.view(1, heads, 1, head_dim)
    return row.expand(_size(like, 0), -1, -1, -1)


def _zero_row(like: Any) -> Any:
    _, heads, _, head_dim = _value(like).shape
    return like.new_zeros(1).expand(_size(like, 0), heads, 1, head_dim)


def _with_open_columns(mask: Any, number: int) -> Any:
    """A mask to be added, with further columns of zeros. (F.pad would fix symbolic sizes.)"""
    sizes = [_size(mask, dim) for dim in range(_value(mask).dim() - 1)]
    return torch.cat([mask, mask.new_zeros(1).expand(*sizes, number)], -1)


def _merged_mask(named: Mapping[str, Any], batched: bool) -> Any:
    """What is added to the scores, broadcast against [B,H,L,N]; None for nothing."""
    mask, padding = named["attn_mask"], named["key_padding_mask"]
    dtype = _value(named["query"]).dtype
    if named["is_causal"] and padding is None and not named["need_weights"]:
        mask = None  # as the call has it: the hint stands for the mask
    parts = []
    if mask is not None:
        mask = _additive(mask, dtype)
        if _value(mask).dim() == 3:
            mask = mask.unflatten(0, (-1, named["num_heads"]))
        parts.append(mask)
    if padding is not None:
        padding = _additive(padding, dtype)
        if not batched:
            padding = padding.unsqueeze(0)
        parts.append(padding.unsqueeze(1).unsqueeze(1))
    extra = (named["bias_k"] is not None) + bool(named["add_zero_attn"])
    if extra:
        parts = [_with_open_columns(part, extra) for part in parts]
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _additive(mask: Any, dtype: torch.dtype) -> Any:
    """A boolean mask (true: not attended) as numbers to add."""
    if _value(mask).dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _by_formula(q: Any, k: Any, v: Any, mask: Any, dropout_p: Any) -> Any:
    """With plain softmax: unlike in SDPA, a fully masked row is NaN."""
    scores = torch.matmul(q * math.sqrt(1.0 / _value(q).shape[-1]), k.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    weights = F.softmax(scores, dim=-1)
    if isinstance(dropout_p, fx.Proxy) or dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return torch.matmul(weights, v)


# -- torch._transformer_encoder_layer_fwd ----------------------------------------------------------


def _by_schema(node: fx.Node) -> dict[str, Any]:
    """The arguments of the call by the names of its ATen schema."""
    schema = torch.ops.aten._transformer_encoder_layer_fwd.default._schema
    named = {argument.name: argument.default_value for argument in schema.arguments}
    named.update(zip(named, node.args))  # noqa: B905
    named.update(node.kwargs)
    return named


def _encoder_layer(node: fx.Node, named: Mapping[str, Any]) -> Replace:
    src = named["src"]
    if _value(src).layout is not torch.strided or _value(src).dim() != 3:
        raise Refusal("an input that is not a strided tensor of three axes")
    shape = [named["embed_dim"]]

    def norm(x: Any, which: int) -> Any:
        weight, bias = named[f"norm_weight_{which}"], named[f"norm_bias_{which}"]
        return F.layer_norm(x, shape, weight, bias, named["eps"])

    first = bool(named["norm_first"])
    x = src + _self_attention(named, norm(src, 1) if first else src)
    x = x if first else norm(x, 1)
    x = x + _feed_forward(named, norm(x, 2) if first else x)
    x = x if first else norm(x, 2)

    def replace(copy: fx.Node) -> None:
        copy.replace_all_uses_with(x.node)
        copy.graph.erase_node(copy)

    return replace


def _self_attention(named: Mapping[str, Any], x: Any) -> Any:
    writer = x.tracer
    meta = dict(writer.meta)
    writer.meta["nn_module_stack"] = _inside_self_attention(meta.get("nn_module_stack"))
    heads = named["num_heads"]
    head_dim = named["embed_dim"] // heads
    packed = F.linear(x, named["qkv_weight"], named["qkv_bias"])
    q, k, v = (p.unflatten(-1, (heads, head_dim)).transpose(1, 2) for p in _chunks(packed, -1))
    mask = named["mask"]
    if mask is None:
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = torch.matmul(q, k.transpose(-2, -1)) * head_dim**-0.5
        scores = scores.masked_fill(_masked_out(named), float("-inf"))
        attended = torch.matmul(F.softmax(scores, dim=-1), v)
    rows = attended.transpose(1, 2).flatten(2)
    out = F.linear(rows, named["proj_weight"], named["proj_bias"])
    writer.meta = meta
    return out


def _masked_out(named: Mapping[str, Any]) -> Any:
    """Where keys are not attended: the call takes any number but zero for that."""
    mask = named["mask"]
    while mask.node.op == "call_method" and mask.node.target == "expand":
        mask = fx.Proxy(mask.node.args[0], mask.tracer)  # which broadcasts to the same
    if _value(mask).dtype != torch.bool:
        mask = mask.to(torch.bool)
    if named["mask_type"] == 1:  # of keys, [B,N]
        return mask.unsqueeze(1).unsqueeze(1)
    if named["mask_type"] not in (0, 2):  # [M,N], [B,H,M,N]
        raise Refusal(f"a mask of the unknown type {named['mask_type']}")
    return mask


def _inside_self_attention(stack: Any) -> dict[str, Any]:
    """The module stack as it is where the layer runs its parts, so that a site keeps its name."""
    entries = dict(stack or {})
    if entries:
        path = f"{list(entries.values())[-1][0]}.self_attn"
        entries[path] = (path, torch.nn.MultiheadAttention)
    return entries


def _feed_forward(named: Mapping[str, Any], x: Any) -> Any:
    x = F.linear(x, named["ffn_weight_1"], named["ffn_bias_1"])
    if named["use_gelu"]:
        on_cuda = _value(x).device.type == "cuda"  # where the call's epilogue approximates
        x = F.gelu(x, approximate="tanh" if on_cuda else "none")
    else:
        x = F.relu(x)
    return F.linear(x, named["ffn_weight_2"], named["ffn_bias_2"])


# -- what is known of a proxy ----------------------------------------------------------------------


def _value(proxy: fx.Proxy) -> Any:
    """What a proxy's node yields, on fake tensors."""
    return proxy.node.meta["example_value"]


def _size(proxy: Any, dim: int) -> Any:
    """A size as a number where it is one, else as a call."""
    size = _value(proxy).shape[dim]
    return size if isinstance(size, int) else proxy.size(dim)


# Target -> its arguments by name, and what writes it out and returns how to put that in its place.
COMPOSITES: dict[Any, tuple[Callable[[fx.Node], dict[str, Any]], Callable[..., Replace]]] = {
    F.multi_head_attention_forward: (_by_signature, _multi_head_attention),
    torch._transformer_encoder_layer_fwd: (_by_schema, _encoder_layer),
}
