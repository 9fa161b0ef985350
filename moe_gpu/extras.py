"""Packages that only an extra of moe-gpu installs: imported where they are used, missed in one line."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A package that only an extra installs is missing; the message names the extra."""


def require(module: str, extra: str, what: str) -> Any:
    """The module; MissingExtraError in one line, saying that `what` needs it, where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise MissingExtraError(f"{what} {package}, which is not installed: pip install 'moe-gpu[{extra}]'") from error
