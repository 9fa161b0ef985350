"""What the training examples share: their options, and mistakes answered in one line with exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from moe_gpu.training import TrainConfig


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text before an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def training_options(description: str) -> OneLineParser:
    """The options of every training example."""
    parser = OneLineParser(description=description)
    parser.add_argument("--steps", type=int, help="optimiser steps; default: about a minute's worth")
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text; default: prose shipped with Python")
    parser.add_argument("--output-dir", type=Path, default=Path("moe-gpu-output"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    return parser


def training_config(options: argparse.Namespace) -> TrainConfig:
    """The run that suits the device, with what the options change."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    changes: dict[str, Any] = {"steps": options.steps, "seed": options.seed}
    changes["data"] = tuple(options.data) if options.data else None
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(TrainConfig.for_device(device), **changes)


def run(main: Callable[[], None]) -> NoReturn:
    """Exit with 0, with 2 after one line for a mistake, or with 130 after Ctrl-C."""
    try:
        main()
    except (ValueError, ImportError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"{Path(sys.argv[0]).name}: {interrupt or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
