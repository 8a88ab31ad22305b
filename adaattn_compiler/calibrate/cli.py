"""`adaattn-calibrate`: measure a model on samples, and write the policy by which it then runs.

adaattn-calibrate my_package.models:build --data my_package.data:batches --budget 0.01
adaattn-calibrate --hf models/llama --text book.txt --max-perplexity-change 0.1%
torchrun --nproc-per-node 4 -m adaattn_compiler.calibrate --hf models/llama --text book.txt ...
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from adaattn_compiler.calibrate.given import asked_for
from adaattn_compiler.calibrate.progress import Bar, no_progress, spent
from adaattn_compiler.calibrate.ranks import ALONE, Ranks, joined, left
from adaattn_compiler.calibrate.report import page, speedups
from adaattn_compiler.calibrate.resume import Journal, key_of
from adaattn_compiler.calibrate.run import PRESETS, Calibration, calibration
from adaattn_compiler.calibrate.subjects import Samples, from_code, from_folder
from adaattn_compiler.kernels.heuristic import HEURISTICS
from adaattn_compiler.policy import LARGEST_BUDGET, Budget
from adaattn_compiler.policy.file import write_text
from adaattn_compiler.subjects import Fault

_WRITTEN, _FAILED, _MISUSED, _INTERRUPTED = 0, 1, 2, 130

# What each way to name a model takes beside it.
_TAKES = {"model": ("data",), "hf": ("text", "length", "dtype")}
_BUDGETS = ("budget", "output_budget", "max_perplexity_change")
_LENGTH, _SAMPLES = 2048, 8
_LARGEST = 1 << 30

_EPILOG = """\
examples:
  a model of your own, made by a function without arguments, and batches of its inputs:
    adaattn-calibrate my_package.models:build --data my_package.data:batches --budget 0.01
  a folder of transformers with weights, on pieces of a text:
    adaattn-calibrate --hf models/llama --text book.txt --max-perplexity-change 0.1%
  samples shared by four processes:
    torchrun --nproc-per-node 4 -m adaattn_compiler.calibrate --hf models/llama --text book.txt \\
        --max-perplexity-change 0.1%

Interrupted, it leaves OUTPUT.partial; the same command goes on from there.

exit status: 0 the policy is written, 1 the model could not be made, run or calibrated, 2 an
argument is wrong, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    given = _parser().parse_args(arguments)
    ranks, bar = ALONE, Bar(sys.stderr)
    try:
        budget = _checked(given)
        ranks = joined()
        _run(given, budget, ranks, bar)
    except Fault as fault:
        return _failed(given, ranks, str(fault), _MISUSED if fault.is_usage else _FAILED)
    except KeyboardInterrupt:
        bar.close()
        return _failed(given, ranks, _broken_off(given), _INTERRUPTED)
    except Exception as error:
        bar.close()
        return _failed(given, ranks, _said(error), _FAILED)
    finally:
        left(ranks)
    return _WRITTEN


def _failed(given: argparse.Namespace, ranks: Ranks, message: str, status: int) -> int:
    if given.traceback:
        traceback.print_exc()
    kind = "" if status == _INTERRUPTED else "error: "
    who = f" (rank {ranks.index})" if ranks.count > 1 else ""
    print(f"adaattn-calibrate{who}: {kind}{message}", file=sys.stderr)
    return status


def _broken_off(given: argparse.Namespace) -> str:
    partial = _partial(given)
    if partial.exists():
        return f"interrupted; the same command goes on from {partial}"
    return "interrupted before the first sample was measured; the same command begins anew"


def _said(error: Exception) -> str:
    """An error in a few lines. ValueError is how calibration refuses: it says enough."""
    if isinstance(error, ValueError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return "\n".join([first, *lines[1:3], "(--traceback shows where)"])


# -- arguments -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adaattn-calibrate",
        description="Measure what each attention head of a model loses and gains by computing "
        "less, and write the policy that keeps to a budget.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_inputs(parser)
    _add_budgets(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--threads", type=_count, metavar="N", help="default: torch's")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("policy.json"),
        metavar="FILE",
        help="default: policy.json",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="default: beside the policy, as policy.html"
    )
    parser.add_argument("--no-report", action="store_true", help="write no report")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODULE:FUNCTION",
        help="a function that returns the model, or (model, inputs)",
    )
    parser.add_argument(
        "--data",
        metavar="MODULE:NAME",
        help="batches, or a function that returns them: of each, a dictionary is given as "
        "keywords, a tuple as arguments",
    )
    parser.add_argument(
        "--hf", metavar="DIR", help="a folder of transformers with a causal language model"
    )
    parser.add_argument("--text", metavar="FILE", help="what it reads; needed by --hf")
    parser.add_argument(
        "--length", type=_count, metavar="N", help=f"tokens in a sample (default: {_LENGTH})"
    )
    parser.add_argument(
        "--samples",
        type=_count,
        metavar="N",
        help=f"how many (default: {_SAMPLES} of --text, all of --data)",
    )
    parser.add_argument("--dtype", help="of --hf (default: as saved)")


def _add_budgets(parser: argparse.ArgumentParser) -> None:
    helps = {
        "budget": "relative L2 error of each head's output",
        "output_budget": "relative L2 error of the model's output",
        "max_perplexity_change": "of a language model",
    }
    for name in _BUDGETS:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=_share, metavar="X", help=f"{helps[name]}: 0.001 or 0.1%%")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="balanced",
        help="how much of the budget is used: half, 0.8 (default), all",
    )
    parser.add_argument(
        "--heuristic",
        choices=list(HEURISTICS),
        help="propose by fixed thresholds, to compare with; what is over the budget is exact",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {_LARGEST}")
    return int(text)


def _share(text: str) -> float:
    """A number, or a percentage."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        found = float(number) / (100 if percent else 1)
    except ValueError:
        found = math.nan
    if not 0 < found <= LARGEST_BUDGET:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write a number above 0, at most {LARGEST_BUDGET:g}, as 0.001 or 0.1%"
        )
    return found


def _checked(given: argparse.Namespace) -> Budget:
    named = [way for way in _TAKES if getattr(given, way) is not None]
    if len(named) != 1:
        raise Fault("name one of MODULE:FUNCTION and --hf DIR (--help)")
    for name in sorted({name for names in _TAKES.values() for name in names}):
        if getattr(given, name) is not None and name not in _TAKES[named[0]]:
            way = "MODULE:FUNCTION" if named[0] == "model" else f"--{named[0]}"
            raise Fault(f"--{name} says nothing to {way} (--help)")
    if given.hf is not None and given.text is None:
        raise Fault("--hf needs --text FILE: what the model is to read")
    if given.report is not None and given.no_report:
        raise Fault("--report and --no-report: leave one out")
    for path in (given.output, given.report):
        if path is not None and not path.parent.is_dir():
            raise Fault(f"{path}: there is no folder {path.parent}; make it first")
        if path is not None and path.is_dir():
            raise Fault(f"{path} is a folder; name a file in it")
    if not given.no_report and _report(given) == given.output:
        raise Fault(f"-o {given.output}: the report would replace it; add --report FILE")
    if not 0 <= given.seed < 2**63:
        raise Fault(f"--seed {given.seed}: it must be from 0 to 2^63 - 1")
    budgets = {name: getattr(given, name) for name in _BUDGETS}
    if sum(value is not None for value in budgets.values()) != 1:
        raise Fault("give one of --budget, --output-budget and --max-perplexity-change (--help)")
    return asked_for(**budgets)


# -- what is done ----------------------------------------------------------------------------------


def _run(given: argparse.Namespace, budget: Budget, ranks: Ranks, bar: Bar) -> None:
    begin = time.monotonic()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    samples = _samples(given)
    say = bar.say if ranks.is_first else _nothing
    if samples.said:
        say(samples.said)
    journal = _journal(given, samples, ranks, say)
    progress = bar if ranks.is_first else no_progress
    found = calibration(
        samples.model,
        samples.batches,
        budget,
        given.preset,
        given.seed,
        progress,
        journal,
        ranks,
        given.heuristic,
    )
    if journal is not None:
        bar.close()
        _write(given, found, time.monotonic() - begin)
        journal.remove()


def _samples(given: argparse.Namespace) -> Samples:
    # So that a model that is made at random is the same in each process and when gone on with.
    torch.manual_seed(given.seed)
    if given.hf is None:
        return from_code(given.model, given.data, given.samples)
    length, count = given.length or _LENGTH, given.samples or _SAMPLES
    return from_folder(given.hf, given.text, length, count, given.dtype)


def _journal(
    given: argparse.Namespace, samples: Samples, ranks: Ranks, say: Callable[[str], None]
) -> Journal | None:
    """The first rank's; None on others. A fault where they calibrate different things."""
    key = key_of(samples.model, samples.batches, given.seed)
    for index, other in enumerate(ranks.gather(key)):
        different = key.differences(other)
        if different:
            raise Fault(
                f"rank {index} has other {' and other '.join(different)} than rank {ranks.index}: "
                "model and data must be the same in each process",
                is_usage=False,
            )
    return Journal(_partial(given), key, say) if ranks.is_first else None


def _partial(given: argparse.Namespace) -> Path:
    return Path(f"{given.output}.partial")


def _report(given: argparse.Namespace) -> Path:
    """Of the policy's name, so that no report replaces that of another policy."""
    report: Path = given.report or given.output.with_suffix(".html")
    return report


def _write(given: argparse.Namespace, found: Calibration, seconds: float) -> None:
    found.policy.save(given.output)
    written = [str(given.output)]
    if not given.no_report:
        report = _report(given)
        write_text(report, page(found, given.hf or given.model, seconds))
        written.append(str(report))
    print(found.policy.summary())
    for words in (found.said, found.idle):
        if words:
            print(words)
    print(f"attention: {speedups(found)}")
    print(f"calibrated in {spent(seconds)}; written: {', '.join(written)}", flush=True)


def _nothing(text: str) -> None:
    """Only the first rank speaks."""
