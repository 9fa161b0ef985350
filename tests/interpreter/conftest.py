"""Kernels on Triton's interpreter; needs TRITON_INTERPRET=1 in the environment before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import hardening, speed

    hardening.install_bf16()
    hardening.install_fp8()
    hardening.install_bounds()
    hardening.install_xor()
    speed.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN, so an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
