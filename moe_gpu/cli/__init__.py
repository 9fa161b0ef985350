"""The command `moe-gpu`: `commands.py` has its entry and the plain commands; a group of them has its own file."""

from moe_gpu.cli.commands import app, main

__all__ = ["app", "main"]
