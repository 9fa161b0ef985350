"""Figures of expert load and of training runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_gpu.plots.canvas import End, label_ends, name_panel, page, say_nothing, styled
from moe_gpu.plots.data import (
    COLD,
    HOT,
    Load,
    expert_loads,
    notable,
    relative_load,
    short,
    split_runs,
    times,
    training_runs,
)
from moe_gpu.results import Row, TrainingRow, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNUSED = (0.12, 0.14, 0.16, 1.0)
_ABSENT = (1.0, 1.0, 1.0, 0.0)
_LIMIT = 2.0  # log2 of the share over an even share, at both ends of the colours
_RUN_COLOURS = ("#0072B2", "#D1380F", "#009E73", "#C98A00", "#5B3A8C", "#B8629A", "#7A5230")
_LAYERS_OVER_TIME = 2


@styled
def draw_expert_utilization(rows: Sequence[Row], path: str | Path) -> Path:
    """Share of every expert in every layer, and over windows for the most uneven layers, against an even share."""
    loads, runs = expert_loads(rows), split_runs(rows)
    if not loads:
        blank = page((1, 1), "Load of every expert", runs)
        say_nothing(blank.axes[0][0], "These results hold no expert_load rows with counts.")
        return blank.save(path)
    columns = 1 + max(min(_LAYERS_OVER_TIME, len(load.layers)) if len(load.windows) > 1 else 0 for load in loads)
    tallest = max(max(len(load.layers), 4) for load in loads)
    height = min(4.5, max(2.2, 0.22 * tallest))
    sheet = page(
        (len(loads), columns),
        _busiest(loads) or "Load of every expert",
        runs,
        remark="Share of a layer's routes over an even share (1x), on a log scale; black: an expert without any route.",
        notes=[note for load in loads for note in _notes(load)],
        panel=({1: 6.6, 2: 4.4}.get(columns, 3.6), height),
        margins=(0.7, 0.75),
    )
    for axes, load in zip(sheet.axes, loads, strict=True):
        uneven = sorted(load.layers, key=lambda layer: -max(load.relative(layer) or [0.0]))
        shown = uneven if len(load.windows) > 1 else []
        for axis, layer in zip(axes[1:], shown, strict=False):
            _over_windows(axis, load, layer)
        for axis in axes[1 + len(shown) :]:
            axis.set_axis_off()
        if not shown:  # the sum over windows takes the whole line
            left, right = axes[0].get_position(), axes[-1].get_position()
            axes[0].set_position((left.x0, left.y0, right.x1 - left.x0, left.height))
        _layers(axes[0], load)
    return sheet.save(path)


@styled
def draw_training(rows: Sequence[Row], path: str | Path) -> Path:
    """Four panels: loss, expert shares over windows, balance of the load, tokens a second.

    Raises ValueError where there are no training rows.
    """
    trained, runs = training_runs(rows), split_runs(rows)
    if not trained:
        raise ValueError("no training rows to draw; record some with `moe-gpu train`")
    label = max(len(name) for name in trained) if len(trained) > 1 else 0
    sheet = page(
        (2, 2),
        _learned(trained) or "Training",
        runs,
        remark=_training_remark(trained),
        panel=(4.3, 2.5),
        margins=(0.75, 1.15 + 0.065 * label),
    )
    (loss, load), (balance, speed) = sheet.axes
    losses = {"train": "loss", "held-out": "eval_loss"}
    _over_steps(loss, trained, losses, "Loss", "nats a token")
    _shares_in_training(load, rows)
    shares = {"busiest": "max_expert_share", "entropy": "normalised_entropy"}
    remark = "entropy: 1 when even; the busiest expert's share: 1 / E when even"
    _over_steps(balance, trained, shares, "Balance of the load", remark, (0, 1.05))
    _over_steps(speed, trained, {"": "tokens_per_s"}, "Speed", "tokens/s", (0, None))
    return sheet.save(path)


def _busiest(loads: Sequence[Load]) -> str | None:
    """The most loaded expert of all, in one sentence."""
    found = [(standing.busiest, load.source) for load in loads if (standing := notable(load))]
    if not found:
        return None
    (ratio, layer, expert), source = max(found)
    return f"The busiest expert takes {times(ratio)} an even share (layer {layer}, expert {expert}, {source})"


def _notes(load: Load) -> list[str]:
    """Hot, cold and unused experts of a source, counted; the unused are named."""
    found = notable(load)
    if not found:
        return [f"{load.source}: no route at all."]
    names = ", ".join(f"{at.layer}.{at.expert}" for at in found.unused[:20])
    names += f" and {len(found.unused) - 20} more" if len(found.unused) > 20 else ""
    text = f"{load.source}: {len(load.layers)} layers of {load.num_experts} experts; {len(found.hot)} above {HOT:g}x"
    return [f"{text}, {len(found.cold)} below {COLD:g}x; without any route (layer.expert): {names or 'none'}."]


def _image(axis: Axes, relative: Sequence[Sequence[float] | None], num_experts: int, *, upright: bool) -> None:
    """Relative loads as colours, one list of experts after another; None is left white. Upright: experts go up."""
    import matplotlib
    import numpy

    colours = matplotlib.colormaps["PuOr_r"]
    pixels = numpy.empty((len(relative), num_experts, 4))
    for index, shares in enumerate(relative):
        for expert in range(num_experts):
            if shares is None:
                pixels[index, expert] = _ABSENT
            elif shares[expert] == 0:
                pixels[index, expert] = _UNUSED
            else:
                pixels[index, expert] = colours(0.5 + math.log2(shares[expert]) / (2 * _LIMIT))
    if upright:
        pixels = pixels.swapaxes(0, 1)
    axis.imshow(pixels, aspect="auto", interpolation="nearest", origin="lower" if upright else "upper")
    for spine in axis.spines.values():
        spine.set_visible(False)


def _scale(axis: Axes) -> None:
    """The colour scale on the right of a panel."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = axis.get_figure(root=True)
    assert figure is not None
    shades = ScalarMappable(Normalize(-_LIMIT, _LIMIT), matplotlib.colormaps["PuOr_r"])
    width = axis.get_position().width * figure.get_figwidth()
    bar = figure.colorbar(shades, cax=axis.inset_axes((1 + 0.08 / width, 0.0, 0.1 / width, 1.0)))
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4x", "1/2x", "1x", "2x", "4x"])
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _layers(axis: Axes, load: Load) -> None:
    _image(axis, [load.relative(layer) for layer in load.layers], load.num_experts, upright=False)
    step = max(1, math.ceil(len(load.layers) / 16))
    axis.set_yticks(range(0, len(load.layers), step), [str(layer) for layer in load.layers[::step]])
    axis.set_xticks(range(0, load.num_experts, max(1, math.ceil(load.num_experts / 8))))
    axis.set_xlabel("expert", labelpad=2)
    axis.set_ylabel("layer")
    windows = "one window" if len(load.windows) == 1 else f"sum of {len(load.windows)} windows"
    name_panel(axis, load.source, f"{load.device} · {windows}")
    _scale(axis)


def _over_windows(axis: Axes, load: Load, layer: int) -> None:
    shares = [relative_load(load.counts[layer].get(window, [])) for window in load.windows]
    _image(axis, shares, load.num_experts, upright=True)
    step = max(1, math.ceil(len(load.windows) / 8))
    axis.set_xticks(range(0, len(load.windows), step), [str(window) for window in load.windows[::step]])
    axis.set_yticks(range(0, load.num_experts, max(1, math.ceil(load.num_experts / 8))))
    axis.set_xlabel("window", labelpad=2)
    axis.set_ylabel("expert")
    name_panel(axis, f"Layer {layer} over time", load.source)
    _scale(axis)


def _shares_in_training(axis: Axes, rows: Sequence[Row]) -> None:
    """Experts of all layers of the training run over windows; the load with the most windows if none is called so."""
    loads = [load for load in expert_loads(rows) if load.windows]
    names = {row.run for row in select(rows, TrainingRow)} | {"training"}
    named = [load for load in loads if load.source in names or load.source.startswith("train")]
    if not named:
        say_nothing(axis, "No expert_load rows come from training.")
        name_panel(axis, "Load of every expert")
        return
    load = max(named, key=lambda load: len(load.windows))
    shares: list[list[float] | None] = []
    height = len(load.layers) * load.num_experts
    for window in load.windows:
        stack: list[float] = []
        for layer in load.layers:
            stack += relative_load(load.counts[layer].get(window, [])) or [math.nan] * load.num_experts
        shares.append(None if any(map(math.isnan, stack)) else stack)
    _image(axis, shares, height, upright=True)
    step = max(1, math.ceil(len(load.windows) / 10))
    axis.set_xticks(range(0, len(load.windows), step), [str(window) for window in load.windows[::step]])
    middles = [(index + 0.5) * load.num_experts - 0.5 for index in range(len(load.layers))]
    axis.set_yticks(middles, [f"layer {layer}" for layer in load.layers])
    for index in range(1, len(load.layers)):
        axis.axhline(index * load.num_experts - 0.5, color="white", linewidth=2)
    axis.set_xlabel("window", labelpad=2)
    detail = f"{load.num_experts} experts a layer; share over an even share; black: no route"
    name_panel(axis, "Load of every expert", detail)
    _scale(axis)


def _over_steps(
    axis: Axes,
    trained: dict[str, list[TrainingRow]],
    fields: dict[str, str],
    title: str,
    detail: str,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """Fields of training rows over steps: the first drawn solid, the second dashed; a colour for each run."""
    ends = []
    for number, (run, steps) in enumerate(trained.items()):
        ink = _RUN_COLOURS[number % len(_RUN_COLOURS)]
        for index, (name, field) in enumerate(fields.items()):
            points = [(row.step, getattr(row, field)) for row in steps if getattr(row, field) is not None]
            if points:
                style: dict[str, Any] = dict(linestyle=("-", "--")[index], linewidth=(1.8, 1.5)[index])
                if len(points) <= 12:
                    style.update(marker="o", markersize=4)
                line_ink = ink if len(trained) > 1 else _RUN_COLOURS[index]
                axis.plot(*zip(*points, strict=True), color=line_ink, **style)
                value = short(points[-1][1])
                label = " ".join(part for part in (run if len(trained) > 1 else "", name, value) if part)
                ends.append(End(label, line_ink, *points[-1]))
    name_panel(axis, title, detail)
    if not ends:
        say_nothing(axis, f"No row carries {' or '.join(fields.values())}.")
        return
    axis.grid(axis="both")
    axis.set_xlabel("step", labelpad=2)
    axis.margins(x=0.02, y=0.1)
    low, high = axis.get_ylim()
    axis.set_ylim(low if limits[0] is None else limits[0], high if limits[1] is None else limits[1])
    label_ends(axis, ends)


def _learned(trained: dict[str, list[TrainingRow]]) -> str | None:
    """How far the loss fell, for a single run."""
    if len(trained) > 1:
        return None
    ((_, steps),) = trained.items()
    kind, losses = "held-out", [(row.step, row.eval_loss) for row in steps if row.eval_loss is not None]
    if len(losses) < 2:
        kind, losses = "training", [(row.step, row.loss) for row in steps]
    if len(losses) < 2:
        return None
    (first, before), (last, after) = losses[0], losses[-1]
    verb = "falls" if after < before else "rises"
    return f"The {kind} loss {verb} from {before:.2f} (step {first}) to {after:.2f} (step {last})"


def _training_remark(trained: dict[str, list[TrainingRow]]) -> str:
    parts = []
    for run, steps in trained.items():
        backend = f", backend {steps[-1].backend}" if steps[-1].backend else ""
        parts.append(f"run {run}: {steps[-1].tokens_seen:,} tokens in {steps[-1].elapsed_s:.0f} s{backend}")
    return "; ".join(parts)
