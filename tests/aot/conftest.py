"""On another Triton than the tiles were chosen with, what tells whether its releases changed anything that is used.

That is sm_90 alone, and of kernels that differ in their activation or dtype alone, one.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_gpu.config import ACTIVATIONS
from tests.aot.compiling import CHOSEN_TRITON

OTHERS = tuple(name for name in ACTIVATIONS if name != "swiglu")


def adds_nothing(params: dict[str, Any]) -> bool:
    name = params.get("name")
    other = isinstance(name, str) and name.split(",")[0] in OTHERS
    return params.get("arch", 90) < 90 or params.get("dtype") is torch.float16 or other


def pytest_collection_modifyitems(config, items):
    if CHOSEN_TRITON:
        return
    left_out = [item for item in items if getattr(item, "callspec", None) and adds_nothing(item.callspec.params)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
