"""The expert cache on a GPU: the bits of resident weights under delayed, poisoned copies; graphs; host memory."""

from __future__ import annotations

import random

import pytest
import torch

from moe_gpu.expert_cache import ExpertCache
from moe_gpu.expert_cache.lane import CudaCopyLane
from moe_gpu.model import AdvancedMoELayer, set_hbm_budget
from tests.cache_cases import twins

serves = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not serves, reason="needs an NVIDIA GPU of compute capability 8.0 or newer"),
]
SIZES = dict(input_dim=256, expert_dim=256, hidden_dim=128, num_experts=32, top_k=4)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class SlowLane(CudaCopyLane):
    """Sleeps before copies, and poisons each slot once its last reader is done, before the copy and another sleep."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        self.random = random.Random(seed)
        self.copies = 0

    def _sleep(self) -> None:
        if self.random.random() < 0.5:
            torch.cuda._sleep(self.random.randrange(1_000_000))

    def copy(self, pairs, after) -> object:
        with torch.cuda.stream(self.stream):
            self._sleep()
        super().copy([], after)
        with torch.cuda.stream(self.stream):
            for destination, _ in pairs:
                destination.fill_(float("nan"))
            self._sleep()
        self.copies += len(pairs)
        return super().copy(pairs, ())


def on_gpu(budget, dtype, **changes) -> tuple[AdvancedMoELayer, AdvancedMoELayer]:
    cached, plain = twins("100%", dtype, **{**SIZES, **changes})
    cached.set_hbm_budget(budget if isinstance(budget, ExpertCache) else budget * cached._hbm.expert_bytes)
    return cached.cuda(), plain.cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("slots", [1, 5, 8, 24, 32])
def test_the_bits_are_those_of_resident_weights(slots, dtype):
    """Token counts that decode kernels, plain tiles and, on Hopper, Gluon kernels serve."""
    cached, plain = on_gpu(slots, dtype)
    for tokens in (1, 8, 0, 64, 512, 2048, 1, 4):
        x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
        got, _ = cached(x)
        expected, _ = plain(x)
        assert torch.equal(got, expected), f"T={tokens} differs by {(got - expected).abs().max()}"
        assert tokens == 0 or expected.abs().max() > 0


@pytest.mark.parametrize(
    "changes", [dict(bias=True, shared_hidden_dim=128), dict(activation="gelu", depth=2, bias=True)]
)
def test_biases_and_depth(changes):
    cached, plain = on_gpu(6, torch.bfloat16, **changes)
    for tokens in (1, 64, 700):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(cached(x)[0], plain(x)[0])


@pytest.mark.parametrize("seed", range(3))
def test_copies_that_come_late_and_slots_that_are_poisoned(seed):
    cached, plain = on_gpu(ExpertCache("25%"), torch.bfloat16)
    lane = SlowLane(torch.device("cuda", torch.cuda.current_device()), seed)
    cached._hbm.cache._lanes[lane.device] = lane
    generator = torch.Generator("cuda").manual_seed(seed)
    pairs = []
    for step in range(300):
        x = torch.randn(1 + step % 5 * 3, 256, device="cuda", dtype=torch.bfloat16, generator=generator)
        if lane.random.random() < 0.3:
            torch.cuda._sleep(lane.random.randrange(1_000_000))  # the computation is late
        pairs.append((cached(x)[0], x))
    assert lane.copies > 300
    for step, (got, x) in enumerate(pairs):
        assert torch.equal(got, plain(x)[0]), f"step {step}"


def test_weights_loaded_while_copies_are_under_way():
    cached, plain = on_gpu(8, torch.bfloat16)
    device = torch.device("cuda", torch.cuda.current_device())
    cached._hbm.cache._lanes[device] = SlowLane(device, 0)
    other = twins("100%", torch.bfloat16, seed=1, **SIZES)[1].cuda()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    held = plain
    for layer in (other, plain, other):
        before = cached(x)[0]
        cached.load_state_dict(layer.state_dict())
        assert torch.equal(cached(x)[0], layer(x)[0])
        assert torch.equal(before, held(x)[0]), "the step before saw the new weights"
        held = layer


def test_experts_stay_in_pinned_host_memory():
    cached, plain = on_gpu(8, torch.bfloat16)
    assert cached.router_weight.is_cuda
    assert not cached.gate_up_proj.is_cuda
    cached(torch.randn(4, 256, device="cuda", dtype=torch.bfloat16))
    stats = cached._hbm.cache.stats()
    assert stats.used_bytes == 8 * cached._hbm.expert_bytes
    assert stats.host_memory == "pinned"
    assert cached.gate_up_proj.is_pinned()
    moved = plain.eval()
    set_hbm_budget(moved, "25%")  # of a layer that is on the GPU already
    assert moved(torch.randn(4, 256, device="cuda", dtype=torch.bfloat16))[0].is_cuda
    assert not moved.gate_up_proj.is_cuda


def test_a_whole_layer_captures_and_reads_nothing_back_and_a_part_is_refused():
    whole, plain = on_gpu(32, torch.bfloat16)
    x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        whole(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        whole(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = whole(x)[0]
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(out, plain(x)[0])
    part, twin = on_gpu(8, torch.bfloat16)
    part(x)
    with (
        pytest.raises(ValueError, match="a CUDA graph cannot capture this layer"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        part(x)
    torch.cuda.synchronize()
    assert torch.equal(part(x)[0], twin(x)[0])
