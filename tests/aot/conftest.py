"""On another Triton than the tiles were chosen with, what tells whether its releases changed anything that is used.

That is sm_90 alone, of kernels that differ in their activation, dtype or sizes alone a few, and of tiles, which the
modules see to, those by rule.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_gpu.config import ACTIVATIONS
from tests.aot.compiling import CHOSEN_TRITON

OTHERS = tuple(name for name in ACTIVATIONS if name != "swiglu")


def adds_nothing(params: dict[str, Any]) -> bool:
    name = params.get("name")
    if (
        params.get("num_tokens") == 1
        or params.get("num_experts") in (8, 64, 257, 512)
        or params.get("num_rows") in (32, 64)
        or "capacity" in params  # given choices: those of 64 bits compile the same and more
        or (params.get("kind") == "up" and getattr(params.get("config"), "smaller_ms", ()))  # `grad_x` has one
    ):
        return True
    other = isinstance(name, str) and name.split(",")[0] in OTHERS
    return params.get("arch", 90) < 90 or params.get("dtype") in (torch.float16, "fp16", "*fp16") or other


def pytest_collection_modifyitems(config, items):
    if CHOSEN_TRITON:
        return
    left_out = [item for item in items if getattr(item, "callspec", None) and adds_nothing(item.callspec.params)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
