"""The report of a calibration: one HTML page that needs nothing else, to be read by a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from adaattn_compiler.calibrate.cells import (
    BITS,
    KINDS,
    STEPS,
    CellOf,
    DecidedSite,
    bits_cell,
    error_cell,
    keys_cell,
    kind_cell,
    numbers,
    points,
    speedup,
)
from adaattn_compiler.calibrate.gather import RANK_ROWS
from adaattn_compiler.calibrate.pictures import TIMES, axes_of, bars, curve, grid, percent
from adaattn_compiler.calibrate.progress import spent
from adaattn_compiler.calibrate.run import Calibration
from adaattn_compiler.calibrate.statistics_cells import (
    RANK_WORDS,
    TITLES,
    entropy_cell,
    has_statistics,
    rank_cell,
    row,
)
from adaattn_compiler.kernels.effective_rank import ENERGIES
from adaattn_compiler.passes.choices import SiteKey

_BUDGETS = {
    "budget": "error of each head's output",
    "output_budget": "error of the model's output",
    "max_perplexity_change": "change of perplexity",
}
_INTRODUCTION = (
    "Attention of this model was measured on sample inputs: each head was computed in several "
    "cheaper ways (in fewer bits, on fewer keys), and for each the error of its output, beside the "
    "exact one, and the time were noted. Every head then got the cheapest way that the budget "
    "allows. The policy holds these decisions; at run time a head whose inputs are unlike the "
    "samples is computed exactly. Errors are relative (L2); p99 is the 99th percentile over the "
    "samples. Point at anything for its numbers."
)


def speedups(found: Calibration) -> str:
    """A sentence: attention's time exactly and as decided, predicted and measured."""
    sites = _sites(found)
    predicted, measured = (speedup(times) for times in _times(sites))
    return f"{predicted:.2f}x as fast as exact, as predicted head by head; {measured:.2f}x measured"


def page(found: Calibration, name: str, seconds: float) -> str:
    """The text of the file. name: the model's, as the user wrote it; seconds: calibration took."""
    sites = _sites(found)
    title = f"Calibration of {name}"
    style = (resources.files("adaattn_compiler.calibrate") / "report.css").read_text()
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_INTRODUCTION)}</p>",
        _facts(found, sites, seconds),
        _heads(sites),
        _statistics(sites),
        _speedups(sites),
        _curves(found, sites),
        _table(sites),
        _statistics_table(sites),
        _origin(found),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _sites(found: Calibration) -> list[DecidedSite]:
    keys = [(SiteKey(site.name, site.ordinal), site) for site in found.policy.sites]
    return [DecidedSite(site, found.sites[key], found.chosen.get(key)) for key, site in keys]


def _times(sites: Sequence[DecidedSite]) -> tuple[list[tuple[float, float]], ...]:
    """Predicted and measured seconds."""
    return [site.predicted for site in sites], [site.taken for site in sites]


# -- parts of the page -----------------------------------------------------------------------------


def _facts(found: Calibration, sites: Sequence[DecidedSite], seconds: float) -> str:
    heads = [head for site in sites for head in site.policy.decision.heads]
    changed = sum(not head.is_exact for head in heads)
    origin = found.policy.provenance
    predicted, measured = (speedup(times) for times in _times(sites))
    allowed = percent(origin.budget.value)
    facts = [
        ("heads not exact", f"{changed} of {len(heads)}", f"at {len(sites)} sites"),
        (
            "attention, measured",
            f"{measured:.2f}{TIMES}",
            f"as fast as exact; predicted: {predicted:.2f}{TIMES}",
        ),
        ("budget", allowed, _BUDGETS[origin.budget.kind]),
        *_outcome(found),
        (
            "calibration took",
            spent(seconds),
            f"{max(len(site.measured.errors) for site in sites)} samples",
        ),
    ]
    items = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for what, value, more in facts
    )
    return f'<dl class="facts">{items}</dl>'


def _outcome(found: Calibration) -> list[tuple[str, str, str]]:
    """What was measured of the whole model."""
    results = found.policy.provenance.results
    facts = []
    if "perplexity_change" in results:
        change = results["perplexity_change"]
        sign = "+" if change >= 0 else "\N{MINUS SIGN}"
        facts.append(("perplexity", f"{sign}{percent(abs(change))}", "of the model, end to end"))
    if "kl" in results:
        facts.append(("KL divergence", f"{results['kl']:.2g}", "nats a token, from exact"))
    if "output_error" in results:
        facts.append(("output error", percent(results["output_error"]), "relative L2, end to end"))
    return facts


def _heads(sites: Sequence[DecidedSite]) -> str:
    shares = _shares()
    pictures = [
        _picture("Representation", sites, kind_cell, KINDS),
        _picture("Precision", sites, bits_cell, BITS),
        _picture("Keys attended to, in % of those that the mask leaves", sites, keys_cell, shares),
        _picture(
            "Error (p99), in %; colored by the share of its budget",
            sites,
            error_cell,
            {**shares, "over": "over the budget"},
        ),
    ]
    words = "A row is a layer's attention (a site), a column is a head."
    return f'<h2>What each head does</h2><p>{words}</p><div class="cards">{"".join(pictures)}</div>'


def _statistics(sites: Sequence[DecidedSite]) -> str:
    """Of the sites that have any."""
    known = [site for site in sites if has_statistics(site)]
    if not known:
        return ""
    pictures = [
        _picture(
            "Entropy, in nats; colored by its share of the most", known, entropy_cell, _shares()
        ),
        _picture(
            f"Effective rank, of {ENERGIES[0]:.0%} of the energy", known, rank_cell, RANK_WORDS
        ),
    ]
    words = (
        "Computed exactly, on some rows of every sample; ranks on the first sample. Entropy is low "
        "where a head looks at few keys. The effective rank is low where many rows look at the "
        f"same ones; it is of {RANK_ROWS} rows, and near that it says no more than at least. "
        "Nothing was decided by either."
    )
    return (
        f'<h2>What each head is like</h2><p>{words}</p><div class="cards">{"".join(pictures)}</div>'
    )


def _picture(
    title: str, sites: Sequence[DecidedSite], cell_of: CellOf, meanings: Mapping[str, str]
) -> str:
    """With a legend of the colors that are in it."""
    rows = [
        (site.policy.label, [cell_of(site, head) for head in range(site.policy.heads)])
        for site in sites
    ]
    used = {cell.style for _, cells in rows for cell in cells}
    legend = _list({style: words for style, words in meanings.items() if style in used})
    return f'<div class="card"><h3>{escape(title)}</h3>{grid(title, rows)}{legend}</div>'


def _shares() -> dict[str, str]:
    """The classes of a scale, in words."""
    ends = [*list(STEPS.values())[1:], 1.0]
    return {
        style: f"{100 * begin:.0f} to {100 * end:.0f}%"
        for (style, begin), end in zip(STEPS.items(), ends, strict=True)
    }


def _list(meanings: Mapping[str, str]) -> str:
    """A legend: colors of the style sheet, and what they mean."""
    items = "".join(
        f'<li><span style="--swatch: var(--{color})"></span>{escape(words)}</li>'
        for color, words in meanings.items()
    )
    return f'<ul class="legend">{items}</ul>'


def _speedups(sites: Sequence[DecidedSite]) -> str:
    rows = [
        (
            site.policy.label,
            speedup([site.predicted]),
            None if site.timed is None else speedup([site.timed]),
        )
        for site in sites
    ]
    legend = _list({"accent-soft": "predicted: of the times of its heads", "accent": "measured"})
    words = (
        f"Exact is 1{TIMES}. Sites whose heads are all exact were not timed again; guards and "
        "audits, which take their share at run time, are not counted."
    )
    return (
        f"<h2>How much faster each site is</h2><p>{words}</p>"
        f'<div class="card">{bars("Speed-up by site", rows)}{legend}</div>'
    )


def _curves(found: Calibration, sites: Sequence[DecidedSite]) -> str:
    budget = found.policy.provenance.budget
    tried = [points(site) for site in sites]
    axes = axes_of(tried, budget.value if budget.kind == "budget" else None)
    cards = "".join(
        f'<div class="card"><h3>{escape(site.policy.label)}</h3>'
        f"{curve(f'Error against time of {site.policy.label}', each, axes)}</div>"
        for site, each in zip(sites, tried, strict=True)
    )
    marks = {
        "accent": "chosen by a head or more",
        "soft": "tried",
        "accent-soft": "best trade-offs",
    }
    marks |= {"limit": "budget of each head"} if axes.limit is not None else {}
    return (
        "<h2>Error against cost</h2><p>Each point is a way to compute the heads of a site: further "
        "left is faster, further down is nearer to exact. A point stands at the median of the "
        "heads' p99 errors; its line goes from the least to the largest.</p>"
        f'{_list(marks)}<br><div class="cards">{cards}</div>'
    )


def _table(sites: Sequence[DecidedSite]) -> str:
    titles = ("site", "head", "decision", "keys", "mean error", "p99 error", "budget")
    rows = [
        (site.policy.label, str(head), *numbers(site, head))
        for site in sites
        for head in range(site.policy.heads)
    ]
    return _details("All heads as a table", titles, rows)


def _statistics_table(sites: Sequence[DecidedSite]) -> str:
    rows = [
        row(site, head)
        for site in sites
        if has_statistics(site)
        for head in range(site.policy.heads)
    ]
    return _details("Statistics of all heads as a table", TITLES, rows) if rows else ""


def _details(summary: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that is folded away."""
    styles = ["" if title in ("site", "decision") else ' class="number"' for title in titles]

    def line(tag: str, cells: Sequence[str]) -> str:
        written = (
            f"<{tag}{style}>{escape(cell)}</{tag}>"
            for style, cell in zip(styles, cells, strict=True)
        )
        return f"<tr>{''.join(written)}</tr>"

    return (
        f"<details><summary>{escape(summary)}</summary>"
        f'<div class="card"><table><thead>{line("th", titles)}</thead>'
        f"<tbody>{''.join(line('td', cells) for cells in rows)}</tbody></table></div></details>"
    )


def _origin(found: Calibration) -> str:
    origin = found.policy.provenance
    rows = [
        ("policy", found.policy.key()),
        ("device", origin.device),
        *sorted(origin.versions.items()),
        ("created", origin.created),
        ("seed", str(origin.seed)),
        ("weights", origin.weights),
        ("data", origin.data),
    ]
    cells = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f'<h2>Where it comes from</h2><div class="card"><table>{cells}</table></div>'
