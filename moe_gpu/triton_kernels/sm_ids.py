"""On which SMs thread blocks really ran: the hardware's own word on a slice, whatever a driver or budget says."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer, smid

from moe_gpu.triton_kernels.launch import launch


@triton.jit
def _sm_ids_kernel(
    out_ptr,  # (programs,) int32
    spin_ns,
):
    """Grid (programs,): each writes its SM and keeps it for a while, so that others must take another."""
    begin = globaltimer()
    now = begin
    while now - begin < spin_ns:
        now = globaltimer()
    tl.store(out_ptr + tl.program_id(0), smid())


def record_sm_ids(out: torch.Tensor, spin_ns: int = 50_000) -> None:
    """Fill `out`, int32 on a GPU, with the SM of each of as many programs; capturable in a graph."""
    launch(_sm_ids_kernel, (out.numel(),), out, spin_ns, num_warps=4)
