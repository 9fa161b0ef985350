"""How kernels are launched: with less work for the host than by Triton alone, and while the one before drains."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver


class _Known(NamedTuple):
    """What was compiled for a launch, and how it is called.

    constants: what the kernel takes after its arguments. bare: how to call it without Triton's Python, where that is
    known. kernel: kept, so that its id stays its own.
    """

    compiled: CompiledKernel
    constants: tuple[Any, ...]
    bare: _Bare | None
    kernel: Any


class _Bare(NamedTuple):
    """Triton's launcher written in C, and what it takes between the stream and the arguments.

    boxes: what descriptors are encoded by, last argument first, with their place among the arguments.
    """

    run: Any
    fixed: tuple[Any, ...]
    boxes: tuple[tuple[int, Any], ...]


_KNOWN: dict[tuple[Any, ...], _Known] = {}
# Descriptors as the launcher takes them, by address, box, shape and strides: steady calls meet the same ones again.
_ENCODED: dict[tuple[Any, ...], list[Any]] = {}
# What Triton asks of an integer, by the integer: sizes and strides are the same few.
_INTEGERS: dict[int, int] = {}
_MOST_KEPT = 8192


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)` in a third of the host's time; constants go by name, and all are given.

    Triton binds, specialises and hashes everything again on every launch. Here launches are told apart by a key that is
    cheaper and at least as fine, and what was compiled for it is called directly. It runs on the device of the first
    tensor, which Triton alone takes the current device for.
    """
    keyed = _key_of(kernel, arguments, options)
    if keyed is None:
        kernel[grid](*arguments, **options)
        return
    key, values = keyed
    device = key[1]
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *arguments, **options)
        return
    known = _KNOWN.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **options)
        if isinstance(compiled, CompiledKernel):  # the interpreter gives none
            constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
            _KNOWN[key] = _Known(compiled, constants, _bare(compiled), kernel)
        return
    x, y, z = (*grid, 1, 1)[:3]
    watched = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # a profiler's
    if known.bare is None or device < 0 or watched[0].calls or watched[1].calls:  # no address of the host's memory
        known.compiled[x, y, z](*arguments, *known.constants)
        return
    run, fixed, boxes = known.bare
    for place, box in boxes:
        values[place : place + 1] = _encode(values[place], box)
    run(x, y, z, driver.active.get_current_stream(device), *fixed, *values, *known.constants)


def _bare(compiled: CompiledKernel) -> _Bare | None:
    """How to call a kernel below all that Triton 3.6 does in Python; None where this is not known.

    The launcher takes a tensor's address as well as the tensor, and asks the driver nothing about an address.
    """
    run = compiled.run
    whose = type(run).__module__, type(run).__name__
    if not triton.__version__.startswith("3.6.") or whose != ("triton.backends.nvidia.driver", "CudaLauncher"):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    launcher, boxes = run.launch, []
    kinds = list(compiled.src.signature.values())
    places = [place for place, kind in enumerate(kinds) if isinstance(kind, str) and kind.startswith("tensordesc")]
    if places:
        # Triton's function around the launcher encodes descriptors anew at every call.
        cells = zip(launcher.__code__.co_freevars, launcher.__closure__, strict=True)
        within = {name: cell.cell_contents for name, cell in cells}
        launcher, encoded_by = within["launcher"], within["tensordesc_meta"]
        if None in encoded_by:
            return None
        boxes = list(zip(places, encoded_by, strict=True))[::-1]
    scratch, hooks = (None, None), (None, None, None)
    how = compiled.function, run.launch_cooperative_grid, run.launch_pdl
    return _Bare(launcher, (*how, *scratch, compiled.packed_metadata, *hooks), tuple(boxes))


def _encode(descriptor: Any, box: Any) -> list[Any]:
    """A descriptor as the launcher takes it: what the hardware reads, and its shape and strides."""
    key = (descriptor.base.data_ptr(), id(box), *descriptor.shape, *descriptor.strides)
    found = _ENCODED.get(key)
    if found is None:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        if len(_ENCODED) >= _MOST_KEPT:
            _ENCODED.clear()
        found = _ENCODED[key] = make_tensordesc_arg(descriptor, box)
    return found


def _note_integer(argument: int) -> int:
    fits = -0x80000000 <= argument <= 0x7FFFFFFF
    if len(_INTEGERS) >= _MOST_KEPT:
        _INTEGERS.clear()
    _INTEGERS[argument] = (argument == 1) + 2 * (argument % 16 == 0) + 4 * fits
    return _INTEGERS[argument]


def _key_of(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], list[Any]] | None:
    """What tells one compiled kernel from another, the device second; and the arguments with addresses for tensors.

    None for an argument of an unknown kind, and for tensors on several devices: Triton says which it cannot reach. The
    device of the host's memory is -1. Triton asks of a tensor its dtype and whether it starts on 16 bytes, of an
    integer whether it is 1, a multiple of 16 and within 32 bits, of a descriptor its box and layout, which
    hopper_common.py numbers.
    """
    device: int | None = None
    key: list[Any] = []
    values: list[Any] = []
    for argument in arguments:
        kind = argument.__class__
        if kind is int:
            found = _INTEGERS.get(argument)
            key.append(_note_integer(argument) if found is None else found)
            values.append(argument)
        elif argument is None or kind is float:
            key.append(kind)
            values.append(argument)
        elif isinstance(argument, torch.Tensor):
            address = argument.data_ptr()
            key.append((argument.dtype,) if address % 16 else argument.dtype)
            values.append(address)
            where = argument.get_device()
            if where != device:
                if device is not None:
                    return None
                device = where
        elif hasattr(argument, "box"):
            key.append(kind)
            key.append(argument.box)
            values.append(argument)
            where = argument.base.get_device()
            if where != device:
                if device is not None:
                    return None
                device = where
        else:
            return None
    return (id(kernel), -1 if device is None else device, *key, *options, *options.values()), values


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
