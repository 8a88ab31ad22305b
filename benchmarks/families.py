"""Models of transformers at the sizes of the cases: one layer, heads of 64, random weights.

`without_mlp` leaves the attention with its norms and projections; `attention_alone` takes the
projections away as well: q, k and v become slices of what the layer is given. `without_attention`
and `without_scores` are the models that memory is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH, HEADS, HEAD_DIM, KV_HEADS, VOCABULARY = 512, 8, 64, 2, 64

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
}
_GROUPED: dict[str, Any] = {
    **_DECODER,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 16384,
}


def mistral(window: int = 512) -> nn.Module:
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(**_GROUPED, sliding_window=window, attn_implementation="sdpa")
    return MistralModel(config).eval()


def bloom() -> nn.Module:
    """ALiBi, in the only implementation that the family has."""
    from transformers import BloomConfig, BloomModel

    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=1,
        n_head=HEADS,
        attn_implementation="eager",
    )
    return BloomModel(config).eval()


def t5() -> nn.Module:
    """One block of T5's encoder, eager: a learned bias by distance."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=HEAD_DIM,
        d_ff=4 * WIDTH,
        num_layers=1,
        num_heads=HEADS,
        attn_implementation="eager",
    )
    return T5EncoderModel(config).eval()


def bert(implementation: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(**_DECODER, attn_implementation=implementation)
    return BertModel(config, add_pooling_layer=False).eval()


def vit(implementation: str) -> nn.Module:
    """224 x 224 in patches of 16: 196 of them and the class token."""
    from transformers import ViTConfig, ViTModel

    settings = {name: value for name, value in _DECODER.items() if name != "vocab_size"}
    config = ViTConfig(**settings, attn_implementation=implementation)
    return ViTModel(config, add_pooling_layer=False).eval()


def gpt_oss(window: int = 128) -> nn.Module:
    """Two layers, one with a window and one without, each head with a sink; without the experts."""
    from transformers import GptOssConfig, GptOssModel

    settings = {**_GROUPED, "num_hidden_layers": 2, "intermediate_size": 64}
    config = GptOssConfig(
        **settings,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=window,
        attn_implementation="eager",
    )
    model = GptOssModel(config).eval()
    for layer in model.layers:
        layer.mlp = _Pair()
        nn.init.normal_(layer.self_attn.sinks)
    return model


def gemma2(window: int = 256) -> nn.Module:
    """Two layers, one with a window and one without, scores capped by tanh."""
    from transformers import Gemma2Config, Gemma2Model

    settings = {**_GROUPED, "num_hidden_layers": 2}
    config = Gemma2Config(**settings, sliding_window=window, attn_implementation="eager")
    return Gemma2Model(config).eval()


def llama(layers: int, width: int = WIDTH) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        **_GROUPED,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_DIM,
    }
    return LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa")).eval()


def gpt2(layers: int, width: int = WIDTH) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=width,
        n_layer=layers,
        n_head=width // HEAD_DIM,
        n_positions=2048,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config).eval()


# -- models reduced to their attention -------------------------------------------------------------


class _First(nn.Module):
    """The first argument, whatever else is given."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x


class _Zeros(nn.Module):
    """In place of an MLP that a residual is added to."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class _Pair(nn.Module):
    """In place of an attention or experts that return something beside their result."""

    def __init__(self, results: int = 2) -> None:
        super().__init__()
        self.rest = (None,) * (results - 1)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        return (x, *self.rest)


class _Repeat(nn.Module):
    """In place of a fused projection: its input, three times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, x, x), -1)


class _Slice(nn.Module):
    """In place of a projection: some of its input's features, as a view."""

    def __init__(self, begin: int, width: int) -> None:
        super().__init__()
        self.begin, self.width = begin, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.begin : self.begin + self.width]


def without_mlp(model: nn.Module) -> nn.Module:
    """The model, changed: its layers are attention, norms and residuals."""
    kind = type(model).__name__
    if kind == "BloomModel":
        model.h[0].mlp = _First()
    elif kind == "T5EncoderModel":
        model.encoder.block[0].layer[-1] = nn.Identity()
    else:
        for layer in model.layers:
            layer.mlp = _Zeros()
    return model


def without_attention(model: nn.Module) -> nn.Module:
    """The model, changed: its attention, with the projections, is the identity."""
    if type(model).__name__ == "BloomModel":
        model.h[0].self_attention = _Pair(2)
    else:
        model.encoder.block[0].layer[0].SelfAttention = _Pair(3)
    return model


class _SumOf(nn.Module):
    """In place of an attention: its projections, and q + k + v in place of what lies between."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        of = self.attention
        if hasattr(of, "query_key_value"):
            q, k, v = of._reshape(of.query_key_value(x))
            return of.dense((q + k + v).transpose(1, 2).flatten(2)), None
        return of.o(of.q(x) + of.k(x) + of.v(x)), None, None


def without_scores(model: nn.Module) -> nn.Module:
    """The model, changed: its attention is its projections, and their sum."""
    if type(model).__name__ == "BloomModel":
        model.h[0].self_attention = _SumOf(model.h[0].self_attention)
    else:
        layer = model.encoder.block[0].layer[0]
        layer.SelfAttention = _SumOf(layer.SelfAttention)
    return model


def attention_alone(model: nn.Module) -> nn.Module:
    """The model, changed: mask or bias, positions and attention, and little else."""
    model = without_mlp(model)
    if type(model).__name__ == "BloomModel":
        model.h[0].self_attention.query_key_value = _Repeat()
        model.h[0].self_attention.dense = nn.Identity()
        return model
    if type(model).__name__ == "T5EncoderModel":
        attention = model.encoder.block[0].layer[0].SelfAttention
        attention.q = attention.k = attention.v = attention.o = nn.Identity()
        return model
    for layer in model.layers:
        attention = layer.self_attn
        attention.q_proj = nn.Identity()
        attention.k_proj = _Slice(0, KV_HEADS * HEAD_DIM)
        attention.v_proj = _Slice(KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        attention.o_proj = nn.Identity()
    return model
