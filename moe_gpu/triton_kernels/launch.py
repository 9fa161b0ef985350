"""How kernels are launched: with less work for the host than by Triton alone, and while the one before drains."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# What was compiled for a launch, and the constants that its kernel takes after the arguments. The kernel itself is kept
# too, so that its id stays its own.
_COMPILED: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...], Any]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)` in about half the host's time; constants go by name, and all are given.

    Triton binds, specialises and hashes everything again on every launch. Here launches are told apart by a key that is
    cheaper and at least as fine, and what was compiled for it is called directly. It runs on the device of the first
    tensor, which Triton alone takes the current device for.
    """
    key = _key_of(kernel, arguments, options)
    if key is None:
        kernel[grid](*arguments, **options)
        return
    device = key[1]
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **options)
        return
    known = _COMPILED.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **options)
        if isinstance(compiled, CompiledKernel):  # the interpreter gives none
            names = kernel.arg_names[len(arguments) :]
            _COMPILED[key] = compiled, tuple(options[name] for name in names), kernel
        return
    compiled, constants, _ = known
    compiled[(*grid, 1, 1)[:3]](*arguments, *constants)


def _key_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...] | None:
    """What tells one compiled kernel from another, the device second; None for an argument of an unknown kind.

    Triton asks of a tensor its dtype and whether it starts on 16 bytes, of an integer whether it is 1, a multiple of 16
    and within 32 bits, of a descriptor its box and layout.
    """
    key: list[Any] = [id(kernel), -1]
    for argument in arguments:
        kind = argument.__class__
        if kind is int:
            fits = -0x80000000 <= argument <= 0x7FFFFFFF
            key.append((argument == 1) + 2 * (argument % 16 == 0) + 4 * fits)
        elif argument is None or kind is float:
            key.append(kind)
        elif isinstance(argument, torch.Tensor):
            key.append(argument.dtype)
            key.append(argument.data_ptr() % 16 == 0)
            if key[1] < 0:
                key[1] = argument.get_device()
        elif hasattr(argument, "block_shape"):
            key += (kind, argument.base.dtype, *argument.block_shape, argument.layout)
            if key[1] < 0:
                key[1] = argument.base.get_device()
        else:
            return None
    key += options
    key += options.values()
    return tuple(key)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernels before have finished and their writes show; then let the next kernel start.

    Every program calls it before its first load or store of anything that another kernel writes or reads: only this
    wait orders memory, and the next kernel's own wait is what orders it after this one.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_options(device: torch.device, pays: bool = True) -> dict[str, bool]:
    """Launch options of a kernel that calls `wait_for_previous(PDL)`: on from compute capability 9.0, where it pays."""
    pdl = pays and _has_pdl(device)
    return {"PDL": pdl, "launch_pdl": pdl}
