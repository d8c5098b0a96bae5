"""Charts as inline SVG: numbers in, accessible markup out, no script and no library.

Every chart is one `<svg>` that scales with its column (`viewBox`, no fixed size), takes its colours from the CSS
variables of the page (so it follows dark mode and print) and carries a `<title>` and a `<desc>` for those who cannot
see it. Missing and infinite values are gaps, never zeros. Matplotlib was rejected: its pictures keep their colours.

Markup is made by `element` alone, which escapes whatever is not `Markup` already: forgetting is safe.
"""

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

WIDTH = 520  # One column of the page at full width: chart text is then as large as the page's.
CHARACTER = 7.2  # Average advance of the 13 px chart font, rounded up.

CHART_STYLE = """
svg.chart { display: block; width: 100%; height: auto; font-size: 13px; fill: var(--soft); overflow: visible; }
svg.chart text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
svg.chart .end { text-anchor: end; } svg.chart .middle { text-anchor: middle; }
svg.chart .name { fill: var(--ink); } svg.chart .strong { fill: var(--ink); font-weight: 650; }
.grid { stroke: var(--rule); } .tie { stroke: var(--soft); stroke-width: 1.5; }
.band { fill: var(--accent); opacity: 0.13; }
.line { fill: none; stroke-width: 1.75; stroke-linejoin: round; } .line.k { stroke-width: 3; }
.leader { fill: none; stroke-width: 0.75; opacity: 0.7; }
.k { stroke: var(--accent); } .k0 { stroke: var(--k0); } .k1 { stroke: var(--k1); } .k2 { stroke: var(--k2); }
.k3 { stroke: var(--k3); } .k4 { stroke: var(--k4); }
.bar { fill: var(--bar); } .bar.first { fill: var(--accent); }
.dot { fill: var(--accent); } .ring { fill: var(--paper); stroke: var(--k0); stroke-width: 2; }
.point { fill: var(--paper); stroke-width: 2; }
"""
_COLOURS = 5
_DASHES = ("7 3", "2 3", "9 3 2 3", None)  # Four beside five colours: the pair repeats only after twenty lines.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Markup(str):
    """HTML or SVG that needs no further escaping."""

    __slots__ = ()


@dataclass(frozen=True)
class Line:
    """One named curve: `values` has one entry a round, None where there is nothing to draw."""

    name: str
    values: Sequence[float | None]
    strong: bool = False


@dataclass(frozen=True)
class Pair:
    """One row of a dot plot: two shares of one to compare, and a note for the right margin."""

    name: str
    dot: float | None
    ring: float | None
    note: str


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Build one element; every child and attribute that is not `Markup` is escaped.

    A None child or attribute is left out. `class_` and `aria_label` become `class` and `aria-label`; floats keep one
    decimal. Characters that XML cannot carry (controls, lone surrogates) become U+FFFD.
    """
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag == "meta":
        return Markup(f"<{tag}{named}>")
    return Markup(f"<{tag}{named}>{joined(children)}</{tag}>")


def joined(children: Iterable[object]) -> Markup:
    """Set the children one after the other, escaping what is not `Markup`, skipping None."""
    return Markup("".join(_escaped(child) for child in children if child is not None))


def finite(value: object) -> float | None:
    """Return the value as a float that can be drawn, or None for NaN, infinity, beyond 1e300 and what is no number."""
    number = float(value) if isinstance(value, Real) else math.nan
    return number if abs(number) < 1e300 else None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return ascending round numbers from at or below `low` to at or above `high`, evenly spaced.

    The step is 1, 2 or 5 times a power of ten, and there are at most `count + 2` of them. One value alone (or two that
    float precision hardly tells apart) is padded towards zero, so that a lone 100% never asks for 110%.
    """
    step, exponent, low, high = _step(low, high, count)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(k * step, max(0, -exponent)) for k in range(first, last + 1)]


def apart(wanted: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Move label positions as little as needed to stand `gap` apart within `low..high`, in the order they came.

    `wanted` ascends. Where they do not all fit, they share the room evenly.
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed: list[float] = []
    for want in wanted:
        placed.append(max(want, low, placed[-1] + gap if placed else low))
    ceiling = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def line_chart(
    ident: str,
    title: str,
    description: str,
    rounds: Sequence[int],
    lines: Sequence[Line],
    *,
    y_label: str,
    percent: bool = False,
    from_zero: bool = False,
    band: tuple[Line, Line] | None = None,
) -> Markup:
    """Draw curves over rounds, each named at its right end; a strong one is thick and in the accent colour.

    `band` shades the room between two curves. A point without neighbours (a run of one round) is drawn as a dot.
    """
    levels = [v for line in lines for v in line.values if v is not None]
    if not levels:
        return _chart(ident, title, description, 60, _text(WIDTH / 2, 34, "no figures to draw", "middle"))
    widest = max(_advance(line.name) for line in lines)
    height, top, bottom, left = 280, 30, 236, 50
    right = WIDTH - min(140.0, 1.06 * widest + 24)  # A bold name runs wider.
    across = _Scale(min(rounds), max(rounds), left + 4, right - 4)
    marks = ticks(min([*levels, 0.0] if from_zero else levels), max(levels))
    up = _Scale(marks[0], marks[-1], bottom, top)
    parts = [_text(left - 8, 14, y_label, "end" if _advance(y_label) < left - 8 else None)]
    for mark in marks:
        parts.append(_rule(left, up(mark), right, up(mark)))
        parts.append(_text(left - 8, up(mark) + 4, _tick_text(mark, marks[1] - marks[0], percent), "end"))
    for number in _round_ticks(min(rounds), max(rounds)):
        parts.append(_text(across(number), bottom + 18, f"{number}", "middle"))
    parts.append(_text((left + right) / 2, height - 6, "round", "middle"))
    if band:
        parts.append(_shade(rounds, band, across, up))
    for i, line in enumerate(lines):
        parts.append(_curve(rounds, line, i, across, up))
    parts.append(_line_labels(rounds, lines, across, up, right, bottom, top))
    return _chart(ident, title, description, height, *parts)


def bar_chart(
    ident: str, title: str, description: str, bars: Mapping[str, float | None], *, x_label: str, percent: bool = True
) -> Markup:
    """Draw horizontal bars from 0 up, each with its name and figure, the first in the accent colour."""
    left, pitch, top = 96, 44, 8
    bottom = top + pitch * len(bars)
    marks = ticks(0.0, max([1.0 if percent else 0.0, *(value for value in bars.values() if value is not None)]))
    across = _Scale(marks[0], marks[-1], left, WIDTH - 56)
    parts: list[Markup] = []
    for mark in marks:
        parts.append(_rule(across(mark), top, across(mark), bottom))
        parts.append(_text(across(mark), bottom + 18, _tick_text(mark, marks[1], percent), "middle"))
    parts.append(_text(across(marks[-1] / 2), bottom + 38, x_label, "middle"))
    for i, (name, value) in enumerate(bars.items()):
        y, kind = top + pitch * (i + 0.5), "name" if i else "strong"
        length = max(0.0, across(value or 0.0) - left)
        parts.append(
            element("rect", class_="bar" if i else "bar first", x=left, y=y - 13, width=length, height=26, rx=2)
        )
        parts.append(_text(left - 10, y + 4, name, f"end {kind}"))
        parts.append(_text(left + length + 8, y + 4, "-" if value is None else _figure(value, percent), kind))
    return _chart(ident, title, description, bottom + 46, *parts)


def dot_chart(
    ident: str,
    title: str,
    description: str,
    pairs: Sequence[Pair],
    *,
    marks: Sequence[float],
    names: tuple[str, str, str],
    percent: bool = True,
) -> Markup:
    """Draw one row a pair: a dot and a ring on the axis `marks`, tied by a line, with the note at the right.

    `names` says what the dot, the ring and the note are. Rows close up as they grow in number.
    """
    pitch = 26.0 if len(pairs) <= 12 else 17.0
    left, right, top = 118, WIDTH - 64, 34
    bottom = top + pitch * len(pairs)
    across = _Scale(marks[0], marks[-1], left + 8, right - 8)
    radius = 5.5 if pitch > 20 else 4.5
    second = left + 42 + _advance(names[0])
    parts = [element("circle", class_="dot", cx=left + 8, cy=12, r=5.5), _text(left + 20, 16, names[0])]
    if any(pair.ring is not None for pair in pairs):
        parts += [element("circle", class_="ring", cx=second, cy=12, r=4.5), _text(second + 12, 16, names[1])]
    parts.append(_text(WIDTH, 16, names[2], "end"))
    for mark in marks:
        parts.append(_rule(across(mark), top, across(mark), bottom))
        parts.append(_text(across(mark), bottom + 18, _tick_text(mark, marks[1] - marks[0], percent), "middle"))
    for i, pair in enumerate(pairs):
        y = top + pitch * (i + 0.5)
        ends = [(v, kind) for v, kind in ((pair.ring, "ring"), (pair.dot, "dot")) if v is not None]
        row = [_text(left - 8, y + 4, _fitted(pair.name, left - 8), "end name"), _text(WIDTH, y + 4, pair.note, "end")]
        if len(ends) == 2:
            row.append(_rule(across(ends[0][0]), y, across(ends[1][0]), y, "tie"))
        row += [element("circle", class_=k, cx=across(v), cy=y, r=radius - (k == "ring")) for v, k in ends]
        told = [f"{names[k == 'ring']} {_figure(v, percent)}" for v, k in reversed(ends)] or ["no figure"]
        parts.append(element("g", element("title", f"{pair.name}: {', '.join(told)}"), *row))
    return _chart(ident, title, description, bottom + 26, *parts)


@dataclass(frozen=True)
class _Scale:
    """Maps `low..high` linearly to `start..end`; a range of one value maps to the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _escaped(value: object) -> str:
    if isinstance(value, Markup):
        return value
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    return html.escape(_UNPRINTABLE.sub("\ufffd", text))


def _step(low: float, high: float, count: int) -> tuple[float, int, float, float]:
    """Return the step, its power of ten, and the range it divides (padded where the data's is empty)."""
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-290):
        low, high = min(low, 0.9 * low), max(high, 0.9 * high)
        if high - low < 1e-290:
            low, high = 0.0, 1.0
    raw = (high - low) / count
    exponent = math.floor(math.log10(raw))
    factor = next(f for f in (1, 2, 5, 10) if f * 10.0**exponent >= raw * (1 - 1e-9))
    return factor * 10.0**exponent, exponent, low, high


def _figure(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3g}"


def _tick_text(tick: float, step: float, percent: bool) -> str:
    scale = 100 if percent else 1
    decimals = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    if decimals > 4 or abs(tick) >= 1e6:
        return f"{tick * scale:.3g}" + "%" * percent
    return f"{tick * scale:,.{decimals}f}" + "%" * percent


def _round_ticks(first: int, last: int) -> list[int]:
    """Return the first round and the whole multiples of a nice step after it, not so near that the labels touch."""
    marks = [int(t) for t in ticks(first, last) if t == int(t) and first < t <= last] if first < last else []
    return [first, *(t for t in marks if (t - first) * 15 >= last - first)]


def _curve(rounds: Sequence[int], line: Line, index: int, across: _Scale, up: _Scale) -> Markup:
    """Draw the line's unbroken stretches as one path, and a stretch of one point as a small circle."""
    stretches: list[list[str]] = [[]]
    for number, value in zip(rounds, line.values, strict=True):
        if value is None:
            stretches.append([])
        else:
            stretches[-1].append(f"{across(number):.1f},{up(value):.1f}")
    path = "".join("M" + "L".join(points) for points in stretches if len(points) > 1)
    lone = [points[0].split(",") for points in stretches if len(points) == 1]
    kind, dash = _colour(line, index), None if line.strong else _DASHES[index % len(_DASHES)]
    return element(
        "g",
        element("title", line.name),
        element("path", class_=f"line {kind}", d=path, stroke_dasharray=dash) if path else None,
        *(element("circle", class_=f"point {kind}", cx=x, cy=y, r=4) for x, y in lone),
    )


def _shade(rounds: Sequence[int], band: tuple[Line, Line], across: _Scale, up: _Scale) -> Markup:
    both = [(n, a, b) for n, a, b in zip(rounds, band[0].values, band[1].values, strict=True)]
    points = [f"{across(n):.1f},{up(a):.1f}" for n, a, _ in both if a is not None]
    points += [f"{across(n):.1f},{up(b):.1f}" for n, _, b in reversed(both) if b is not None]
    return element("polygon", class_="band", points=" ".join(points))


def _line_labels(
    rounds: Sequence[int], lines: Sequence[Line], across: _Scale, up: _Scale, right: float, bottom: float, top: float
) -> Markup:
    """Name each line beside its last point, moved apart where they would overlap, with a leader from the point."""
    ends = []
    for index, line in enumerate(lines):
        drawn = [(number, value) for number, value in zip(rounds, line.values, strict=True) if value is not None]
        if drawn:
            ends.append((up(drawn[-1][1]), across(drawn[-1][0]), index, line))
    ends.sort(key=lambda end: end[:3])
    parts = []
    for (y, x, index, line), label_y in zip(ends, apart([e[0] for e in ends], top, bottom, 15), strict=True):
        leader = f"M{x:.1f},{y:.1f}L{right + 2:.1f},{y:.1f}L{right + 14:.1f},{label_y:.1f}"
        parts.append(element("path", class_=f"leader {_colour(line, index)}", d=leader))
        name = _fitted(line.name, WIDTH - right - 18)
        parts.append(_text(right + 18, label_y + 4, name, "strong" if line.strong else "name"))
    return joined(parts)


def _colour(line: Line, index: int) -> str:
    return "k" if line.strong else f"k{index % _COLOURS}"


def _advance(text: str) -> float:
    """Estimate the text's width in the chart font; East Asian wide characters take two places."""
    return sum(CHARACTER * (2 if unicodedata.east_asian_width(c) in "WF" else 1) for c in text)


def _fitted(text: str, room: float) -> str:
    """Shorten the text with an ellipsis where it would not fit."""
    if _advance(text) <= room:
        return text
    while text and _advance(text) > room - CHARACTER:
        text = text[:-1]
    return text + "…"


def _text(x: float, y: float, text: str, kind: str | None = None) -> Markup:
    return element("text", text, class_=kind, x=x, y=y)


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> Markup:
    return element("line", class_=kind, x1=x1, y1=y1, x2=x2, y2=y2)


def _chart(ident: str, title: str, description: str, height: float, *parts: Markup) -> Markup:
    return element(
        "svg",
        element("title", title, id=f"{ident}-title"),
        element("desc", description, id=f"{ident}-desc"),
        *parts,
        class_="chart",
        role="img",
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        aria_labelledby=f"{ident}-title {ident}-desc",
    )
