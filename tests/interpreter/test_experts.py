"""Expert kernels against the float64 reference on the interpreter: every edge, forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from tests.kernel_cases import EXPERT_CASES, STRIDED_CASES, check_experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case.name)
def test_experts(case, dtype):
    check_experts(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", STRIDED_CASES, ids=lambda case: case.name)
def test_tensors_with_other_strides(case, dtype):
    check_experts(case, dtype, "cpu")
