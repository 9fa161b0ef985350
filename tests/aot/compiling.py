"""Compile a kernel for a GPU that this machine has not got, and read what the compiler says of it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from moe_gpu.triton_kernels import launch

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Tiles hold to the word and the instruction on the Triton that they were chosen with; scripts/run_tests.py says when
# another one runs: it must compile and fit, with the same units, but its register allocation may differ by a little.
CHOSEN_TRITON = os.environ.get("MOE_GPU_OTHER_TRITON") != "1"
_SPILLS_ALLOWED = 0 if CHOSEN_TRITON else 8


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel: registers a thread, 4-byte words spilled, shared memory, and instructions.

    spills: those beyond what is allowed; none is, on the Triton that the tiles were chosen with.
    """

    name: str
    registers: int
    spills: int
    shared_bytes: int
    num_wgmma: int
    num_mma_sync: int
    num_async_copies: int
    num_tma: int
    num_setmaxnreg: int
    ptx: str


def compile_for(
    kernel: Any,
    arch: int,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: tuple[str, ...] = (),
    **options: int,
) -> Compiled:
    """Compile for compute capability `arch` / 10. Pointers, and the integers in `aligned`, are divisible by 16."""
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name, kind in types.items() if kind == "constexpr" and name not in constants]
    assert not missing, f"neither in the signature nor constant: {missing}"
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or (name in aligned and name not in constants)
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attributes)
    return _describe(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


@contextmanager
def compiling_launches(arch: int) -> Iterator[list[Compiled]]:
    """Within, a launch compiles what it would run on compute capability `arch` / 10, and runs nothing.

    So the functions that launch can be called with tensors of the meta device, and what they pass is what compiles.
    """
    launches: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launches.append(_describe(run(self, *args, grid=grid, warmup=True, **kwargs)))

    with (
        mock.patch.object(driver, "_active", _NoGpu(arch)),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "_has_pdl", return_value=arch >= 90),
    ):
        yield launches


class _NoGpu:
    """What Triton's front end asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _describe(built: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(rf"Function {re.escape(built.metadata.name)}:\s*(.*)", report)
    assert usage, report
    used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage[1])}
    ptx = built.asm["ptx"]
    return Compiled(
        name=built.metadata.name,
        registers=used["REG"],
        spills=max(0, (used["STACK"] + used["LOCAL"]) // 4 - _SPILLS_ALLOWED),
        shared_bytes=built.metadata.shared,
        num_wgmma=ptx.count("wgmma.mma_async"),
        num_mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
        num_async_copies=len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        num_tma=ptx.count("cp.async.bulk.tensor"),
        num_setmaxnreg=ptx.count("setmaxnreg"),
        ptx=ptx,
    )
