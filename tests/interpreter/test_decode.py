"""Decode kernels against the float64 reference on the interpreter: every edge, with narrow tiles."""

from __future__ import annotations

import pytest
import torch

from moe_gpu.triton_kernels.decode import DecodeConfig, DecodeTile
from tests.decode_cases import DECODE_CASES, check_decode

CONFIG = DecodeConfig(DecodeTile(32, 32, 4, 2), DecodeTile(32, 16, 4, 2))


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_decode(case):
    check_decode(case, CONFIG, torch.bfloat16, "cpu")


def test_float16():
    check_decode(DECODE_CASES[2], CONFIG, torch.float16, "cpu")
