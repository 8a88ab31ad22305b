"""AdaAttn on real text: train a small GPT with it, then compare it with eager and with Inductor.

    python examples/demo.py [--seconds 30] [--batches 24] [--threads N] [--model DIR]

The text is the source of Python's own library, which every machine has; what is evaluated was held
out. A small GPT (tiny_gpt.py; unmodified, attention by hand) is trained for some seconds under
torch.compile(backend="adaattn"). With --model it is a folder of transformers instead, whose
vocabulary is bytes; nothing is trained then.

The held-out text is then read three ways, by eager, backend="inductor" and backend="adaattn": the
same batches, one after the other in turns. Bits per byte have to agree; how many there are says
nothing, for so short a training.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_gpt import CONTEXT, TinyGpt, batch, loss_of, stdlib_text
from torch import nn

import adaattn_compiler

BATCH = 4
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Reading:
    """What one way of running the model showed: nats and seconds of each batch."""

    run: Logits
    first_call: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    furthest: float = 0.0  # from eager's logits

    @property
    def bits_per_byte(self) -> float:
        return statistics.fmean(self.losses) / math.log(2)


def trained(text: torch.Tensor, seconds: float) -> TinyGpt:
    """A small GPT after that many seconds of training, compiling not counted."""
    model = TinyGpt()
    step = torch.compile(model, backend="adaattn")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    begin, steps, spent = time.perf_counter(), 0, 0.0
    while spent < seconds:
        ids = batch(text, BATCH, CONTEXT, generator)
        rate = 2e-3 * min(1.0, (steps + 1) / 20) * max(0.1, 1 - spent / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(step(ids[:, :-1]), ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if steps == 0:
            print(f"  compiled in {time.perf_counter() - begin:.0f} s (forward and backward)")
            begin = time.perf_counter()
        if steps % 20 == 0:
            print(f"  step {steps:4}: {loss.item() / math.log(2):.2f} bits per byte", flush=True)
        steps, spent = steps + 1, time.perf_counter() - begin
    print(f"  {steps} steps of {BATCH * CONTEXT} bytes in {spent:.0f} s")
    return model.eval()


def loaded(folder: Path) -> nn.Module:
    """A causal language model of transformers over bytes."""
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():  # else it is looked for on the network
        raise SystemExit(f"--model {folder}: no config.json there; give the folder that has one")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model.config.vocab_size != 256:
        raise SystemExit(f"{folder}: its vocabulary is {model.config.vocab_size}, not 256 bytes")
    model.config.use_cache = False
    return _LogitsOnly(model).eval()


class _LogitsOnly(nn.Module):
    """So that every model here is a function from bytes to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.model(input_ids=ids).logits)


def compared(model: nn.Module, text: torch.Tensor, length: int, batches: int) -> dict[str, Reading]:
    """The same held-out batches, read three ways in turns."""
    readings = {
        "eager": Reading(model),
        "inductor": Reading(torch.compile(model, backend="inductor")),
        "adaattn": Reading(torch.compile(model, backend="adaattn")),
    }
    generator = torch.Generator().manual_seed(1)
    pieces = [batch(text, BATCH, length, generator) for _ in range(batches)]
    with torch.no_grad():
        for name, reading in readings.items():
            begin = time.perf_counter()
            reading.run(pieces[0][:, :-1])
            reading.first_call = time.perf_counter() - begin
            print(f"  {name}: first call {reading.first_call:.1f} s", flush=True)
        for turn, ids in enumerate(pieces):
            _read(readings, ids, turn)
    return readings


def _read(readings: dict[str, Reading], ids: torch.Tensor, turn: int) -> None:
    names = list(readings)
    order = names[turn % 3 :] + names[: turn % 3]
    logits: dict[str, torch.Tensor] = {}
    for name in order if turn % 2 == 0 else reversed(order):
        begin = time.perf_counter()
        logits[name] = readings[name].run(ids[:, :-1])
        readings[name].seconds.append(time.perf_counter() - begin)
        readings[name].losses.append(float(loss_of(logits[name], ids)))
    for name, reading in readings.items():
        distance = float((logits[name] - logits["eager"]).abs().max())
        reading.furthest = max(reading.furthest, distance)


def table(readings: dict[str, Reading]) -> str:
    """Times are medians; the last columns medians of the ratios within a batch."""
    lines = [
        f"{'':10}{'bits per':>10}{'logits at most':>18}{'ms per':>10}{'times as fast as':>22}",
        f"{'':10}{'byte':>10}{'apart from eager':>18}{'batch':>10}{'eager':>11}{'inductor':>11}",
    ]
    for name, reading in readings.items():
        ratios = [_ratio(readings[other], reading) for other in ("eager", "inductor")]
        lines.append(
            f"{name:10}{reading.bits_per_byte:10.5f}{reading.furthest:18.1e}"
            f"{1e3 * statistics.median(reading.seconds):10.1f}"
            f"{ratios[0]:10.2f}x{ratios[1]:10.2f}x"
        )
    return "\n".join([*lines, "above 1.00x is faster; a ratio is the median over the batches"])


def _ratio(other: Reading, reading: Reading) -> float:
    """How many times faster a reading is than another one."""
    pairs = zip(other.seconds, reading.seconds, strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def _agreement(readings: dict[str, Reading]) -> str:
    apart = abs(readings["adaattn"].bits_per_byte - readings["eager"].bits_per_byte)
    verdict = "equal" if apart < 1e-4 else "NOT EQUAL"
    return f"adaattn and eager, bits per byte: {verdict} ({apart:.1e} apart)"


def main() -> None:
    parser = argparse.ArgumentParser(description="AdaAttn on real text.")
    parser.add_argument("--seconds", type=float, default=30.0, help="of training")
    parser.add_argument("--batches", type=int, default=24, help="of held-out text")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", type=Path, help="a folder of transformers, over bytes")
    parser.add_argument("--length", type=int, default=1024, help="of its context, with --model")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(
        f"AdaAttn {adaattn_compiler.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {given.threads} thread(s)"
    )
    train, held_out = stdlib_text()
    megabytes = f"{len(train) / 1e6:.1f} MB, {len(held_out) / 1e6:.1f} MB held out"
    print(f"text: sources of Python's library, {megabytes}")
    if given.model is None:
        print(f'\ntraining a small GPT for {given.seconds:.0f} s with backend="adaattn"')
        model, length = trained(train, given.seconds), CONTEXT
        print("  barely trained: from here on only agreement and time matter")
    else:
        model, length = loaded(given.model), given.length
    _compare(model, held_out, length, given.batches)


def _compare(model: nn.Module, text: torch.Tensor, length: int, batches: int) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        ids = batch(text, BATCH, length, generator)[:, :-1]
        print(f"\nexplain(model, bytes[{BATCH}, {length}]):")
        print(adaattn_compiler.explain(model, ids))
    print("\nreading held-out text three ways; first calls compile, or find what Inductor cached")
    print("in an earlier call or run, so that they are no comparison of compile times")
    readings = compared(model, text, length, batches)
    print(f"\n{batches} batches of {BATCH} x {length} bytes, in turns")
    print(table(readings))
    print(_agreement(readings))


if __name__ == "__main__":
    main()
