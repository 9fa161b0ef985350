"""The kernel that tells SMs apart reads the hardware's register and waits by its clock."""

from __future__ import annotations

import pytest

from moe_gpu.triton_kernels.sm_ids import _sm_ids_kernel
from tests.aot.compiling import compile_for


@pytest.mark.parametrize("arch", [80, 90])
def test_it_reads_the_sm_and_the_clock(arch):
    built = compile_for(_sm_ids_kernel, arch, {"out_ptr": "*i32", "spin_ns": "i32"}, {}, num_warps=4)
    assert "%smid" in built.ptx
    assert built.ptx.count("%globaltimer") == 2
    assert built.spills == 0
