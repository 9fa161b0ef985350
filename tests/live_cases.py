"""A small model, and a folder of the test's own that jobs publish under."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moe_gpu import AdvancedMoELayer, ExpertProfiler
from moe_gpu.live.status import JobStatus, process_ticks

EXPERTS, TOP_K = 8, 2


@pytest.fixture(name="own_folder", autouse=True)
def folder_of_jobs(tmp_path, monkeypatch):
    """Jobs publish under a folder of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "moe_gpu"


def make_model(num_layers: int = 2, profiled: bool = True, **options) -> torch.nn.ModuleList:
    profiler = ExpertProfiler(EXPERTS, num_layers, copy_interval_s=0) if profiled else None
    return torch.nn.ModuleList(
        AdvancedMoELayer(16, 16, 32, EXPERTS, TOP_K, profiler=profiler, layer_index=index, **options)
        for index in range(num_layers)
    )


def step(model: torch.nn.ModuleList, calls: int = 5, tokens: int = 10) -> None:
    for _ in range(calls):
        for layer in model:
            layer(torch.randn(tokens, 16))
    model[0].profiler.flush()


def wait_while(condition: Callable[[], bool]) -> None:
    """Let the publisher's thread work; far longer than it needs, so that a test fails and does not hang."""
    end = time.monotonic() + 60
    while condition():
        assert time.monotonic() < end, "the thread has not done what was waited for"
        time.sleep(0.01)


def a_status(**changes) -> JobStatus:
    now = time.time()
    ticks = process_ticks(os.getpid())
    return replace(JobStatus(os.getpid(), "job", os.uname().nodename, now, now, 1.0, ticks), **changes)
