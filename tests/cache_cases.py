"""A copy lane that does everything as late as it may and checks what it is told, and layers to compare."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from moe_gpu.config import MoEConfig
from moe_gpu.expert_cache import ExpertCache, lane
from moe_gpu.model import AdvancedMoELayer, set_hbm_budget


@dataclass(eq=False)
class Token:
    """A point in the order of things, as an event would be; `copies` of them are not done before it is waited for."""

    time: int
    copies: list = field(default_factory=list)


class LateLane(lane.CopyLane):
    """Copies poison their slots at once and arrive when somebody waits; a copy that may overtake a reader is an error.

    `read` is told by the operations which slots a computation has read, by the addresses of their weights.
    """

    def __init__(self) -> None:
        self.time = 0
        self.queue: list[Token] = []
        self.readers: dict[int, int] = {}  # address of a slot -> when it was last read
        self.late = 0

    def _now(self) -> int:
        self.time += 1
        return self.time

    def read(self, address: int) -> None:
        self.readers[address] = self._now()

    def mark(self) -> Token:
        return Token(self._now())

    def copy(self, pairs, after) -> Token:
        newest = max((token.time for token in after if token is not None and not token.copies), default=0)
        for destination, _ in pairs:
            read_at = self.readers.get(destination.data_ptr(), 0)
            assert read_at < newest or read_at == 0, "a copy does not wait for the computation that reads its slot"
            if destination.is_floating_point():
                destination.fill_(float("nan"))
        token = Token(self._now(), list(pairs))
        self.queue.append(token)
        return token

    def wait(self, tokens) -> None:
        for wanted in {token.time for token in tokens if token is not None}:
            self._run_until(wanted)

    def _run_until(self, time: int) -> None:
        while self.queue and self.queue[0].time <= time:
            for destination, source in self.queue.pop(0).copies:
                destination.copy_(source)
                self.late += 1

    def synchronize(self) -> None:
        self._run_until(self.time)


def use_late_lane(cache: ExpertCache) -> LateLane:
    """Let the cache copy through a LateLane on the CPU."""
    late = LateLane()
    cache._lanes[torch.device("cpu")] = late
    return late


def spy_on_reads(layer: AdvancedMoELayer, late: LateLane) -> None:
    """Tell the lane which slots each wave of the layer reads."""
    rows = layer.ops.expert_rows

    def expert_rows(x_TH, routing, weights, activation, first_bin, num_experts, out_RO=None):
        out = rows(x_TH, routing, weights, activation, first_bin, num_experts, out_RO)
        slots = layer._hbm._slots
        counts = routing.offsets_P.diff()[first_bin : first_bin + weights.up_EGH.shape[0]]
        for slot in counts.nonzero().flatten().tolist():
            for stack in slots.tensors():
                if stack is not None:
                    late.read(stack[slot].data_ptr())
        return out

    layer.ops.expert_rows = expert_rows


def twins(budget, dtype=torch.float32, seed=0, **changes) -> tuple[AdvancedMoELayer, AdvancedMoELayer]:
    """A layer under a budget, and one of the same weights without."""
    torch.manual_seed(seed)
    sizes = dict(input_dim=12, expert_dim=12, hidden_dim=20, num_experts=5, top_k=2)
    config = MoEConfig(**{**sizes, **changes})
    plain = AdvancedMoELayer.from_config(config).to(dtype).eval()
    cached = AdvancedMoELayer.from_config(config, hbm_budget=budget).to(dtype)
    cached.load_state_dict(plain.state_dict())
    return cached, plain


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def same_bits(cached, plain, x, **options) -> None:
    got, stats = cached(x, **options)
    expected, _ = plain(x, **options)
    assert torch.equal(got, expected), f"differs by {(got - expected).abs().max()}"
    assert got.shape == expected.shape
    if x.shape[0] and stats.counts_E.any():
        assert expected.abs().max() > 0


class Stack(nn.Module):
    """Three layers of unlike sizes, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            AdvancedMoELayer(12, 12, hidden, experts, 2) for hidden, experts in ((20, 8), (16, 8), (24, 4))
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def stacks(budget, **options):
    torch.manual_seed(0)
    plain = Stack().eval()
    cached = copy.deepcopy(plain)
    return cached, plain, set_hbm_budget(cached, ExpertCache(budget, **options))
