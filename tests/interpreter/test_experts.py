"""Expert kernels against the float64 reference on the interpreter: every edge, forward and every gradient."""

from __future__ import annotations

import pytest
import torch

from tests.kernel_cases import EXPERT_CASES, STRIDED_CASES, check_experts

# float16 goes through the same code as bfloat16: every other edge in it.
KINDS = {torch.float32: EXPERT_CASES, torch.bfloat16: EXPERT_CASES, torch.float16: EXPERT_CASES[::2]}


@pytest.mark.parametrize(
    ("dtype", "case"),
    [pytest.param(dtype, case, id=f"{case.name}-{dtype}") for dtype, cases in KINDS.items() for case in cases],
)
def test_experts(dtype, case):
    check_experts(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", STRIDED_CASES, ids=lambda case: case.name)
def test_tensors_with_other_strides(case, dtype):
    check_experts(case, dtype, "cpu")
