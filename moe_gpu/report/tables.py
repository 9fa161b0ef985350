"""HTML tables that can be sorted, filtered and hovered over, and read without any script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from moe_gpu.plots.data import short


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, hover text and looks; a number carries the value to sort by, empty where unknown."""

    text: str
    tip: str | None = None
    look: str = ""
    value: float | None = None
    numeric: bool = False

    def html(self) -> str:
        looks = " ".join(filter(None, ["n" if self.numeric else "", self.look]))
        attributes = f' class="{looks}"' if looks else ""
        if self.numeric:
            attributes += f' data-v="{"" if self.value is None else repr(self.value)}"'
        if self.tip:
            attributes += f' title="{escape(self.tip)}"'
        return f"<td{attributes}>{escape(self.text)}</td>"


def number(value: float | None, text: str | None = None, tip: str | None = None, look: str = "") -> Cell:
    """A cell for a number, by default in three digits; a dash for None, which is not measured."""
    if value is None:
        return Cell("—", "not measured", look, None, True)
    return Cell(short(value) if text is None else text, tip, look, value, True)


def row(cells: Iterable[Cell], look: str = "") -> str:
    attribute = f' class="{look}"' if look else ""
    return f"<tr{attribute}>{''.join(cell.html() for cell in cells)}</tr>"


def table(head: Sequence[str], rows: Sequence[str], *, classes: str = "sortable") -> str:
    """A table that scrolls sideways on a narrow screen; a name in `head` that begins with # heads numbers."""
    cells = "".join(
        f'<th scope="col" class="n">{escape(name[1:])}</th>'
        if name[0] == "#"
        else f'<th scope="col">{escape(name)}</th>'
        for name in head
    )
    tall = " tall" if len(rows) > 25 else ""
    return (
        f'<div class="scroll{tall}" tabindex="0"><table class="{classes}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
