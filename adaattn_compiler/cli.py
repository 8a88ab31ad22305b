"""`adaattn-explain`: what `explain` says, from the command line.

adaattn-explain my_package.models:build --shape 1x1024:int64
adaattn-explain --hf folder/with/config --length 4096 --target H200
adaattn-explain --attention causal --length 8192 --target sm_90 --source
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

import torch

from adaattn_compiler.explain import Explanation, explain
from adaattn_compiler.options import Options, parse_options
from adaattn_compiler.subjects import Fault, Subject, attention, from_code, from_config
from adaattn_compiler.target import target_named

_EXPLAINED, _FAILED, _MISUSED = 0, 1, 2

# What each way to name a model takes beside it, and sizes that are not given.
_TAKES = {
    "model": ("data", "shape"),
    "hf": ("batch", "length", "dtype"),
    "attention": ("batch", "length", "dtype", "heads", "kv_heads", "head_dim"),
}
_SIZES = {"batch": 1, "length": 1024, "heads": 8, "head_dim": 64}
_LARGEST = 1 << 30

_EPILOG = """\
examples:
  a model of your own, made by a function without arguments, which may return (model, inputs):
    adaattn-explain my_package.models:build --data my_package.data:batches
    adaattn-explain my_package.models:build --shape 1x1024:int64 --target A100
  a folder of transformers with a config.json; weights are random, nothing is downloaded:
    adaattn-explain --hf models/llama --batch 1 --length 4096 --target H200
  attention alone, to look at its code and its figures, of any length:
    adaattn-explain --attention causal --heads 32 --kv-heads 8 --length 8192 --head-dim 128 \\
        --dtype bfloat16 --target H200
    adaattn-explain --attention window=512 --target sm_90 --source

exit status: 0 explained, 1 the model could not be made or run, 2 an argument is wrong
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        _check(given)
        with _quiet():
            explanation = _explained(given, _subject(given))
    except Fault as fault:
        return _failed(given, str(fault), _MISUSED if fault.is_usage else _FAILED)
    except (
        ValueError
    ) as error:  # of an option or the target: these name the value and what is valid
        return _failed(given, str(error), _MISUSED)
    text = explanation.to_json() if given.json else str(explanation)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough; nothing is left for the exit to write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _EXPLAINED


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Triton says of its own settings, to which nothing here is a reply."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TRITON_", UserWarning)
        yield


def _failed(given: argparse.Namespace, message: str, status: int) -> int:
    if given.traceback:
        traceback.print_exc()
    print(f"adaattn-explain: error: {message}", file=sys.stderr)
    return status


# -- arguments -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adaattn-explain",
        description="What AdaAttn finds in a model, what it does with it, and what would run on a "
        "GPU that need not be there.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_subjects(parser)
    _add_inputs(parser)
    parser.add_argument(
        "--target", metavar="NAME", help="a GPU, by name or capability: H200, A100, sm_90"
    )
    parser.add_argument("--source", action="store_true", help="show the generated code")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--dynamic", action="store_true", help="with sizes that are not fixed")
    parser.add_argument("--train", action="store_true", help="with gradients, in training mode")
    parser.add_argument(
        "--run",
        action=argparse.BooleanOptionalAction,
        help="run what is captured (once, uncompiled); without, what follows a graph break is not "
        "seen; by default only models of your own run",
    )
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="as given to torch.compile",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _add_subjects(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODULE:FUNCTION", help="a function that returns the model"
    )
    parser.add_argument("--hf", metavar="DIR", help="a folder of transformers with a config.json")
    parser.add_argument(
        "--attention", metavar="MASK", help="attention alone: causal, window=N (and causal) or none"
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="MODULE:NAME",
        help="batches, or a function that returns them: of the first, a dictionary is given as "
        "keywords, a tuple as arguments",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        action="extend",
        default=[],
        metavar="1x1024[:DTYPE]",
        help="random arguments of that shape (float32, zeros and ones for integers)",
    )
    for name in ("batch", "length", "heads", "kv_heads", "head_dim"):
        flag, usual = "--" + name.replace("_", "-"), _SIZES.get(name, "as heads")
        parser.add_argument(flag, type=_count, metavar="N", help=f"default: {usual}")
    parser.add_argument(
        "--dtype", help="of --attention (default: bfloat16) and --hf (default: the config's)"
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {_LARGEST}")
    return int(text)


def _check(given: argparse.Namespace) -> None:
    named = [way for way in _TAKES if getattr(given, way) is not None]
    if len(named) != 1:
        raise Fault("name one of MODULE:FUNCTION, --hf DIR and --attention MASK (--help)")
    if given.run and named == ["attention"]:
        raise Fault("--run says nothing to --attention: its tensors have no values")
    for name in sorted({name for names in _TAKES.values() for name in names}):
        if getattr(given, name) and name not in _TAKES[named[0]]:
            way = "MODULE:FUNCTION" if named[0] == "model" else f"--{named[0]}"
            raise Fault(f"--{name.replace('_', '-')} says nothing to {way} (--help)")
    if given.target is not None:
        target_named(given.target)
    parse_options(_options(given.options))


def _options(settings: Sequence[str]) -> dict[str, bool | float | str]:
    """Options from "name=value": what is 0, 1, true or false by its name, numbers, or text."""
    found: dict[str, bool | float | str] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise Fault(f"--options {setting!r}: write it as name=value")
        found[name] = _value(text, isinstance(getattr(Options(), name, None), bool))
    return found


def _value(text: str, is_switch: bool) -> bool | float | str:
    words = {"true": True, "false": False} | ({"1": True, "0": False} if is_switch else {})
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text


# -- what is explained -----------------------------------------------------------------------------


def _subject(given: argparse.Namespace) -> Subject:
    batch, length, heads, head_dim = (getattr(given, name) or _SIZES[name] for name in _SIZES)
    if given.attention is not None:
        sizes = (batch, heads, given.kv_heads or heads, length, head_dim)
        return attention(given.attention, sizes, given.dtype or "bfloat16", given.train)
    if given.hf is not None:
        return from_config(given.hf, batch, length, given.dtype, given.train)
    return from_code(given.model, given.data, given.shape, given.train)


def _explained(given: argparse.Namespace, subject: Subject) -> Explanation:
    options = {**subject.options, **_options(given.options)}
    said = (subject.said,) if subject.said and parse_options(options)[0].policy else ()
    run = given.model is not None if given.run is None else given.run
    try:
        with torch.set_grad_enabled(given.train):
            found = explain(
                subject.model,
                *subject.args,
                options=options,
                dynamic=True if given.dynamic else None,
                source=given.source,
                target=given.target,
                run=run,
                **subject.kwargs,
            )
            return dataclasses.replace(found, notes=(*found.notes, *said))
    except Exception as error:
        raise Fault(
            f"the model could not be captured or run: {_said(error)}\n"
            "(its arguments are random where --shape gives them; for token ids write 1x1024:int64; "
            "--traceback shows where)",
            is_usage=False,
        ) from error


def _said(error: Exception) -> str:
    """An error in a few lines: torch's go on for long, and say in the second what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "\n".join([f"{type(error).__name__}: {lines[0] if lines else ''}", *lines[1:3]])


if __name__ == "__main__":
    sys.exit(main())
