"""Compile a kernel for a GPU that this machine has not got, and read what the compiler says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel: registers a thread, spilled 4-byte words, shared memory, and instructions."""

    registers: int
    spills: int
    shared_bytes: int
    num_wgmma: int
    num_mma_sync: int
    num_async_copies: int
    num_tma: int
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
        if types[name].startswith("*") or name in aligned
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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
        registers=used["REG"],
        spills=(used["STACK"] + used["LOCAL"]) // 4,
        shared_bytes=built.metadata.shared,
        num_wgmma=ptx.count("wgmma.mma_async"),
        num_mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
        num_async_copies=len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        num_tma=ptx.count("cp.async.bulk.tensor"),
        ptx=ptx,
    )
