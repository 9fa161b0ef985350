"""Draw the six figures, and the training figure where there is one, from recorded results.

    python scripts/visualize_results.py --results results.jsonl --output figures

Prints the path of every file. Exit status 2, one line and no change to any older file for results that cannot be read
or a folder that cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moe_gpu import plots
from moe_gpu.results import ResultsError, Row, TrainingRow, read_rows, select


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the arguments ask for and return the exit status."""
    parser = _Parser(prog="visualize_results.py", description="Draw figures from recorded results.")
    parser.add_argument("--results", nargs="+", type=Path, required=True, metavar="FILE", help="results files (.jsonl)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the figures")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    try:
        plots.require_matplotlib()
        for path in options.results:
            rows += read_rows(path)
        options.output.mkdir(parents=True, exist_ok=True)
        written = plots.draw_all(rows, options.output)
        if select(rows, TrainingRow):
            written.append(plots.draw_training(rows, options.output / "training_results.png"))
    except (ResultsError, plots.MissingExtraError) as error:
        return _fail(parser, str(error))
    except OSError as error:
        return _fail(parser, f"cannot write to {options.output}: {error.strerror}; choose another --output")
    for path in written:
        print(path)
    return 0


def _fail(parser: argparse.ArgumentParser, message: str) -> int:
    print(f"{parser.prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
