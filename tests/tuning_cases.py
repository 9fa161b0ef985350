"""A GPU that is only described, and tables of its tiles in folders of their own."""

from __future__ import annotations

import pytest

from moe_gpu.explain import Gpu
from moe_gpu.results import Ceiling, Machine
from moe_gpu.triton_kernels import tile_table
from moe_gpu.triton_kernels.tile_table import Cell, Entry, Table
from moe_gpu.triton_kernels.tuning import HOPPER_SHARED_BYTES, GemmConfig, HopperConfig

H200 = "NVIDIA H200"
MACHINE = Machine(H200, "cuda", "3.12", "2.11", "Linux", "2026-11-24", compute_capability="9.0", num_sms=132)
GLUON, PLAIN, OTHER = HopperConfig(3, group_m=16), GemmConfig(64, 64, 64, 4, 3), GemmConfig(32, 64, 64, 4, 3)
GPU = Gpu(H200, (9, 0), 132, HOPPER_SHARED_BYTES)
CELL = Cell("up", 16, 256, 1536, 2048, 132)
CEILINGS = (Ceiling("matmul", "bfloat16", 8e14, "FLOP/s", "test"), Ceiling("copy", "bfloat16", 4e12, "B/s", "test"))


def table_of(*entries: Entry) -> Table:
    return Table((MACHINE,), entries, CEILINGS)


@pytest.fixture(name="table_file")  # pytest has a fixture `cache` of its own
def empty_table(tmp_path, monkeypatch):
    """The file of a user without a table, with nothing shipped beside it."""
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tile_table, "shipped_path", lambda name: tmp_path / "shipped" / "h200.json")
    tile_table.forget_tables()
    yield tile_table.cache_path(H200)
    tile_table.forget_tables()


@pytest.fixture(name="cache", autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where it is imported: no user's tables or calibrations, and none left behind."""
    monkeypatch.setenv("MOE_GPU_CACHE", str(tmp_path / "cache"))
    tile_table.forget_tables()
    yield tmp_path / "cache"
    tile_table.forget_tables()
