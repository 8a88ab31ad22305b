"""The small trained model that approximations are judged by, and text that it was not trained on.

tests/data/bytes_lm: a byte-level Llama of 9.5 million parameters with its training script. The text
is every 20th file of the standard library of the Python that runs this; by halves, so that what a
policy is calibrated on and what it is judged by are different files.
"""

from __future__ import annotations

import pathlib
import sysconfig
from typing import Any

import torch

FOLDER = pathlib.Path(__file__).parents[1] / "data" / "bytes_lm"


def bytes_lm(dtype: torch.dtype = torch.float32) -> Any:
    """The model, in inference."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(FOLDER, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def held_out(half: int) -> torch.Tensor:
    """Bytes [n], int64, of the first (0) or the second (1) half of the files."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"site-packages", "test", "tests"}
    files = sorted(p for p in root.rglob("*.py") if not unwanted & set(p.parts))[::20]
    part = files[half::2]
    text = b"".join(path.read_bytes() + b"\0" for path in part)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def samples(half: int, count: int, length: int) -> list[torch.Tensor]:
    """`count` pieces [1, length] of one half, evenly spread."""
    text = held_out(half)
    starts = [i * (len(text) - length) // max(count - 1, 1) for i in range(count)]
    return [text[start : start + length][None] for start in starts]
