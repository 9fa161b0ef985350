"""Run the kernels for Hopper on the CPU, so that a missing wait, arrival or fence shows as an error.

The groups of warps of a program are threads of which one runs at a time; at every operation that touches shared memory
or a barrier, and while it waits, a seeded draw says who goes on. Asynchronous operations happen late: a copy into
shared memory when it is drawn, wgmma and TMA stores only when they are waited for. Fresh shared memory, and memory that
a copy is under way to, holds NaN. A `Fault` is raised for:

- a read of memory that is being written, or a write to memory that is still to be read by wgmma or a TMA store;
- wgmma or a TMA store of what was written through the generic proxy, without a proxy fence in between;
- a copy that completes on a barrier whose initialisation was not fenced;
- more arrivals than a barrier counts, nobody able to go on, work left unfinished, an address outside its tensor.

A wrong phase or a wrong index that raises none of these shows as wrong numbers. Layouts, the order of global memory
between programs (they run one after another) and registers are not modelled; ahead-of-time compilation sees to those.
"""

from __future__ import annotations

import inspect
import random
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from tests.emulator.language import MODULES
from tests.emulator.memory import Descriptor, Pointer
from tests.emulator.program import Program, now

Key = tuple[str, str]


def key_of(function: Callable) -> Key:
    """By what a kernel's function is told from others."""
    return function.__module__, function.__name__


class _Translation:
    """The functions of kernels as plain ones that call the names of language.py."""

    def __init__(self, replaced: Mapping[Key, Callable]) -> None:
        self.replaced = replaced
        self.namespaces: dict[int, dict[str, Any]] = {}

    def function(self, function: types.FunctionType) -> Callable:
        other = self.replaced.get(key_of(function))
        if isinstance(other, types.BuiltinFunctionType):
            return other
        code = (other or function).__code__
        return types.FunctionType(code, self.namespace(function), function.__name__, function.__defaults__)

    def namespace(self, function: types.FunctionType) -> dict[str, Any]:
        names = function.__globals__
        if id(names) not in self.namespaces:
            self.namespaces[id(names)] = new = {}
            new.update({name: self.value(value) for name, value in names.items()})
        return self.namespaces[id(names)]

    def value(self, value: Any) -> Any:
        if isinstance(value, tl.constexpr):
            return value.value
        if isinstance(value, JITFunction) or type(value).__name__ == "ConstexprFunction":
            return self.function(value.fn)
        if isinstance(value, types.ModuleType) and value.__name__.startswith("triton."):
            return MODULES.get(value.__name__.rpartition(".")[2], value)
        module = getattr(value, "__module__", None) or ""
        if module.startswith("triton.experimental.gluon.language"):
            return getattr(MODULES.get(module.rpartition(".")[2]), getattr(value, "__name__", ""), value)
        return value


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer.to(value)
    return Descriptor.of(value) if hasattr(value, "block_shape") else value


@contextmanager
def emulated(seed: int = 0, replaced: Mapping[Key, Callable] | None = None) -> Iterator[None]:
    """Within, a launch runs here, on CPU tensors.

    replaced: functions in place of a kernel's: builtin ones, or ones whose code runs among the kernel's own names.
    """
    draw = random.Random(seed)
    translation = _Translation(replaced or {})

    def run(kernel, *args, grid, warmup, **kwargs):
        names = inspect.signature(kernel.fn).parameters
        bound = {name: value for name, value in kwargs.items() if name in names}
        bound = inspect.signature(kernel.fn).bind(*map(_argument, args), **bound).arguments
        function = translation.function(kernel.fn)
        grid = (*grid, 1, 1)[:3]
        for ids in ((x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])):
            now.program = Program(ids, grid, kwargs.get("num_warps", 4), draw)
            now.group = now.program.first
            function(**bound)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # every group would have its own pool of them
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield
    finally:
        torch.set_num_threads(threads)
