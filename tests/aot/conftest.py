"""On another Triton than the tiles were chosen with, sm_90 alone: it is what Triton's releases change most."""

from __future__ import annotations

from tests.aot.compiling import CHOSEN_TRITON


def pytest_collection_modifyitems(config, items):
    if CHOSEN_TRITON:
        return
    left_out = [item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("arch", 90) < 90]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
