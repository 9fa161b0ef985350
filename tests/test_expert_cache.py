"""Layers under a budget give the bits of layers without one, whatever is resident, and say what they do."""

from __future__ import annotations

import gc
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_gpu.expert_cache import ExpertCache, HbmBudgetError, HbmMemoryError, lane
from moe_gpu.expert_cache import cache as cache_module
from moe_gpu.expert_cache.policies import PrefetchGate
from moe_gpu.expert_cache.simulate import simulate
from moe_gpu.model import AdvancedMoELayer, set_hbm_budget
from moe_gpu.profiler import RoutingTrace
from tests.cache_cases import (
    LateLane,
    Stack,
    no_grad,  # noqa: F401 a fixture
    same_bits,
    spy_on_reads,
    stacks,
    twins,
    use_late_lane,
)
from tests.test_model import VARIANTS

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bits_are_those_of_resident_weights(variant):
    experts = VARIANTS[variant].get("num_experts", 5)
    for slots in range(1, experts + 1):
        cached, plain = twins("100%", **VARIANTS[variant])
        cache = ExpertCache(slots * cached._hbm.expert_bytes)
        cached.set_hbm_budget(cache)
        late = use_late_lane(cache)
        spy_on_reads(cached, late)
        generator = torch.Generator().manual_seed(slots)
        for tokens in (0, 1, 3, 11, 0, 2, 1, 30, 1, 1, 2, 5):
            same_bits(cached, plain, torch.randn(tokens, cached.config.input_dim, generator=generator))
        counts = cache.stats().counts
        assert late.late > 0
        assert counts.unread_steps == (12 if slots == experts else 0)
        assert counts.bytes_copied >= slots * cached._hbm.expert_bytes or counts.misses < slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype(dtype):
    cached, plain = twins(0.4, dtype, input_dim=13, hidden_dim=17, num_experts=7, top_k=3)
    for tokens in (1, 2, 9, 40, 1):
        same_bits(cached, plain, torch.randn(tokens, 13).to(dtype))
    assert cached._hbm._slots.up_EGH.dtype == dtype


def test_autocast():
    cached, plain = twins(0.4)
    for tokens in (1, 7, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same_bits(cached, plain, torch.randn(tokens, 12))
    assert cached._hbm._slots.up_EGH.dtype == torch.float32


def test_hundreds_of_random_steps():
    cached, plain = twins(0.5, input_dim=4, expert_dim=4, hidden_dim=3, num_experts=9, top_k=3)
    spy_on_reads(cached, use_late_lane(cached._hbm.cache))
    generator = torch.Generator().manual_seed(5)
    drift_E = torch.zeros(9)
    for _ in range(600):
        drift_E += 0.3 * torch.randn(9, generator=generator)
        tokens = int(torch.randint(0, 5, (1,), generator=generator))
        logits_TE = drift_E + torch.randn(tokens, 9, generator=generator)
        same_bits(cached, plain, torch.randn(tokens, 4, generator=generator), router_logits_TE=logits_TE)
    counts = cached._hbm.cache.stats().counts
    assert counts.hits > 400
    assert counts.misses > 40
    assert counts.bytes_copied == (counts.misses * cached._hbm.expert_bytes + counts.bytes_prefetched)


def test_edges_of_routing():
    cached, plain = twins(0.4)
    all_to_one = torch.full((9, 5), -50.0)
    all_to_one[:, 3] = 50.0
    nan = torch.randn(4, 5)
    nan[1] = torch.nan
    for logits_TE in (all_to_one, nan, torch.full((3, 5), torch.nan), all_to_one):
        same_bits(cached, plain, torch.randn(len(logits_TE), 12), router_logits_TE=logits_TE)
    strided = torch.randn(12, 6).t()
    same_bits(cached, plain, strided)
    same_bits(cached, plain, torch.randn(2, 3, 12))


@pytest.mark.parametrize("budget", ["25%", 0.5, "75%", "100%", 9000])
def test_layers_share_one_budget(budget):
    cached, plain, cache = stacks(budget)
    spies = use_late_lane(cache)
    for layer in cached.layers:
        spy_on_reads(layer, spies)
    for step in range(40):
        x = torch.randn(1 + step % 4, 12)
        assert torch.equal(cached(x), plain(x))
    stats = cache.stats()
    assert stats.used_bytes <= stats.budget_bytes
    assert stats.used_bytes > stats.budget_bytes - max(layer._hbm.expert_bytes for layer in cached.layers)
    assert len(stats.slots_by_layer) == len(stats.resident_by_layer) == 3
    assert all(len(ids) <= slots for ids, slots in zip(stats.resident_by_layer, stats.slots_by_layer, strict=True))
    if budget == "100%":
        assert stats.hit_rate is None
        assert stats.counts.unread_steps == 120
    else:
        assert 0 < stats.hit_rate < 1


def test_the_next_layers_experts_are_prefetched():
    cached, plain, cache = stacks("50%", policy="lru")
    spies = use_late_lane(cache)
    for layer in cached.layers:
        spy_on_reads(layer, spies)
    inputs = torch.randn(8, 1, 12)
    for step in range(160):
        assert torch.equal(cached(inputs[step % 8]), plain(inputs[step % 8]))
    counts = cache.stats().counts
    assert counts.prefetch_hits > 0
    assert counts.bytes_prefetched > 0


@pytest.mark.parametrize("policy", ["lru", "auto", "on-demand"])
def test_a_layer_does_what_the_simulator_says(policy):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(1, 200, 8, generator=generator) + 1.5 * torch.randn(1, 1, 8, generator=generator)
    trace = RoutingTrace(scores.topk(2).indices.to(torch.int16), 8, "made up")
    cached, plain = twins("100%", num_experts=8)
    cache = ExpertCache(3 * cached._hbm.expert_bytes, policy)
    cached.set_hbm_budget(cache)
    for step in range(100):
        logits_TE = torch.full((2, 8), -9.0)
        logits_TE.scatter_(1, trace.replay(2, start=2 * step).long(), torch.tensor([[2.0, 1.0]] * 2))
        same_bits(cached, plain, torch.randn(2, 12), router_logits_TE=logits_TE)
    row, stats = simulate(trace, 3, policy, tokens_per_step=2), cache.stats()
    counts = stats.counts
    assert (row.hits, row.misses, row.evictions) == (counts.hits, counts.misses, counts.evictions)
    assert row.copies * cached._hbm.expert_bytes == counts.bytes_copied
    assert row.hit_rate == stats.hit_rate
    assert row.serving == stats.policy


def test_a_step_without_misses_uploads_nothing_and_starts_no_copy(monkeypatch):
    cached, plain = twins(0.8)
    late = use_late_lane(cached._hbm.cache)
    x = torch.randn(1, 12)
    same_bits(cached, plain, x)
    same_bits(cached, plain, x)
    held, copies = cached._hbm._table, late.late
    assert held is not None
    for _ in range(3):
        same_bits(cached, plain, x)
    assert cached._hbm._table is held
    assert late.late == copies
    same_bits(cached, plain, torch.randn(9, 12))
    same_bits(cached, plain, x)
    assert cached._hbm._table is not held, "slots have changed hands"


def test_prefetching_that_costs_the_host_more_than_it_saves_is_turned_off(monkeypatch):
    monkeypatch.setattr(PrefetchGate, "OUTCOMES", 4)
    on = {}
    for copy_s in (None, 1e6, 1e-12):
        monkeypatch.setattr(LateLane, "seconds", lambda self, num_bytes, copy_s=copy_s: copy_s)
        cached, plain, cache = stacks("50%", policy="lru")
        use_late_lane(cache)
        inputs = torch.randn(8, 1, 12, generator=torch.Generator().manual_seed(0))
        on[copy_s] = []
        for step in range(160):
            assert torch.equal(cached(inputs[step % 8]), plain(inputs[step % 8]))
            on[copy_s].append(cache.stats().prefetch)
        assert cache.stats().counts.prefetch_hits > 0
    assert on[None] == on[1e6], "a host that costs nothing beside a copy changes nothing"
    assert sum(on[1e-12]) < 0.5 * sum(on[None])


def test_a_point_that_was_reached_is_not_asked_again():
    class Event:
        done, asked = False, 0

        def query(self) -> bool:
            self.asked += 1
            return self.done

    event = Event()
    tokens = [lane.Point(event)] * 5
    assert lane._pending([*tokens, None]) == [event]
    event.done = True
    for _ in range(3):
        assert lane._pending(tokens) == []
    assert event.asked == 2


def test_the_pace_of_copies_is_the_fastest_of_the_first(monkeypatch):
    class Event:
        """Reached at once; the n-th timed copy takes 10 - n ms."""

        def __init__(self, enable_timing=False) -> None:
            self.timed = enable_timing
            made.append(self)

        def query(self) -> bool:
            return True

        def elapsed_time(self, end) -> float:
            return 10.0 - made.index(self) // 2

    made: list[Event] = []
    monkeypatch.setattr(lane.torch.cuda, "Event", Event)
    monkeypatch.setattr(lane.torch.cuda, "Stream", lambda device: SimpleNamespace(record_event=lambda event: event))
    monkeypatch.setattr(lane.torch.cuda, "stream", lambda stream: nullcontext())
    copies = lane.CudaCopyLane(torch.device("cuda", 0))
    pair = torch.zeros(250), torch.ones(250)
    for number in range(12):
        assert (copies.seconds(1000) is None) == (number < copies.TIMED)
        copies.copy([pair], [])
    assert copies.seconds(2000) == pytest.approx(2 * (10 - copies.TIMED + 1) * 1e-3)
    assert sum(event.timed for event in made) == 2 * copies.TIMED, "later copies are not timed"
    assert pair[0].all()


def test_static_keeps_what_its_profile_ranks_highest():
    cached, plain = twins("100%", num_experts=8, top_k=1)
    profile_LE = torch.tensor([[9, 1, 8, 1, 7, 1, 1, 1]])
    cache = ExpertCache(3 * cached._hbm.expert_bytes, "static", prefetch=False, profile_LE=profile_LE)
    cached.set_hbm_budget(cache)
    for expert in (0, 2, 4, 1, 3, 5, 6, 7, 1):
        logits_TE = torch.zeros(1, 8)
        logits_TE[0, expert] = 5.0
        same_bits(cached, plain, torch.randn(1, 12), router_logits_TE=logits_TE)
    assert cache.stats().resident_by_layer == [[0, 1, 2]]
    with pytest.raises(ValueError, match="profile_LE goes with policy='static'"):
        ExpertCache(0.5, "static")
    with pytest.raises(ValueError, match="profile_LE goes with policy='static'"):
        ExpertCache(0.5, "lru", profile_LE=profile_LE)
    short = ExpertCache(0.5, "static", profile_LE=[[1, 2]])
    cached.set_hbm_budget(short)
    with pytest.raises(ValueError, match="profile_LE has 1 rows"):
        cached(torch.randn(1, 12))


# Bad input


@pytest.mark.parametrize("budget", [0, -5, "lots", 1.5, "0%", True, 10])
def test_a_budget_that_does_not_do_is_one_line(budget):
    with pytest.raises(HbmBudgetError) as caught:
        AdvancedMoELayer(12, 12, 20, 5, hbm_budget=budget)
    assert "\n" not in str(caught.value)
    layer = AdvancedMoELayer(12, 12, 20, 5).eval()
    with pytest.raises(HbmBudgetError):
        layer.set_hbm_budget(budget)
    assert layer._hbm is None
    assert layer.router_weight.requires_grad


def test_a_model_whose_budget_does_not_do_is_left_as_it_was():
    model = Stack().eval()
    sizes = [sum(p[0].nbytes for p in layer._expert_parameters().values()) for layer in model.layers]
    cache = ExpertCache(sum(sizes) - 1)
    with pytest.raises(HbmBudgetError, match=f"below one expert of each of 3 layers, {sum(sizes)} bytes"):
        set_hbm_budget(model, cache)
    assert all(layer._hbm is None for layer in model.layers)
    gc.collect()
    assert cache.layers == []
    set_hbm_budget(model, sum(sizes))
    assert model(torch.randn(2, 12)).shape == (2, 12)
    with pytest.raises(ValueError, match="Linear has no AdvancedMoELayer"):
        set_hbm_budget(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="policy='fifo' is not one of"):
        ExpertCache(0.5, "fifo")


def test_training_is_refused():
    cached, plain = twins(0.4)
    x = torch.randn(3, 12)
    with pytest.raises(ValueError, match=r"is training; call \.eval"):
        cached.train()(x)
    cached.eval()
    with torch.enable_grad(), pytest.raises(ValueError, match=r"run under torch\.no_grad"):
        cached(x.requires_grad_())
    with torch.enable_grad():
        assert not cached(x.detach())[0].requires_grad
    same_bits(cached, plain, x.detach())
    with pytest.raises(ValueError, match=r"is training; call \.eval"):
        AdvancedMoELayer(12, 12, 20, 5).train().set_hbm_budget(0.5)
    with pytest.raises(ValueError, match="is training"):
        set_hbm_budget(Stack().train(), 0.5)


def test_the_meta_device_is_refused():
    cached, plain = twins(0.4)
    with pytest.raises(ValueError, match="meta device"):
        cached.to("meta")
    same_bits(cached, plain, torch.randn(3, 12))


def test_no_memory_for_slots_is_said_and_the_layer_lives_on(monkeypatch):
    cached, plain = twins(0.4)
    empty = torch.empty

    def exhausted(*sizes, **options):
        if sizes and isinstance(sizes[0], tuple):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return empty(*sizes, **options)

    with monkeypatch.context() as patched:
        patched.setattr(cache_module.torch, "empty", exhausted)
        with pytest.raises(HbmMemoryError, match="no memory for 2 slots") as caught:
            cached(torch.randn(3, 12))
    assert "\n" not in str(caught.value)
    assert cached._hbm.cache.stats().used_bytes == 0
    assert cached._hbm.cache.stats().resident_by_layer == [[]]
    same_bits(cached, plain, torch.randn(3, 12))


def test_a_failure_amid_a_step_leaves_nothing_believed_resident(monkeypatch):
    cached, plain = twins(0.4)
    x = torch.randn(6, 12)
    same_bits(cached, plain, x)
    with monkeypatch.context() as patched:
        patched.setattr(cached.ops, "expert_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cached(x)
    assert cached._hbm.cache.stats().resident_by_layer == [[]]
    same_bits(cached, plain, x)


def test_host_memory_that_cannot_be_pinned_is_used_all_the_same(monkeypatch, caplog):
    cached, plain = twins(0.4)
    use_late_lane(cached._hbm.cache).asynchronous = True  # as on a GPU

    def refuse(tensor):
        raise RuntimeError("CUDA error: out of\nmemory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    to_host = cache_module.host_copy
    monkeypatch.setattr(cache_module, "host_copy", lambda tensor, pin: to_host(tensor, pin=True))
    same_bits(cached, plain, torch.randn(3, 12))
    assert cached._hbm.cache.stats().host_memory == "pageable: CUDA error: out of memory"
    assert "pageable: CUDA error: out of memory" in cached.features["expert_cache"].reason
    assert sum("cannot be pinned" in record.message for record in caplog.records) == 1


def test_a_graph_captures_a_wholly_resident_layer_only(monkeypatch):
    monkeypatch.setattr(cache_module, "is_capturing", lambda device: True)
    part, _ = twins(0.4)
    with pytest.raises(ValueError, match="a CUDA graph cannot capture this layer: 0 of 5 experts are resident"):
        part(torch.randn(3, 12))
    whole, plain = twins(1.0)
    with pytest.raises(ValueError, match="call the layer once before capture"):
        whole(torch.randn(3, 12))
    monkeypatch.setattr(cache_module, "is_capturing", lambda device: False)
    whole(torch.randn(3, 12))
    monkeypatch.setattr(cache_module, "is_capturing", lambda device: True)
    same_bits(whole, plain, torch.randn(3, 12))
    whole.down_proj.mul_(2)
    with pytest.raises(ValueError, match="call the layer once before capture"):
        whole(torch.randn(3, 12))


# What is said


def test_features_and_stats_say_what_is_on():
    cached, plain = twins(0.4)
    assert plain.features["expert_cache"] == type(plain.features["triton"])(False, False, "pass hbm_budget=...")
    assert plain.get_performance_stats()["expert_cache"] is None
    stats = cached.get_performance_stats()["expert_cache"]
    assert stats.hit_rate is None
    assert stats.used_bytes == 0
    cached(torch.randn(9, 12))
    stats = cached.get_performance_stats()["expert_cache"]
    assert (stats.slots_by_layer, stats.budget, stats.policy, stats.prefetch) == ([2], 0.4, "lru", True)
    assert stats.used_bytes == stats.budget_bytes == 2 * cached._hbm.expert_bytes
    assert stats.counts.hits == 0
    assert stats.counts.misses == 5
    assert stats.host_memory == "not pinned: no GPU is used"
    feature = cached.features["expert_cache"]
    assert feature.active
    assert feature.reason.startswith(f"2 of 5 experts have slots of {cached._hbm.expert_bytes} bytes, policy auto")
    whole, _ = twins("1GiB")
    assert whole.features["expert_cache"].reason.endswith("the budget holds them all")


# The recorder of GPU runs


def test_the_recorder_runs_every_arm_and_goes_on_after_a_failure(tmp_path, capsys, monkeypatch):
    from moe_gpu.results import ExpertCacheRow, read_rows, select

    path = Path(__file__).resolve().parent.parent / "benchmarks" / "run_expert_cache.py"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("run_expert_cache", path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    ids = torch.rand(2, 512, 8).topk(2).indices.to(torch.int16)
    RoutingTrace(ids, 8, "made up").save(tmp_path / "trace.safetensors")
    monkeypatch.setattr(script, "TOKENS", (1, 16))
    monkeypatch.setattr(script, "SHARES", (0.25, 0.001))  # 0.001: no layer gets a slot
    output = tmp_path / "rows.jsonl"
    assert script.main([str(output), "--smoke", "--trace", str(tmp_path / "trace.safetensors")]) == 0
    rows = select(read_rows(output), ExpertCacheRow)
    measured = [row for row in rows if not row.simulated]
    assert len(measured) == 2 * (1 + 2 * len(script.ARMS))
    assert {row.status for row in measured if row.slots_per_layer > 1} == {"ok"}
    assert all(row.bit_exact and row.mean_ms > 0 for row in measured if row.status == "ok")
    failed = [row for row in measured if row.status == "failed"]
    assert len(failed) == 2 * len(script.ARMS)
    assert all("below one expert" in row.reason and row.hit_rate is None for row in failed)
    assert "10 arms wrong or failed" in capsys.readouterr().out
