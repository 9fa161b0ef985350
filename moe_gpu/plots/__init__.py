"""Figures from recorded results, as PNG; only rows of `moe_gpu.results` go in. Needs the extra `moe-gpu[viz]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_gpu.extras import MissingExtraError
from moe_gpu.plots.canvas import require_matplotlib
from moe_gpu.plots.experts import draw_expert_utilization, draw_training
from moe_gpu.plots.speed import draw_ablation, draw_energy, draw_scaling, draw_throughput, draw_utilization
from moe_gpu.results import Row

FIGURES = {
    "throughput_comparison.png": draw_throughput,
    "gpu_utilization.png": draw_utilization,
    "energy_efficiency.png": draw_energy,
    "expert_utilization_heatmap.png": draw_expert_utilization,
    "ablation_study.png": draw_ablation,
    "scaling_analysis.png": draw_scaling,
}

__all__ = ["FIGURES", "MissingExtraError", "draw_all", "draw_training", "require_matplotlib"]
__all__ += [draw.__name__ for draw in FIGURES.values()]


def draw_all(rows: Sequence[Row], output_dir: str | Path) -> list[Path]:
    """Write the six figures into an existing folder; what the rows do not hold is drawn as "not measured".

    Raises MissingExtraError without matplotlib, OSError where the folder cannot be written.
    """
    return [draw(rows, Path(output_dir) / name) for name, draw in FIGURES.items()]
