"""CoverageReport: which experts modules of a model are served, by what, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from moe_gpu.model import Feature


@dataclass(frozen=True)
class ModuleCoverage:
    """One module with experts.

    layout: sizes and how the weights are stored, None where they were not understood. backend: `triton` or `reference`;
    how: the path through it, and why this backend. why_not: the reason where the module is not served, and `backend` is
    None. layer_index: the module's layer in a profiler. features: what each flag came to, as of AdvancedMoELayer.
    """

    module: str
    layout: str | None
    backend: str | None
    how: str | None = None
    why_not: str | None = None
    layer_index: int | None = None
    features: Mapping[str, Feature] = field(default_factory=dict)

    @property
    def covered(self) -> bool:
        return self.backend is not None


@dataclass(frozen=True)
class CoverageReport:
    """What `enable` found; `str(report)` is a table, a line for each module with experts."""

    modules: tuple[ModuleCoverage, ...]

    @property
    def covered(self) -> tuple[ModuleCoverage, ...]:
        return tuple(module for module in self.modules if module.covered)

    @property
    def not_covered(self) -> tuple[ModuleCoverage, ...]:
        return tuple(module for module in self.modules if not module.covered)

    def to_dict(self) -> dict[str, object]:
        """For JSON: `modules`, each with the fields of ModuleCoverage, and how many are covered."""
        return {"covered": len(self.covered), "modules": [asdict(module) for module in self.modules]}

    def __str__(self) -> str:
        header = ("module", "backend", "layout", "how, or why not")
        rows = [
            (m.module, m.backend or "not covered", m.layout or "-", m.how or m.why_not or "-") for m in self.modules
        ]
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
            for row in [header, *rows]
        ]
        lines += self._flags()
        return "\n".join([*lines, f"{len(self.covered)} of {len(self.modules)} modules with experts are served"])

    def _flags(self) -> list[str]:
        """A line for each outcome of a flag that was asked for, with its modules' number; backends stand above."""
        found: dict[tuple[str, bool, str], int] = {}
        for module in self.covered:
            for name, feature in module.features.items():
                if feature.asked and name != "triton":
                    outcome = name, feature.active, "" if name == "profiler" else feature.reason
                    found[outcome] = found.get(outcome, 0) + 1
        return [
            f"{name}: {'on' if active else 'not on'} in {count} of {len(self.covered)}{reason and f': {reason}'}"
            for (name, active, reason), count in found.items()
        ]
