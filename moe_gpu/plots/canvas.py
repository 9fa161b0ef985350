"""The common look of all figures: colours, page, axes, direct labels, footnotes. Inches and points throughout."""

from __future__ import annotations

import io
import math
import textwrap
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moe_gpu.extras import require
from moe_gpu.files import write_atomically
from moe_gpu.plots.data import BASELINE, OURS, Gap, Run, Series, dtypes, short, short_tokens
from moe_gpu.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe set; the baseline is grey and moe_gpu alone is red.
COLOURS = {
    OURS: "#D1380F",
    BASELINE: "#6B7280",
    "torch_grouped_mm": "#0072B2",
    "transformers_grouped_mm": "#3FA7DC",
    "scattermoe": "#009E73",
    "sonicmoe": "#B8629A",
    "triton_kernels": "#C98A00",
    "transformers_eager": "#7A5230",
    "transformers_batched_mm": "#5B3A8C",
    "bmm": "#1F2328",
    "moe_gpu fp8": "#E8825D",
}
_SPARE_COLOURS = ("#5B3A8C", "#7A5230", "#00696B", "#9A9A00", "#C2185B", "#3F51B5", "#558B2F")
_MARKERS = {OURS: "o", BASELINE: "s", "torch_grouped_mm": "^", "transformers_grouped_mm": "v"}
_SPARE_MARKERS = "DPX<>"
INK, SOFT, GRID = "#1F2328", "#656D76", "#E6E8EB"
_RC = {
    "text.parse_math": False,  # a `$` in a model's name is a letter
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": "#C9CED4",
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "hatch.linewidth": 0.6,
    "hatch.color": "#D5D9DE",
}
NOT_MEASURED = "not measured"


def require_matplotlib() -> Any:
    """The module matplotlib; MissingExtraError in one line where it is not installed."""
    return require("matplotlib", "viz", "plots need")


def styled(draw: Callable[..., Path]) -> Callable[..., Path]:
    """Run a drawing function under the common style, leaving matplotlib's own settings as they were."""
    import functools

    @functools.wraps(draw)
    def run(*arguments: Any, **options: Any) -> Path:
        with require_matplotlib().rc_context({**require_matplotlib().rcParamsDefault, "backend": "agg", **_RC}):
            return draw(*arguments, **options)

    return run


def colour(provider: str) -> str:
    """The provider's colour, the same in every figure; unknown providers take a spare one by their name."""
    return COLOURS.get(provider) or _SPARE_COLOURS[_spare(provider) % len(_SPARE_COLOURS)]


def marker(provider: str) -> str:
    """The provider's marker, the same in every figure."""
    return _MARKERS.get(provider) or _SPARE_MARKERS[_spare(provider) // len(_SPARE_COLOURS) % len(_SPARE_MARKERS)]


def _spare(provider: str) -> int:
    """A number for a name, the same on every machine; names that differ in one letter are far apart."""
    return zlib.crc32(provider.encode())


@dataclass(frozen=True)
class Page:
    """A figure and its grid of axes, `axes[row][column]`; `dpi` keeps tall figures within a viewer's reach."""

    figure: Figure
    axes: list[list[Axes]]
    dpi: float

    def save(self, path: str | Path) -> Path:
        """Write the PNG whole or not at all."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=self.dpi, facecolor="white", metadata={"Software": None})
        write_atomically(path, buffer.getvalue())
        return Path(path)


def page(
    shape: tuple[int, int],
    title: str,
    runs: Sequence[Run],
    *,
    remark: str = "",
    notes: Iterable[str] = (),
    panel: tuple[float, float] | None = None,
    margins: tuple[float, float] = (0.85, 1.0),
) -> Page:
    """A page of `shape` (rows, columns) panels under a title, the line of provenance and a remark, over footnotes.

    panel: width and height of the inside of one panel; margins: left and right of each, all in inches.
    """
    from matplotlib.figure import Figure

    rows, columns = shape
    panel_width, panel_height = panel or ({1: 6.6, 2: 4.0}.get(columns, 3.1), 2.25)
    left, right = margins
    width = max(columns * (left + panel_width + right), 8.4) + 0.2
    head = [
        *((line, 14.0, "bold", INK) for line in _wrap(title, width - 1.5, 14.0)),
        *((line, 8.5, "normal", SOFT) for line in _wrap(provenance(runs), width - 0.5, 8.5)),
        *((line, 8.5, "normal", SOFT) for line in _wrap(remark, width - 0.5, 8.5)),
    ]
    foot = [line for note in notes for line in _wrap(note, width - 0.5, 7.5)]
    top = 0.22 + sum(size * 1.45 / 72 for _, size, _, _ in head) + 0.05
    above, below = 0.55, 0.5
    bottom = 0.18 + len(foot) * 7.5 * 1.45 / 72
    height = top + rows * (above + panel_height + below) + bottom

    figure = Figure(figsize=(width, height))
    y = height - 0.22
    for line, size, weight, ink in head:
        figure.text(0.25 / width, y / height, line, fontsize=size, weight=weight, color=ink, va="top")
        y -= size * 1.45 / 72
    for index, line in enumerate(foot):
        y = bottom - 0.08 - index * 7.5 * 1.45 / 72
        figure.text(0.25 / width, y / height, line, fontsize=7.5, color=SOFT, va="top")
    if any(run.machine and run.machine.device_type == "cpu" for run in runs):
        badge = dict(boxstyle="round,pad=0.4", facecolor="#FFF4D6", edgecolor="#C98A00", linewidth=0.8)
        place: dict[str, Any] = dict(ha="right", va="top", fontsize=10, weight="bold", color="#7A5200")
        figure.text(1 - 0.3 / width, 1 - 0.25 / height, "CPU", bbox=badge, **place)
    axes = []
    for row in range(rows):
        y = height - top - above - panel_height - row * (above + panel_height + below)
        xs = [0.1 + left + column * (left + panel_width + right) for column in range(columns)]
        boxes = [(x / width, y / height, panel_width / width, panel_height / height) for x in xs]
        axes.append([figure.add_axes(box) for box in boxes])
    return Page(figure, axes, dpi=min(130.0, 16000 / height))


def provenance(runs: Sequence[Run]) -> str:
    """Device, date, data types and versions of the runs in one line."""
    rows: list[Row] = [row for run in runs for row in run.rows]
    machines = [run.machine for run in runs if run.machine]
    parts = [" and ".join(dict.fromkeys(run.device for run in runs)) or "device not recorded"]
    parts.append(" and ".join(dict.fromkeys(run.date for run in runs)) or "date not recorded")
    if dtypes(rows):
        parts.append(", ".join(dtypes(rows)))
    parts += dict.fromkeys(f"torch {machine.torch}" for machine in machines)
    for machine in machines[-1:]:
        if machine.commit:
            parts.append(f"commit {machine.commit[:10]}{' + local changes' if machine.commit_dirty else ''}")
    return "   |   ".join(parts)


def gap_notes(found: Sequence[Gap]) -> list[str]:
    """Footnotes: everything that was asked for and has no time, with the reason."""
    return ["Not measured:", *(f"  - {gap.text}" for gap in found)] if found else []


def _wrap(text: str, width: float, size: float) -> list[str]:
    """Lines of at most `width` inches in `size` points; long words, such as paths, are cut."""
    return textwrap.wrap(
        text, max(20, int(width * 72 / (size * 0.58))), subsequent_indent="    " * text.startswith("  ")
    )


def _inches(axis: Axes) -> tuple[float, float]:
    """Width and height of a panel."""
    figure, box = axis.get_figure(root=True), axis.get_position()
    assert figure is not None
    return box.width * figure.get_figwidth(), box.height * figure.get_figheight()


def name_panel(axis: Axes, title: str, detail: str = "") -> None:
    """A bold title with a soft line under it, above the panel."""
    axis.annotate(
        shorten(title, 52), (0, 1), (0, 19 if detail else 7), xycoords="axes fraction", textcoords="offset points",
        fontsize=9.5, weight="bold",
    )  # fmt: skip
    if detail:
        axis.annotate(
            shorten(detail, 72), (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points",
            fontsize=7.5, color=SOFT,
        )  # fmt: skip


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def say_nothing(axis: Axes, why: str, headline: str = NOT_MEASURED) -> None:
    """A hatched, empty panel that says what is not there and why, as far as there is room."""
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    axis.set_facecolor("#FAFBFC")
    axis.patch.set_hatch("//")
    for spine in axis.spines.values():
        spine.set_visible(False)
    width, height = _inches(axis)
    lines = _wrap(why, width * 0.85, 8.5)
    room = max(1, int(height * 0.46 * 72 / (8.5 * 1.45)))
    if len(lines) > room:
        lines = [*lines[: room - 1], f"{lines[room - 1].rstrip()} …"]
    plain: dict[str, Any] = dict(ha="center", bbox=dict(facecolor="#FAFBFC", edgecolor="none", pad=3))
    axis.text(0.5, 0.56, headline, fontsize=12, color=SOFT, weight="bold", va="bottom", **plain)
    axis.text(0.5, 0.5, "\n".join(lines), fontsize=8.5, color=SOFT, va="top", **plain)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers of a log axis: the fewer, the more powers of ten it spans; at most about seven."""
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 0.9 else (1, 2, 5) if decades < 2.2 else (1,)
    every = max(1, math.ceil(decades / 7)) if len(steps) == 1 else 1
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**exponent for exponent in exponents if exponent % every == 0 for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def log_y(axis: Axes, values: Sequence[float], label: Callable[[float], str] = short) -> None:
    """A log axis around the values, with round ticks."""
    low, high = min(values), max(values)
    pad = max((high / low) ** 0.08, 1.25)
    axis.set_yscale("log")
    axis.set_ylim(low / pad, high * pad)
    ticks = log_ticks(low / pad, high * pad)
    if len(ticks) < 2:
        ticks = [low, high] if high > low * 1.1 else [low]
    axis.set_yticks(ticks, [label(tick) for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.grid(axis="y")


def log_x(axis: Axes, counts: Sequence[int], label: Callable[[int], str] = short_tokens) -> None:
    """A log axis whose ticks are the counts that were run, thinned where labels would touch."""
    low, high = min(counts), max(counts)
    pad = max((high / low) ** 0.06, 1.15) if high > low else 1.6
    axis.set_xscale("log")
    axis.set_xlim(low / pad, high * pad)
    room = _inches(axis)[0] / math.log(high / low * pad**2)
    ticks: list[int] = []
    for count in sorted(set(counts)):
        if not ticks or math.log(count / ticks[-1]) * room > 0.3:
            ticks.append(count)
    axis.set_xticks(ticks, [label(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(axis="x")


def draw_line(
    axis: Axes,
    series: Series,
    points: Mapping[float, float],
    asked: Iterable[float],
    whiskers: Mapping[float, tuple[float, float]],
) -> None:
    """One provider's line, broken where a point was asked for and not measured; moe_gpu stands out.

    whiskers: low and high end at each point.
    """
    ours = series.provider == OURS
    xs = sorted({*asked, *points})
    ys = [points.get(x, math.nan) for x in xs]
    replayed = series.launch != "eager"
    style: dict[str, Any] = dict(
        color=colour(series.provider),
        linewidth=2.4 if ours else 1.4,
        marker=marker(series.provider),
        markersize=5.5 if ours else 4,
        markerfacecolor="white" if replayed else colour(series.provider),
        linestyle=(0, (4, 1.5)) if replayed else "-",
        zorder=5 if ours else 3,
    )
    axis.plot(xs, ys, **style)
    if whiskers:
        at = [x for x in xs if x in points and x in whiskers]
        ends = [[points[x] - whiskers[x][0] for x in at], [whiskers[x][1] - points[x] for x in at]]
        # A median lies between its percentiles; a hair below zero is rounding.
        ends = [[max(0.0, end) for end in side] for side in ends]
        bars = dict(color=style["color"], elinewidth=1, capsize=2, capthick=1, zorder=style["zorder"])
        axis.errorbar(at, [points[x] for x in at], yerr=ends, fmt="none", **bars)


class End(NamedTuple):
    """The end of a line and its name."""

    text: str
    ink: str
    x: float
    y: float
    bold: bool = False


def label_ends(axis: Axes, ends: Sequence[End], size: float = 7.5) -> None:
    """Names beside the right edge, moved apart, each tied to the end of its line."""
    step = size * 1.35 / 72 / _inches(axis)[1]
    to_axes = axis.transData + axis.transAxes.inverted()
    wanted = sorted((to_axes.transform((end.x, end.y))[1], end) for end in ends)
    heights = _within(_apart([min(max(position, 0.0), 1.0) for position, _ in wanted], step), step)
    for y_label, (_, end) in zip(heights, wanted, strict=True):
        axis.annotate(
            "", (end.x, end.y), (1.035, y_label), textcoords="axes fraction", annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=end.ink, linewidth=0.6, alpha=0.55, shrinkA=0, shrinkB=3),
        )  # fmt: skip
        axis.text(
            1.04, y_label, shorten(end.text, 34), transform=axis.transAxes, va="center",
            fontsize=size, color=end.ink, weight="bold" if end.bold else "normal",
        )  # fmt: skip


def _apart(positions: Sequence[float], step: float) -> list[float]:
    """The positions, in rising order, moved as little as can be (in squares) until neighbours are `step` apart."""
    groups: list[tuple[float, int]] = []  # mean of position - index * step, and how many
    for index, position in enumerate(positions):
        mean, count = position - index * step, 1
        while groups and groups[-1][0] > mean:
            other, others = groups.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        groups.append((mean, count))
    means = [mean for mean, count in groups for _ in range(count)]
    return [mean + index * step for index, mean in enumerate(means)]


def _within(heights: Sequence[float], step: float) -> list[float]:
    """Heights `step` apart, moved down below 1 and, where there is room, up above 0, still as far apart."""
    last = len(heights) - 1
    lowered = [min(height, 1.0 - (last - index) * step) for index, height in enumerate(heights)]
    return [max(height, min(0.0, 1.0 - last * step) + index * step) for index, height in enumerate(lowered)]


def label_margin(labels: Iterable[str], size: float = 7.5) -> float:
    """Inches that the longest of the labels needs on the right of a panel."""
    longest = max((min(len(label), 34) for label in labels), default=0)
    return 0.35 + longest * size * 0.6 / 72
