"""What became of a graph's attentions: as a table, in the log, and as files to read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import fx

from adaattn_compiler.kernels.predict import Prediction
from adaattn_compiler.passes.pipeline import Analysis
from adaattn_compiler.records import SiteRecord

log = logging.getLogger("adaattn_compiler")

_HEADER = ("graph", "site", "spelling", "mask", "shape", "kernel", "decision", "reason")


def table(sites: Sequence[SiteRecord], graphs: int = 1, is_elsewhere: bool = False) -> str:
    """Sites in aligned columns; which graph each is in where there are several. is_elsewhere: the
    kernel is that of the target that their predictions are for."""
    rows = [_HEADER, *(_row(site, is_elsewhere) for site in sites)]
    if graphs == 1:
        rows = [row[1:] for row in rows]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(site: SiteRecord, is_elsewhere: bool) -> tuple[str, ...]:
    return (
        str(site.graph),
        _name(site),
        site.spelling,
        site.mask or "-",
        site.shape or "-",
        _kernel_there(site) if is_elsewhere else site.kernel or "inductor",
        site.decision or "-",
        _reason(site),
    )


def _kernel_there(site: SiteRecord) -> str:
    """On the target: the generated one, "-" where that does not take the site."""
    found = site.prediction
    if found is None or found.tiles is not None:
        return "inductor" if found is None else "triton"
    return "-" if found.refusal else site.kernel or "inductor"


def _reason(site: SiteRecord) -> str:
    """Why a site was not lowered, and where it is written; empty for one that was."""
    if site.refused is not None:
        return site.refused
    if site.reason is None:
        return ""
    return site.reason if site.where is None else f"{site.reason} [{site.where}]"


def predictions(sites: Sequence[SiteRecord]) -> list[str]:
    """What lowered sites take on the target, in aligned columns; those that are alike once."""
    alike: dict[Prediction, list[str]] = {}
    for site in sites:
        if site.prediction is not None:
            alike.setdefault(site.prediction, []).append(_name(site))
    if not alike:
        return []
    cells = [{"site": _names(names), **_cells(figures)} for figures, names in alike.items()]
    shown = [name for name in cells[0] if any(cell[name] not in ("", "-") for cell in cells)]
    rows = [shown, *([cell[name] for name in shown] for cell in cells)]
    device = next(iter(alike)).device
    decided = any(site.decision != "exact" for site in sites if site.prediction is not None)
    of = ", of attention computed exactly, not as decided" if decided else ""
    return [f"\non {device}, by counting and compiling{of}; nothing ran there:", _aligned(rows)]


def _name(site: SiteRecord) -> str:
    name = site.name or "(root)"
    return f"{name}#{site.ordinal}" if site.ordinal else name


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike"


def _cells(found: Prediction) -> dict[str, str]:
    """A prediction by column; "-" for what is not known."""
    shared = None if found.shared_memory is None else f"{found.shared_memory / 1024:.4g} KiB"
    return {
        "kernel": "-" if found.tiles is None else "triton",
        "tiles": found.tiles or "-",
        "warps": _known(found.warps),
        "stages": _known(found.stages),
        "registers": _known(found.registers),
        "shared": shared or "-",
        "spilled": "-" if found.spilled is None else f"{found.spilled} B",
        "tensor cores": found.tensor_cores or "-",
        "time": "-" if found.seconds is None else ">= " + _scaled(1e9 * found.seconds, _SECONDS),
        "bound": found.bound or "-",
        "operations": _scaled(found.operations, _COUNTS).strip(),
        "density": f"{100 * found.density:.3g}%",
        "bytes": _scaled(found.memory_bytes, _BYTES),
        "tile bytes": _scaled(found.tile_bytes, _BYTES),
        "eager bytes": _scaled(found.eager_bytes, _BYTES),
        "saving": f"{found.saving:.3g}x" if found.saving < 100 else f"{found.saving:.0f}x",
        "reason": found.refusal or found.note or "",
    }


# By factors of a thousand.
_SECONDS = ("ns", "us", "ms", "s")
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNTS = ("", "k", "M", "G", "T", "P")


def _scaled(value: float, units: Sequence[str]) -> str:
    """Three digits and the largest unit that leaves one before the point."""
    for unit in units[:-1]:
        if round(value, 1) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {units[-1]}"


def _known(number: int | None) -> str:
    return "-" if number is None else str(number)


def sources(sites: Sequence[SiteRecord]) -> list[str]:
    """What was generated, each text once, headed by the sites that it is for."""
    found: dict[str, list[str]] = {}
    for site in sites:
        if site.source is not None:
            found.setdefault(site.source, []).append(site.name or "(root)")
    return [f"\n=== {', '.join(names)}\n{source}" for source, names in found.items()]


def log_sites(sites: Sequence[SiteRecord], failure: str | None) -> None:
    """One line in the log for each site, and one for a graph that was left alone."""
    if failure is not None:
        log.info("graph left to Inductor: %s", failure)
    for site in sites:
        name = site.name or "(root)"
        if site.lowered:
            log.info(
                "%s: %s, mask %s -> %s (%s)", name, site.spelling, site.mask, site.kernel, site.why
            )
        else:
            log.info("%s: %s, left to Inductor: %s", name, site.spelling, _reason(site))


def dump(
    graph_module: fx.GraphModule,
    analysis: Analysis,
    sites: Sequence[SiteRecord],
    folder: Path | None,
) -> None:
    """The graph before and after, where the user asked for it; the latter headed by its sites."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("graph_*_before.txt")))
        (folder / f"graph_{number}_before.txt").write_text(_readable(graph_module))
        if analysis.graph_module is not None:
            head = "".join(f"# {line}\n" for line in table(sites).splitlines())
            text = f"{head}\n{_readable(analysis.graph_module)}"
            (folder / f"graph_{number}_after.txt").write_text(text)
    except OSError as error:
        log.warning("graphs could not be written to %s: %s", folder, error)


def _readable(graph_module: fx.GraphModule) -> str:
    """The graph as Python, with shapes and the lines of the model that it came from."""
    try:
        return graph_module.print_readable(print_output=False)
    except Exception as error:  # torch's printer, on a graph that it cannot annotate
        log.debug("a graph is written without annotations: %r", error)
        return str(graph_module.graph)
