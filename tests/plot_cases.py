"""What the tests of plots share: rows, and a fixture that reads every figure that is saved."""

from __future__ import annotations

import struct

import pytest

from moe_gpu.plots import canvas
from tests.result_rows import benchmark_row


@pytest.fixture(name="texts")
def texts_of_figures(monkeypatch):
    """Every text of the figures that were saved, and their axes by panel title."""
    seen = Seen()
    save = canvas.Page.save

    def spy(page, path):
        seen.read(page)
        return save(page, path)

    monkeypatch.setattr(canvas.Page, "save", spy)
    return seen


class Seen:
    def __init__(self):
        self.words, self.panels, self.label_boxes = [], [], []

    def read(self, page):
        import matplotlib.text

        page.figure.canvas.draw()
        self.words = [text.get_text() for text in page.figure.findobj(matplotlib.text.Text) if text.get_text()]
        self.panels = [axis for line in page.axes for axis in line]
        self.page_box = page.figure.bbox.frozen()
        # Now, not after saving, which has another resolution.
        self.label_boxes = [
            [text.get_window_extent() for text in axis.texts if text.get_position()[0] > 1 and text.get_text()]
            for axis in self.panels
        ]

    @property
    def all(self):
        """Every text in one line, however it was wrapped."""
        return " ".join(" ".join(self.words).split())


def small_rows(**changes):
    """Two providers over three sizes."""
    rows = []
    for tokens in (1, 8, 64):
        rows.append(benchmark_row("torch_loop", tokens, 4.0 * tokens**0.5, **changes))
        rows.append(benchmark_row("moe_gpu", tokens, 2.0 * tokens**0.5, **changes))
    return rows


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])
