"""The pictures of a calibration's report, as SVG: layers by heads, speed-ups, errors against cost.

Colors are classes of the page's style sheet (report.css), which knows light and dark. All text
that comes from a model goes through `escape`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

TIMES = "\N{MULTIPLICATION SIGN}"
_LABEL, _ROW, _TOP = 190, 24, 22
_CHARACTERS = 26  # that fit beside a row
# Cells as wide as this have text.
_WIDE = 30


@dataclass(frozen=True)
class Cell:
    """Of a head: the class that colors it, a few characters in it, and what its tooltip says."""

    style: str
    text: str
    tooltip: str


@dataclass(frozen=True)
class Point:
    """A candidate of a site. seconds: relative to exact. low, middle, high: error over the heads.
    heads: those that chose it."""

    name: str
    seconds: float
    low: float
    middle: float
    high: float
    heads: tuple[int, ...]


def grid(title: str, rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Sites by heads."""
    most = max(len(cells) for _, cells in rows)
    width = _WIDE if most <= 16 else 18 if most <= 32 else 9
    step = 1 if width == _WIDE else 4
    body = [
        _text(_LABEL + (i + 0.5) * width, _TOP - 8, str(i), "tick", "middle")
        for i in range(0, most, step)
    ]
    for y, (name, cells) in enumerate(rows):
        top = _TOP + y * _ROW
        body.append(_row_label(name, top))
        body += [_cell(cell, _LABEL + x * width, top, width) for x, cell in enumerate(cells)]
    return _svg(title, _LABEL + most * width + 2, _TOP + len(rows) * _ROW + 2, body)


def _cell(cell: Cell, x: float, y: float, width: float) -> str:
    fits = width == _WIDE and cell.text
    text = _text(x + width / 2, y + _ROW / 2 + 3, cell.text, "in", "middle") if fits else ""
    gap = 2 if width > 9 else 1
    return (
        f'<g class="cell {cell.style}"><title>{escape(cell.tooltip)}</title>'
        f'<rect x="{x:g}" y="{y:g}" width="{width - gap:g}" height="{_ROW - gap:g}" rx="3"/>'
        f"{text}</g>"
    )


def bars(title: str, rows: Sequence[tuple[str, float, float | None]]) -> str:
    """Speed-ups by site: predicted, and measured where there is one."""
    largest = max([1.0, *(x for _, a, b in rows for x in (a, b or 0.0))])
    scale, body = 300 / largest, []
    height = _TOP + len(rows) * _ROW
    for mark in _marks(largest):
        x = _LABEL + mark * scale
        style = "one" if mark == 1 else "axis"
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{height}"'
        body.append(f'<line class="{style}" {ends}/>')
        body.append(_text(x, _TOP - 8, f"{mark:g}{TIMES}", "tick", "middle"))
    for y, (name, predicted, measured) in enumerate(rows):
        top = _TOP + y * _ROW
        body.append(_row_label(name, top))
        body.append(_bar(name, "predicted", predicted, top + 2, scale))
        if measured is not None:
            body.append(_bar(name, "measured", measured, top + 12, scale))
    return _svg(title, _LABEL + 360, height + 2, body)


def _bar(name: str, kind: str, value: float, y: float, scale: float) -> str:
    end = _LABEL + value * scale
    tooltip = f"{name}: {value:.2f}{TIMES} as fast as exact, {kind}"
    return (
        f'<g class="{kind}"><title>{escape(tooltip)}</title>'
        f'<rect x="{_LABEL}" y="{y:g}" width="{value * scale:.1f}" height="9" rx="2"/>'
        f"{_text(end + 4, y + 8, f'{value:.2f}{TIMES}', 'tick', 'start')}</g>"
    )


def _marks(largest: float) -> list[float]:
    step = next((s for s in (0.5, 1.0, 2.0, 5.0, 10.0) if largest / s <= 5), 20.0)
    return sorted({1.0, *(i * step for i in range(int(largest / step) + 1))})


# -- error against cost ----------------------------------------------------------------------------

_LEFT, _RIGHT, _UPPER, _LOWER = 62, 310, 14, 168


# Powers of ten: errors below this one are rounding in float32, and stand with no error at all.
_LEAST = -6


@dataclass(frozen=True)
class Axes:
    """What all sites' curves share. slowest: relative to exact. low, high: powers of ten of the
    error. limit: the error that heads are allowed, where it is of heads."""

    slowest: float
    low: int
    high: int
    limit: float | None

    def x(self, seconds: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * min(seconds / self.slowest, 1.0)

    def y(self, error: float) -> float:
        """Of no error: the lowest line."""
        power = math.log10(error) if error > 0 else self.low
        share = (min(max(power, self.low), self.high) - self.low) / (self.high - self.low)
        return _LOWER - (_LOWER - _UPPER) * share


def axes_of(sites: Sequence[Sequence[Point]], limit: float | None) -> Axes:
    """Wide enough for all candidates; times beyond twice exact stand at the edge."""
    errors = [e for points in sites for p in points for e in (p.low, p.high) if 0 < e < math.inf]
    low = math.floor(math.log10(min(errors))) if errors else -4
    high = math.ceil(math.log10(max(errors))) if errors else 0
    slowest = max([1.05, *(p.seconds for points in sites for p in points)])
    # Exact, which has no error, stands a line below the least.
    return Axes(min(slowest, 2.0), max(low, _LEAST) - 1, max(high, low + 1, _LEAST + 1), limit)


def curve(title: str, points: Sequence[Point], axes: Axes) -> str:
    """Candidates by what they cost and what they lose, and which were chosen."""
    body = _frame(axes)
    front = _front(points)
    if len(front) > 1:
        steps = " ".join(f"{axes.x(p.seconds):.1f},{axes.y(p.middle):.1f}" for p in front)
        body.append(f'<polyline class="front" points="{steps}"/>')
    for point in sorted(points, key=lambda p: len(p.heads)):
        body.append(_point(point, axes))
    return _svg(title, _RIGHT + 16, _LOWER + 36, body)


def _frame(axes: Axes) -> list[str]:
    body = []
    for power in range(axes.low, axes.high + 1):
        y = axes.y(10.0**power)
        body.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = "none" if power == axes.low else percent(10.0**power)
        body.append(_text(_LEFT - 6, y + 3, label, "tick", "end"))
    for mark in (m for m in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0) if m <= axes.slowest):
        body.append(_text(axes.x(mark), _LOWER + 15, f"{mark:g}", "tick", "middle"))
    middle = (_LEFT + _RIGHT) / 2
    body.append(_text(middle, _LOWER + 31, "time, relative to exact", "tick", "middle"))
    if axes.limit is not None:
        y = axes.y(axes.limit)
        body.append(f'<line class="limit" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    return body


def _front(points: Sequence[Point]) -> list[Point]:
    """Those that nothing faster has less error than, from the fastest on."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, p.middle)):
        if not found or point.middle < found[-1].middle:
            found.append(point)
    return found


def _point(point: Point, axes: Axes) -> str:
    x, y = axes.x(point.seconds), axes.y(point.middle)
    chosen = f"chosen by {heads_in_words(point.heads)}" if point.heads else "chosen by no head"
    tooltip = (
        f"{point.name}: {point.seconds:.2f} of exact's time; p99 error {percent(point.middle)} "
        f"(from {percent(point.low)} to {percent(point.high)} among the heads); {chosen}"
    )
    style, radius = ("taken", 4.5) if point.heads else ("tried", 2.5)
    span = f'y1="{axes.y(point.low):.1f}" y2="{axes.y(point.high):.1f}"'
    return (
        f'<g class="{style}"><title>{escape(tooltip)}</title>'
        f'<line x1="{x:.1f}" x2="{x:.1f}" {span}/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/></g>'
    )


# -- words -----------------------------------------------------------------------------------------


def heads_in_words(heads: Sequence[int]) -> str:
    """ "head 3", "heads 0, 2"."""
    return f"head{'s' if len(heads) > 1 else ''} {', '.join(map(str, heads))}"


def percent(share: float) -> str:
    """ "0.8%", "25%", "1e-05%"."""
    if not math.isfinite(share):
        return "not finite"
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def _row_label(name: str, top: float) -> str:
    short = name if len(name) <= _CHARACTERS else "…" + name[1 - _CHARACTERS :]
    text = _text(_LABEL - 10, top + _ROW / 2 + 3, short, "name", "end")
    return f"<g><title>{escape(name)}</title>{text}</g>"


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text class="{style}" {place} text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, width: float, height: float, body: Sequence[str]) -> str:
    """As large as drawn: what is wider than the page scrolls in its frame."""
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg role="img" aria-label="{escape(title)}" {size}>{"".join(body)}</svg>'
