"""Figures of a layer's load from the counts in a JobStatus: those of ExpertSnapshot, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_gpu.config import COLD, HOT
from moe_gpu.live.status import JobStatus, LayerLoad


@dataclass(frozen=True)
class LoadFigures:
    """Of a window's routes: load_E is each expert's over an even share; the rest as in ExpertSnapshot."""

    load_E: list[float]
    active_experts: int
    max_over_mean: float
    normalised_entropy: float | None
    hot: list[int]
    cold: list[int]


def load_figures(routes_E: Sequence[int]) -> LoadFigures | None:
    """The figures of a window; None where it holds no route."""
    total, num_experts = sum(routes_E), len(routes_E)
    if total <= 0:
        return None
    load_E = [routes * num_experts / total for routes in routes_E]
    nats = -sum(routes / total * math.log(routes / total) for routes in routes_E if routes > 0)
    return LoadFigures(
        load_E,
        sum(routes > 0 for routes in routes_E),
        max(load_E),
        nats / math.log(num_experts) if num_experts > 1 else None,
        [expert for expert, load in enumerate(load_E) if load > HOT],
        [expert for expert, load in enumerate(load_E) if load < COLD],
    )


def figures_of(layer: LayerLoad) -> LoadFigures | None:
    """The figures of a layer's window; None where nothing has been counted in it."""
    return None if layer.window_E is None else load_figures(layer.window_E)


def tokens_per_s(layer: LayerLoad) -> float | None:
    """Tokens that a layer met each second of its window; None where top_k or the window is not known."""
    if layer.window_E is None or not layer.window_s or not layer.top_k:
        return None
    return sum(layer.window_E) / layer.top_k / layer.window_s


def job_tokens_per_s(status: JobStatus) -> float | None:
    """Tokens a second of the layer that meets most; else what the job says itself."""
    found = [rate for rate in map(tokens_per_s, status.layers) if rate is not None]
    if found:
        return max(found)
    return None if status.progress is None else status.progress.tokens_per_s


def tokens_of(layers: Sequence[LayerLoad]) -> int | None:
    """Tokens since counting began, of the layer that met most; None where top_k or counts are not known."""
    return max((sum(one.counts_E) // one.top_k for one in layers if one.counts_E and one.top_k), default=None)


def summary(status: JobStatus) -> dict[str, Any]:
    """The status as plain values for JSON, with its state and the figures that follow from the counts."""
    told = asdict(status)
    for layer, into in zip(status.layers, told["layers"], strict=True):
        found = figures_of(layer)
        into["tokens_per_s"] = tokens_per_s(layer)
        into["figures"] = None if found is None else asdict(found)
    derived = {"state": status.state, "tokens_per_s": job_tokens_per_s(status), "tokens": tokens_of(status.layers)}
    if status.energy is not None:
        told["energy"]["j_per_1000_tokens"] = status.energy.j_per_1000_tokens
    return {**derived, **told}
