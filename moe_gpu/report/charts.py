"""Charts as inline SVG: lines on log or linear axes, bands, bars, heat maps. The style sheet has the colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from moe_gpu.plots.canvas import log_ticks
from moe_gpu.plots.data import short, times

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 34
MARKS = (
    "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "M-3.5,-3.5h7v7h-7z",
    "M0,-4.5L4.5,3.5H-4.5z",
    "M0,4.5L4.5,-3.5H-4.5z",
    "M0,-5L4.5,0L0,5L-4.5,0z",
)


@dataclass(frozen=True)
class Line:
    """A line: points with their hover text, whiskers, and the classes that give it colour and dash."""

    classes: str
    mark: int
    points: Sequence[tuple[float, float]]
    tips: list[str]
    whiskers: Sequence[tuple[float, float, float]] = field(default_factory=list)  # x, low, high
    asked: Sequence[float] = field(default_factory=list)  # the line breaks at an x that was asked for and has no point
    marked: bool = True


def line_chart(
    lines: Sequence[Line],
    x_label: str,
    *,
    log: bool = True,
    x_text: Callable[[float], str] = short,
    x_ticks: Sequence[float] | None = None,
    title: str,
) -> str:
    """An SVG of the lines; every point carries its hover text. There must be at least one point.

    x_ticks: where the axis is labelled, as far as there is room; by default at round numbers.
    """
    xs = sorted({x for line in lines for x, _ in line.points} | {x for line in lines for x in line.asked})
    ys = [y for line in lines for _, y in line.points] + [
        end for line in lines for _, *ends in line.whiskers for end in ends
    ]
    x_axis = _Axis(xs[0], xs[-1], _LEFT + 8, WIDTH - _RIGHT - 8, log)
    low, high = (min(ys), max(ys)) if log else (min(0.0, *ys), max(ys))
    y_axis = _Axis(low, high, HEIGHT - _BOTTOM - 4, _TOP + 4, log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(short(tick))}</text>')
    last = -math.inf
    for tick in x_axis.ticks() if x_ticks is None else x_ticks:
        x = x_axis.at(tick)
        if x - last > 30:
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{escape(x_text(tick))}</text>')
            last = x
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for line in lines:
        parts += _draw(line, x_axis, y_axis)
    return "".join([*parts, "</svg>"])


def _draw(line: Line, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    at = dict(line.points)
    path, pen = [], "M"
    for x in sorted({*line.asked, *at}):
        if x in at:
            path.append(f"{pen}{x_axis.at(x):.1f},{y_axis.at(at[x]):.1f}")
        pen = "L" if x in at else "M"
    parts = [f'<g class="{line.classes}"><path class="line {line.classes}" d="{"".join(path)}"/>']
    for x, low, high in line.whiskers:
        across = f'x1="{x_axis.at(x):.1f}" x2="{x_axis.at(x):.1f}"'
        parts.append(f'<line class="whisker" {across} y1="{y_axis.at(low):.1f}" y2="{y_axis.at(high):.1f}"/>')
    for (x, y), tip in zip(line.points, line.tips, strict=True):
        shape = MARKS[line.mark] if line.marked else "M-4,-8h8v16h-8z"
        look = f"mark {line.classes}" if line.marked else "spot"
        place = f"translate({x_axis.at(x):.1f},{y_axis.at(y):.1f})"
        parts.append(f'<path class="{look}" d="{shape}" transform="{place}"><title>{escape(tip)}</title></path>')
    return [*parts, "</g>"]


class _Axis:
    """Values to pixels, on a log or a linear scale."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
        self._low, self._high, self._start, self._end, self._log = low, high, start, end, log

    def at(self, value: float) -> float:
        low, high = self._low, self._high
        share = math.log(value / low) / math.log(high / low) if self._log else (value - low) / (high - low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self._log:
            return log_ticks(self._low, self._high) or [self._low, self._high]
        step = 10.0 ** math.floor(math.log10((self._high - self._low) / 2))
        step *= next(factor for factor in (1, 2, 5, 10) if (self._high - self._low) / (step * factor) <= 6)
        first = math.ceil(self._low / step)
        return [index * step for index in range(first, math.floor(self._high / step) + 1)]


def band_chart(
    steps: Sequence[Sequence[int] | None],
    whole: int,
    classes: Sequence[str],
    names: Sequence[str],
    changes: Sequence[tuple[int, str]],
    *,
    title: str,
) -> str:
    """An SVG of how `whole` is divided, step by step; None: not at all. Steps that are alike are one rectangle.

    changes: steps with a mark and its hover text.
    """
    x_axis = _Axis(0, len(steps), _LEFT, WIDTH - _RIGHT, log=False)
    y_axis = _Axis(0, whole, HEIGHT - _BOTTOM, _TOP + 10, log=False)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in (0, whole):
        parts.append(f'<text x="{_LEFT - 5}" y="{y_axis.at(tick) + 4:.1f}" text-anchor="end">{tick}</text>')

    def box(look: str, begin: int, end: int, low: int, high: int, tip: str) -> str:
        place = f'x="{x_axis.at(begin):.1f}" y="{y_axis.at(high):.1f}"'
        size = f'width="{x_axis.at(end) - x_axis.at(begin):.1f}" height="{y_axis.at(low) - y_axis.at(high):.1f}"'
        return f'<rect class="{look}" {place} {size}><title>{escape(tip)}</title></rect>'

    begin = 0
    while begin < len(steps):
        division, end = steps[begin], begin + 1
        while end < len(steps) and steps[end] == division:
            end += 1
        when = f"steps {begin} to {end - 1}" if end - begin > 1 else f"step {begin}"
        if division is None:
            parts.append(box("whole", begin, end, 0, whole, f"{when}: not sliced"))
        low = 0
        for look, name, part in zip(classes, names, division or (), strict=False):
            parts.append(box(f"band {look}", begin, end, low, low + part, f"{name}: {part} SMs\n{when}"))
            low += part
        begin = end
    for step, tip in changes:
        place = f"translate({x_axis.at(step):.1f},{_TOP + 3})"
        parts.append(f'<path class="change" d="M-4,-4h8L0,4z" transform="{place}"><title>{escape(tip)}</title></path>')
    for at in x_axis.ticks():
        x = x_axis.at(at)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{escape(short(at))}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return "".join([*parts, "</svg>"])


def bar_chart(bars: Sequence[tuple[str, str, float, str, str]], *, title: str) -> str:
    """An SVG of horizontal bars from zero: a name, classes, a value above 0, its text and its hover text each."""
    height, most = 34, max(value for _, _, value, _, _ in bars)
    parts = [f'<svg viewBox="0 0 {WIDTH} {len(bars) * height}" role="img" aria-label="{escape(title)}">']
    for index, (name, look, value, text, tip) in enumerate(bars):
        y, width = index * height, (WIDTH - 80) * value / most
        parts.append(f'<text x="0" y="{y + 12}">{escape(name)}</text>')
        parts.append(
            f'<rect class="band {look}" x="0" y="{y + 16}" width="{width:.1f}" height="12"><title>{escape(tip)}</title>'
            f'</rect><text x="{width + 5:.1f}" y="{y + 26}">{escape(text)}</text>'
        )
    return "".join([*parts, "</svg>"])


def heat_map(rows: Sequence[tuple[str, Sequence[float] | None]], *, x_label: str, tip: str, title: str) -> str:
    """An SVG of loads as multiples of an even share, a named row each; None leaves the row empty.

    tip: a format with `row`, `column` and `load`. Hot cells are filled with one colour and cold ones with another,
    more strongly the further from even (full at 4x and 1/4x); a cell without any route is filled with ink.
    """
    columns = max((len(loads) for _, loads in rows if loads), default=1)
    left = 12 + 7 * max((len(name) for name, _ in rows), default=1)
    width = 760
    cell = (width - 10 - left) / columns
    height = min(24.0, max(7.0, cell))
    skip = max(1, math.ceil(13 / height))
    parts = [f'<svg viewBox="0 0 {width} {len(rows) * height + 34:.0f}" role="img" aria-label="{escape(title)}">']
    for index, (name, loads) in enumerate(rows):
        y = index * height
        if index % skip == 0:
            parts.append(f'<text x="{left - 5}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for column, load in enumerate(loads or ()):
            text = escape(tip.format(row=name, column=column, load=times(load) if load else "no route"))
            parts.append(
                f'<rect x="{left + column * cell:.2f}" y="{y:.1f}" width="{cell - 0.4:.2f}" height="{height - 0.4:.1f}"'
                f" {_shade(load)}><title>{text}</title></rect>"
            )
    step = max(1, math.ceil(30 / cell))
    bottom = len(rows) * height
    for column in range(0, columns, step):
        x = left + (column + 0.5) * cell
        parts.append(f'<text x="{x:.1f}" y="{bottom + 13:.0f}" text-anchor="middle">{column}</text>')
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{bottom + 29:.0f}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join([*parts, "</svg>"])


def _shade(load: float) -> str:
    if load == 0:
        return 'class="dead"'
    distance = math.log2(load) / 2
    return f'class="{"hot" if distance > 0 else "cold"}" fill-opacity="{min(1.0, abs(distance)):.2f}"'
