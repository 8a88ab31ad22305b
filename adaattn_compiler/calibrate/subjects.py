"""What `adaattn-calibrate` is told to calibrate: a model with sample inputs.

From the user's own code, or a folder of transformers and a text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaattn_compiler.calibrate.outcome import Batch
from adaattn_compiler.kernels.measure import first_line
from adaattn_compiler.subjects import Fault, arguments_of, dtype_of, in_mode, made_by, named

# Files of which a folder with a tokenizer has at least one.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_BYTES = 256
# A text is read in stretches; no tokenizer has this many characters to a token on average.
_CHARACTERS = 32


@dataclass(frozen=True)
class Samples:
    """A model and the batches that it is calibrated on. said: what the user should know of them."""

    model: Callable[..., Any]
    batches: list[Batch]
    said: str = ""


# -- the user's own code ---------------------------------------------------------------------------


def from_code(name: str, data: str | None, samples: int | None) -> Samples:
    """A model made by "module:function", and its batches: those of `data`, or the inputs that the
    function gave beside the model. samples: how many at most."""
    made = made_by(name)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not callable(model):
        raise Fault(
            f"{name}() returned {type(model).__name__}: a model is wanted, or (model, inputs)"
        )
    if data is None and inputs is None:
        raise Fault(f"{name} gives no inputs: add --data module:batches")
    batches = [inputs] if data is None else _batches(data, samples)
    return Samples(in_mode(model, False), [arguments_of(b) for b in batches])


def _batches(name: str, samples: int | None) -> list[Any]:
    found = named(name)
    try:
        found = found() if callable(found) else found
        batches = list(itertools.islice(_several(found, name), samples))
    except Fault:
        raise
    except Exception as error:
        raise Fault(f"{name} gave no batches: {first_line(error)}", is_usage=False) from error
    if not batches:
        raise Fault(f"{name} is empty: at least one batch is wanted")
    return batches


def _several(found: Any, name: str) -> Iterable[Any]:
    if isinstance(found, (Mapping, torch.Tensor, str)) or not isinstance(found, Iterable):
        raise Fault(
            f"{name} is {type(found).__name__}: a list of batches is wanted, or a function that "
            "returns or yields them"
        )
    return found


# -- transformers ----------------------------------------------------------------------------------


def from_folder(folder: str, text: str, length: int, samples: int, dtype: str | None) -> Samples:
    """The causal language model of a folder with its weights, on pieces of a text."""
    if not (Path(folder) / "config.json").is_file():
        raise Fault(f"--hf {folder!r}: no config.json there")
    if not Path(text).is_file():
        raise Fault(f"--text {text!r}: no such file")
    wanted = "auto" if dtype is None else dtype_of(dtype)
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokens, said = _tokens(transformers, folder, config, Path(text), length, samples)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, local_files_only=True
        )
    except Fault:
        raise
    except Exception as error:
        raise Fault(
            f"--hf {folder!r} could not be loaded: {first_line(error)}", is_usage=False
        ) from error
    model.eval()
    # A cache would only be filled and thrown away.
    batches: list[Batch] = [((), {"input_ids": each, "use_cache": False}) for each in tokens]
    return Samples(model, batches, said)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise Fault(
            "--hf needs transformers: pip install 'adaattn-compiler[hf]'", is_usage=False
        ) from None
    transformers.utils.logging.disable_progress_bar()  # calibration has its own
    return transformers


def _tokens(
    transformers: Any, folder: str, config: Any, text: Path, length: int, samples: int
) -> tuple[list[torch.Tensor], str]:
    """Pieces [1, length], and where they come from."""
    settings = config.get_text_config()
    longest = getattr(settings, "max_position_embeddings", None) or length
    if length > longest:
        raise Fault(f"--length {length}: {folder} takes at most {longest} tokens")
    if any((Path(folder) / name).is_file() for name in _TOKENIZERS):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        characters = text.read_text(encoding="utf-8", errors="replace")

        def tokens_of(piece: Sequence[Any]) -> list[int]:
            return list(tokenizer(piece[: _CHARACTERS * length])["input_ids"])

        pieces = [tokens_of(characters[a:b])[:length] for a, b in _places(len(characters), samples)]
        said = ""
    elif getattr(settings, "vocab_size", None) == _BYTES:
        content = text.read_bytes()
        pieces = [list(content[a:b][:length]) for a, b in _places(len(content), samples)]
        said = f"{folder} has no tokenizer and {_BYTES} tokens: the bytes of {text} are the tokens"
    else:
        raise Fault(
            f"--hf {folder!r}: no tokenizer there, and the vocabulary has "
            f"{getattr(settings, 'vocab_size', 'no')} tokens, not the {_BYTES} bytes; put the "
            "tokenizer's files into the folder, or use MODULE:FUNCTION with --data"
        )
    _check_lengths(pieces, text, length, samples)
    return [torch.tensor([piece]) for piece in pieces], said


def _places(size: int, samples: int) -> list[tuple[int, int]]:
    """Equal stretches of a text."""
    return [(i * size // samples, (i + 1) * size // samples) for i in range(samples)]


def _check_lengths(pieces: Sequence[Sequence[int]], text: Path, length: int, samples: int) -> None:
    shortest = min(len(piece) for piece in pieces)
    if shortest < length:
        raise Fault(
            f"--text {str(text)!r} is too short for --samples {samples} of --length {length}: one "
            f"of {samples} equal stretches has {shortest} tokens; give a longer text, or lower one "
            "of them"
        )
