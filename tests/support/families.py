"""Tiny random models of transformers families, with what is expected of their attentions.

A family is a function of the attention implementation ("eager" or "sdpa") that makes a model in
eval mode, inputs for it, and the masks of its sites in words, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from check import in_float64

BATCH, LENGTH, VOCABULARY, WINDOW = 2, 32, 64, 8
PADDING = 12  # positions of padding in the first sequence

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}

CAUSAL, NONE, KEY_PADDING = "causal", "none", "key padding"
SLIDING = f"causal & window({WINDOW})"
PADDED_CAUSAL = "causal & key padding"


@dataclass(frozen=True)
class Family:
    """One model to test.

    masks: of each site, in order. padded: which positions are padding ("left", "right"), where any.
    implementations: the attention implementations that the family has. needs: by implementation,
    the kernel without which its attentions cannot be computed.
    """

    name: str
    make: Callable[[str], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    masks: tuple[str, ...]
    padded: str | None = None
    implementations: tuple[str, ...] = ("eager", "sdpa")
    needs: Mapping[str, str] | None = None

    def model(self, implementation: str) -> torch.nn.Module:
        """The same random weights on each call, in eval mode."""
        torch.manual_seed(0)
        return self.make(implementation).eval()

    def kernel_needed(self, implementation: str) -> str | None:
        """The kernel that must exist for this family's attentions to be lowered."""
        return (self.needs or {}).get(implementation)


def output(model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The logits of a model, or its last hidden state where it has none."""
    result = model(**inputs)
    tensor: torch.Tensor = result.logits if "logits" in result else result.last_hidden_state
    return tensor


def exact_output(model: torch.nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The same in float64."""
    model = in_float64(model)
    if hasattr(model.config, "num_local_experts"):
        model.config._experts_implementation = "eager"  # the others have no float64
    with torch.no_grad():
        return output(model, in_float64(inputs))


def tokens(length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    """Random token ids, the same on each call for a length."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def attended(padded: str | None, length: int = LENGTH, batch: int = BATCH) -> torch.Tensor:
    """1 where a token is, 0 where padding is (in the first sequence, on the side that is named)."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded == "left":
        mask[0, :PADDING] = 0
    elif padded == "right":
        mask[0, -PADDING:] = 0
    return mask


def _text(padded: str | None = None, cache: bool = True) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        given: dict[str, Any] = {"input_ids": tokens()}
        if cache:
            given["use_cache"] = False
        if padded is not None:
            given["attention_mask"] = attended(padded)
        return given

    return inputs


def _seq2seq() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(24), "use_cache": False}


def _image() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator)}


def _speech() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(BATCH, 8, 64, generator=generator),
        "decoder_input_ids": tokens(24),
        "use_cache": False,
    }


def gpt2(implementation: str) -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        attn_implementation=implementation,
    )
    return transformers.GPT2LMHeadModel(config)


def bert(implementation: str) -> torch.nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(**_DECODER, attn_implementation=implementation)
    )


def llama(implementation: str, layers: int = 2) -> torch.nn.Module:
    settings = {**_GROUPED, "num_hidden_layers": layers}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**settings, attn_implementation=implementation)
    )


def mistral(implementation: str) -> torch.nn.Module:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(
            **_GROUPED, sliding_window=WINDOW, attn_implementation=implementation
        )
    )


def gemma2(implementation: str) -> torch.nn.Module:
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **_GROUPED, head_dim=16, sliding_window=WINDOW, attn_implementation=implementation
        )
    )


def t5(implementation: str) -> torch.nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            attn_implementation=implementation,
        )
    )


def vit(implementation: str) -> torch.nn.Module:
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
            attn_implementation=implementation,
        )
    )


def whisper(implementation: str) -> torch.nn.Module:
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_mel_bins=8,
            max_source_positions=32,
            max_target_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            attn_implementation=implementation,
        )
    )


def bloom(implementation: str) -> torch.nn.Module:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            n_layer=2,
            n_head=4,
            attn_implementation=implementation,
        )
    )


def gpt_oss(implementation: str) -> torch.nn.Module:
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **_GROUPED,
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=WINDOW,
            attn_implementation=implementation,
        )
    )


_SEQ2SEQ_MASKS = (NONE, NONE, CAUSAL, NONE, CAUSAL, NONE)

FAMILIES: tuple[Family, ...] = (
    Family("gpt2", gpt2, _text(), (CAUSAL, CAUSAL)),
    Family("bert", bert, _text(cache=False), (NONE, NONE)),
    Family("bert", bert, _text("right", cache=False), (KEY_PADDING, KEY_PADDING), padded="right"),
    Family("bert", bert, _text("left", cache=False), (KEY_PADDING, KEY_PADDING), padded="left"),
    Family("llama", llama, _text(), (CAUSAL, CAUSAL)),
    Family("llama", llama, _text("left"), (PADDED_CAUSAL, PADDED_CAUSAL), padded="left"),
    Family("mistral", mistral, _text(), (SLIDING, SLIDING)),
    Family("gemma2", gemma2, _text(), (SLIDING, CAUSAL), needs={"eager": "flex"}),
    Family(
        "t5",
        t5,
        _seq2seq,
        _SEQ2SEQ_MASKS,
    ),
    Family("vit", vit, _image, (NONE, NONE)),
    Family(
        "whisper",
        whisper,
        _speech,
        _SEQ2SEQ_MASKS,
    ),
    Family("bloom", bloom, _text(), (CAUSAL, CAUSAL), implementations=("eager",)),
    Family(
        "bloom",
        bloom,
        _text("right"),
        (PADDED_CAUSAL, PADDED_CAUSAL),
        padded="right",
        implementations=("eager",),
    ),
    Family(
        "bloom",
        bloom,
        _text("left"),
        (PADDED_CAUSAL, PADDED_CAUSAL),
        padded="left",
        implementations=("eager",),
    ),
    Family(
        "gpt_oss",
        gpt_oss,
        _text(),
        (SLIDING, CAUSAL),
        implementations=("eager",),
        needs={"eager": "flex"},
    ),
)
