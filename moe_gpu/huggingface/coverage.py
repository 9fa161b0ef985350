"""CoverageReport: which experts modules of a model are served, by what, and why the others are not."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModuleCoverage:
    """One module with experts.

    layout: sizes and how the weights are stored, None where they were not understood. backend: `triton` or `reference`;
    how: the path through it, and why this backend. why_not: the reason where the module is not served, and `backend` is
    None. layer_index: the module's layer in a profiler.
    """

    module: str
    layout: str | None
    backend: str | None
    how: str | None = None
    why_not: str | None = None
    layer_index: int | None = None

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
        return "\n".join([*lines, f"{len(self.covered)} of {len(self.modules)} modules with experts are served"])
