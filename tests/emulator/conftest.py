"""Kernels on the emulator; fresh memory is NaN as on the interpreter, so an element not written shows."""

from tests.interpreter.conftest import poisoned_memory

__all__ = ["poisoned_memory"]
