"""Stand-ins in C for the NVIDIA driver's libraries, compiled by the tests that need them."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


@functools.cache
def compiled(source: str, library: str) -> Path:
    """A library of this name built from a source of this folder, alone in a new folder.

    The test is skipped, saying so, where there is no C compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not compiler or not shutil.which(compiler):
        pytest.skip("no C compiler to build a stand-in for the driver with")
    folder = tempfile.mkdtemp(prefix="moe_gpu_stand_in_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / library
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(Path(__file__).parent / source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path
