"""What a person at a terminal sees: a progress bar on stderr, and a load as a character and a colour."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`: how far a piece of work is."""

# Load over an even share, and how it is drawn: the character tells it without colours.
SHADES = (
    (0.0, "·", "dim"),
    (0.5, "░", "#4a7bd0"),
    (1.0, "▒", "#3fb8c8"),
    (2.0, "▓", "#e0af3a"),
    (float("inf"), "█", "#e5534b"),
)


def shade(load: float) -> tuple[str, str]:
    """The character and the style of a load over an even share."""
    return next((mark, style) for limit, mark, style in SHADES if load <= limit)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A progress bar with time left on stderr; where stderr is no terminal, one line for each tenth of the work."""
    if not sys.stderr.isatty():
        yield _plain_progress(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[title]}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, title=title)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _plain_progress(title: str) -> Progress:
    printed = -1

    def report(done: int, total: int, what: str) -> None:
        nonlocal printed
        tenth = 10 * done // max(total, 1)
        if tenth > printed:
            printed = tenth
            print(f"{title}: {done}/{total} {what}".rstrip(), file=sys.stderr, flush=True)

    return report
