"""The cases: what is run, at what size, in what type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import families
from benchmarks.models import (
    Decode,
    Gpt,
    GroupedDecode,
    MaskedFillCausal,
    PlainSoftmax,
    SdpaCausal,
    Trained,
)
from benchmarks.workload import Workload

HEADS, HEAD_DIM = 8, 64


@dataclass(frozen=True)
class Case:
    """make(length) gives the workload in float32; what: one line for the reader."""

    name: str
    what: str
    length: int
    dtype: torch.dtype
    make: Callable[[int], Workload]
    smoke_length: int = 96

    def workload(self, smoke: bool) -> Workload:
        """The same random weights and inputs on each call."""
        torch.manual_seed(0)
        length = min(self.length, self.smoke_length) if smoke else self.length
        return self.make(length).to(self.dtype)


def cases() -> tuple[Case, ...]:
    """Every case, in the order of the report."""
    both = (torch.float32, torch.bfloat16)
    found: list[Case] = []

    def add(
        name: str,
        what: str,
        lengths: tuple[int, ...],
        make: Callable[[int], Workload],
        dtypes: tuple[torch.dtype, ...] = (torch.float32,),
        smoke_length: int = 96,
    ) -> None:
        for length in lengths:
            for dtype in dtypes:
                short = "fp32" if dtype == torch.float32 else "bf16"
                full = f"{name}_{length}_{short}"
                found.append(Case(full, what, length, dtype, make, smoke_length))

    add(
        "masked_fill",
        "causal by masked_fill, H8 D64 (GPT-2, nanoGPT)",
        (512, 1024, 2048, 4096),
        _masked_fill,
        both,
    )
    add("softmax", "manual softmax, no mask, H8 D64", (128, 512, 2048), _plain, both)
    lengths = (1024, 2048, 4096, 8192)
    add("sdpa_causal", "SDPA is_causal, H8 D64", lengths, _sdpa, both)
    add("sdpa_training", "the same, forward and backward", (2048,), _sdpa_training, both)
    add(
        "mistral_attention",
        "MistralModel, 1 layer, sdpa, window 512: mask, RoPE and attention alone, H8 G2 D64",
        (8192,),
        partial(_mistral, True),
        both,
    )
    add(
        "mistral_layer",
        "the same with its projections and MLP",
        (8192,),
        partial(_mistral, False),
        both,
    )
    add("bloom_attention", "BloomModel's attention alone", (2048,), _of(_bloom_attention), both)
    add("t5_attention", "T5's attention alone", (2048,), partial(_t5, True), both)
    add("bloom", "BloomModel, 1 layer, eager: ALiBi, H8 D64", (2048,), _of(families.bloom))
    add("t5", "T5EncoderModel, 1 block, eager: learned bias, H8 D64", (2048,), partial(_t5, False))
    add("bert_eager", "BertModel, 1 layer, B8, padded, H8 D64", (512,), partial(_bert, "eager"))
    add("bert_sdpa", "the same, sdpa", (512,), partial(_bert, "sdpa"))
    add("vit_eager", "ViTModel, 1 layer, B8, H8 D64", (197,), partial(_vit, "eager"))
    add("vit_sdpa", "the same, sdpa", (197,), partial(_vit, "sdpa"))
    add(
        "gpt_oss",
        "GptOssModel, 2 layers without experts, eager: sinks, window 128, H8 G2 D64",
        (1024,),
        _of(families.gpt_oss),
        both,
    )
    add(
        "gemma2",
        "Gemma2Model, 2 layers, eager: softcap, window 256, H8 G2 D64",
        (1024,),
        _of(families.gemma2),
        both,
    )
    add("decode", "one query over a cache, manual softmax, H8 D64", (4096,), _decode, both)
    add("decode_grouped", "the same by SDPA, H8 G2 D64", (8192,), _grouped_decode, both)
    add("gpt", "nanoGPT, 4 layers, width 512, forward", (1024, 2048), partial(_gpt, False), both)
    add("gpt_training", "the same, forward and backward", (1024,), partial(_gpt, True))
    return tuple(found)


def case_named(name: str) -> Case:
    """Raises KeyError for a name that is none."""
    return {case.name: case for case in cases()}[name]


def _qkv(length: int) -> torch.Tensor:
    return torch.randn(1, length, 3 * HEADS * HEAD_DIM)


def _masked_fill(length: int) -> Workload:
    return Workload(MaskedFillCausal(HEADS, length), (_qkv(length),))


def _plain(length: int) -> Workload:
    return Workload(PlainSoftmax(HEADS), (_qkv(length),))


def _sdpa(length: int) -> Workload:
    return Workload(SdpaCausal(HEADS), (_qkv(length),))


def _sdpa_training(length: int) -> Workload:
    return Workload(Trained(SdpaCausal(HEADS), _qkv(length)), training=True)


def _grouped_decode(length: int) -> Workload:
    k, v = (torch.randn(1, families.KV_HEADS, length, HEAD_DIM) for _ in range(2))
    return Workload(GroupedDecode(), (torch.randn(1, HEADS, 1, HEAD_DIM), k, v))


def _decode(length: int) -> Workload:
    q = torch.randn(1, HEADS, 1, HEAD_DIM)
    k, v = (torch.randn(1, HEADS, length, HEAD_DIM) for _ in range(2))
    return Workload(Decode(), (q, k, v))


def _gpt(training: bool, length: int) -> Workload:
    model = Gpt(4, HEADS * HEAD_DIM, HEADS, length)
    ids = torch.randint(256, (1, length))
    return Workload(model, (ids, ids.roll(-1)) if training else (ids,), training=training)


def _text(length: int, batch: int = 1) -> dict[str, Any]:
    return {"input_ids": torch.randint(families.VOCABULARY, (batch, length)), "use_cache": False}


def _of(make: Callable[[], torch.nn.Module]) -> Callable[[int], Workload]:
    return lambda length: Workload(make(), kwargs=_text(length))


def _mistral(alone: bool, length: int) -> Workload:
    model = families.mistral(window=min(512, length // 3))
    if alone:
        model = families.attention_alone(model)
    return Workload(model, kwargs=_text(length))


def _bloom_attention() -> torch.nn.Module:
    return families.attention_alone(families.bloom())


def _t5(alone: bool, length: int) -> Workload:
    model = families.attention_alone(families.t5()) if alone else families.t5()
    return Workload(model, kwargs={"input_ids": torch.randint(families.VOCABULARY, (1, length))})


def _bert(implementation: str, length: int) -> Workload:
    """Lengths from a third of N to N, padded on the right."""
    ids = torch.randint(families.VOCABULARY, (8, length))
    lengths = torch.linspace(length / 3, length, 8).long()
    attended = (torch.arange(length) < lengths[:, None]).long()
    kwargs = {"input_ids": ids, "attention_mask": attended}
    return Workload(families.bert(implementation), kwargs=kwargs)


def _vit(implementation: str, length: int) -> Workload:
    batch = 8 if length == 197 else 1
    return Workload(
        families.vit(implementation), kwargs={"pixel_values": torch.randn(batch, 3, 224, 224)}
    )
