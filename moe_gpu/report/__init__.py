"""One HTML file that holds what was run, on what, and what came out; it opens offline and fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_gpu.files import write_atomically
from moe_gpu.report.page import build_page
from moe_gpu.results import Row

__all__ = ["write_report"]


def write_report(
    rows: Sequence[Row], path: str | Path, *, title: str = "moe-gpu report", figures: Sequence[str | Path] | None = None
) -> Path:
    """Write the report of these rows to `path`, whole or not at all; PNG `figures` are put into the file.

    Needs no package beyond moe_gpu. Raises OSError where the file cannot be written or a figure cannot be read.
    """
    pictures = [(Path(figure).name, Path(figure).read_bytes()) for figure in figures or ()]
    write_atomically(path, build_page(rows, title, pictures).encode())
    return Path(path)
