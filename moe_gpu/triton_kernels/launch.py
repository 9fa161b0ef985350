"""Programmatic dependent launch: a kernel starts while the one before it drains, and waits before it touches memory."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
