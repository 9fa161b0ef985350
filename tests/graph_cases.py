"""A capturer that needs no GPU, and a module to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe_gpu.cuda_graph_manager import CUDAGraphManager
from moe_gpu.cuda_graph_manager.capture import Captured, making_a_graph, map_tensors


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class StandIn:
    """Captures by calling: a replay calls again and overwrites the tensors of the first output, as a graph does.

    untouched: tensors that a call writes besides its output; a real capture runs nothing, so they are put back.
    """

    def __init__(self) -> None:
        self.fail_rehearsal: Exception | None = None
        self.fail_capture: Exception | None = None
        self.memory_bytes = 1000
        self.streams = 0
        self.capturing = False
        self.released = self.freed = 0
        self.untouched: list[torch.Tensor] = []

    def why_not(self, device: torch.device) -> str | None:
        return "inside another capture" if self.capturing else None

    def stream(self, device: torch.device) -> int:
        return self.streams

    def rehearse(self, run: Callable[[], Any], device: torch.device) -> Any:
        assert making_a_graph()
        if self.fail_rehearsal is not None:
            raise self.fail_rehearsal
        return run()

    def capture(self, run: Callable[[], Any], device: torch.device) -> Captured:
        assert making_a_graph()
        if self.fail_capture is not None:
            raise self.fail_capture
        before = [tensor.clone() for tensor in self.untouched]
        output = map_tensors(run(), torch.clone)
        for tensor, value in zip(self.untouched, before, strict=True):
            tensor.copy_(value)

        def replay() -> None:
            new: list[torch.Tensor] = []
            map_tensors(run(), lambda tensor: new.append(tensor) or tensor)
            old: list[torch.Tensor] = []
            map_tensors(output, lambda tensor: old.append(tensor) or tensor)
            for target, source in zip(old, new, strict=True):
                target.copy_(source)

        def release() -> None:
            self.released += 1

        return Captured(replay, release, output, self.memory_bytes)

    def free(self) -> None:
        self.freed += 1


class Doubling(nn.Module):
    """Rows times a weight; counts its calls, which replays of a real graph would not make."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return x * self.weight


def rows(count: int, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width)


def facts(manager: CUDAGraphManager, *names: str) -> tuple[Any, ...]:
    stats = manager.get_stats()
    return tuple(stats[name] for name in names)
