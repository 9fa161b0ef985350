"""The cache's bookkeeping against brute-force models: policies, waves, contest, prefetching, budgets, simulation."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu.expert_cache import book as book_module
from moe_gpu.expert_cache import policies
from moe_gpu.expert_cache.book import NONE, CacheBook
from moe_gpu.expert_cache.budget import HbmBudgetError, parse_budget, split_budget
from moe_gpu.expert_cache.policies import (
    ADAPTIVE,
    EWMA_WEIGHT,
    PASS_THROUGH,
    Contest,
    Follower,
    History,
    PrefetchGate,
    in_order,
    settle,
)
from moe_gpu.expert_cache.simulate import SIMULATED, needed_by_step, next_use, run_simulation, simulate, slots_of
from moe_gpu.profiler import RoutingTrace

EXPERTS = 7


def ids(mask_E) -> set[int]:
    return set(np.flatnonzero(mask_E).tolist())


requests = st.lists(st.sets(st.integers(0, EXPERTS - 1)), min_size=1, max_size=40)
fitting = st.integers(3, EXPERTS).flatmap(
    lambda slots: st.tuples(
        st.just(slots),
        st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=slots), min_size=1, max_size=40),
    )
)


class Lru:
    """Least recently used, one access at a time, in an OrderedDict."""

    def __init__(self, slots: int) -> None:
        self.slots, self.held = slots, OrderedDict()

    def step(self, needed: set[int]) -> int:
        hits = len(needed & set(self.held))
        for expert in sorted(needed):
            self.held[expert] = None
            self.held.move_to_end(expert)
        while len(self.held) > self.slots:
            self.held.popitem(last=False)
        return hits


class Scored:
    """Least frequently used, or of least fading average, recomputed from the whole past each time."""

    def __init__(self, slots: int, policy: str) -> None:
        self.slots, self.policy, self.past, self.held = slots, policy, [], set()

    def score(self, expert: int) -> tuple[float, int, int]:
        uses = [step for step, needed in enumerate(self.past) if expert in needed]
        last = uses[-1] if uses else -1
        if self.policy == "lfu":
            return len(uses), last, expert
        age = len(self.past) - 1
        return sum(EWMA_WEIGHT * (1 - EWMA_WEIGHT) ** (age - step) for step in uses), last, expert

    def step(self, needed: set[int]) -> int:
        hits = len(needed & self.held)
        self.past.append(needed)
        others = sorted(self.held - needed, key=self.score, reverse=True)
        self.held = needed | set(others[: self.slots - len(needed)])
        return hits


@pytest.mark.parametrize("policy", ADAPTIVE)
@settings(max_examples=60, deadline=None)
@given(case=fitting)
def test_a_policy_keeps_what_its_definition_keeps(policy, case):
    slots, steps = case
    book = CacheBook([(EXPERTS, slots, 1)], policy, prefetch=False)
    model = Lru(slots) if policy == "lru" else Scored(slots, policy)
    hits = 0
    for needed in steps:
        hits += model.step(needed)
        book.plan(0, sorted(needed))
        assert book.layers[0].slot_of.keys() == set(model.held)
    assert book.counts.hits == hits
    assert book.counts.misses == book.counts.bytes_copied == sum(map(len, steps)) - hits


@settings(max_examples=150, deadline=None)
@given(steps=requests, slots=st.integers(1, EXPERTS), policy=st.sampled_from([*ADAPTIVE, "on-demand"]))
def test_waves_compute_every_needed_expert_once_from_the_slot_that_holds_it(steps, slots, policy):
    book = CacheBook([(EXPERTS, slots, 1)], policy, prefetch=True)
    layer, held = book.layers[0], np.full(slots, NONE)
    for needed in steps:
        if policy == "on-demand":
            held[:] = NONE
        before = {int(expert) for expert in held if expert != NONE}
        waves = book.plan(0, sorted(needed))
        assert sorted(expert for wave in waves for expert in wave.experts) == sorted(needed)
        for wave in waves:
            for load in wave.loads:
                held[load.slot] = load.expert
            assert held[wave.slots].tolist() == wave.experts
            assert len(set(wave.slots)) == len(wave.slots)
        assert sum(len(wave.loads) for wave in waves) == len(needed - before)
        missing = len(needed - before)
        assert len(waves) <= 1 + -(-missing // max(1, -(-slots // PASS_THROUGH)))
        assert len(waves) <= 2 or len(needed) > slots
        assert held.tolist() == layer.expert_of_S
        assert layer.slot_of == {expert: slot for slot, expert in enumerate(layer.expert_of_S) if expert != NONE}
        book.learn(0, sorted(needed))
        for load in book.prefetch(0, sorted(needed)):
            held[load.slot] = load.expert


subset = st.sets(st.integers(0, EXPERTS - 1))


@settings(max_examples=200, deadline=None)
@given(resident=subset, needed=subset, slots=st.integers(1, EXPERTS), order=st.permutations(range(EXPERTS)))
def test_what_stays_was_there_or_is_needed_and_the_best_stay(resident, needed, slots, order):
    resident = set(sorted(resident)[:slots])
    keys = [(rank, 0, expert) for expert, rank in enumerate(order)]
    leaving, passing = settle(resident, sorted(needed), keys, slots)
    assert set(leaving) <= resident
    assert set(passing) <= needed - resident
    keep = (resident | needed) - {*leaving, *passing}
    for group in (passing, [e for e in leaving if e in needed], [e for e in leaving if e not in needed]):
        assert group == sorted(group, key=lambda expert: order[expert])
    assert not needed.intersection(leaving[: len(set(leaving) - needed)]), "needed ones leave last"
    assert len(keep) == min(slots, len(resident | needed)) or (len(needed) > slots and len(keep) == slots)
    if len(needed) <= slots:
        assert needed <= keep
    else:
        assert keep <= needed
        missing = needed - resident
        assert len(keep & missing) >= min(len(missing), -(-slots // PASS_THROUGH))
    if len(needed) <= slots and keep - needed and resident - keep:
        assert min(order[e] for e in keep - needed) > max(order[e] for e in resident - keep)


# Which policy serves


def play(steps, slots, policy="auto", experts=32, prefetch=False) -> CacheBook:
    book = CacheBook([(experts, slots, 1)], policy, prefetch)
    for needed in steps:
        book.plan(0, sorted(needed))
        book.learn(0, sorted(needed))
        book.prefetch(0, sorted(needed))
    return book


def drifting(steps=600):
    """A working set that moves on for good every twelve steps: what was used often before is of no use."""
    generator = np.random.default_rng(0)
    for step in range(steps):
        base = step // 12 * 5
        yield {(base + int(i)) % 16 for i in generator.choice(5, size=3, replace=False)}


def faithful(steps=600):
    """Four experts that always come back, in turn, between passers-by that do not: recency is misled."""
    for step in range(steps):
        yield {step % 4, 4 + 2 * step % 28, 5 + 2 * step % 28}


@pytest.mark.parametrize(
    ("trace", "slots", "winners", "losers"),
    [(drifting, 6, {"lru"}, {"lfu"}), (faithful, 6, {"lfu", "ewma"}, {"lru"})],
    ids=["drifting", "faithful"],
)
def test_the_better_policy_is_chosen(trace, slots, winners, losers):
    rates = {}
    for policy in ADAPTIVE:
        counts = play(trace(), slots, policy).counts
        rates[policy] = counts.hits / (counts.hits + counts.misses)
    assert min(rates[w] for w in winners) > max(rates[x] for x in losers) + 0.1, "the trace tells them apart"
    book = play(trace(), slots)
    assert book.contest.serving in winners
    counts = book.counts
    assert counts.hits / (counts.hits + counts.misses) > max(rates.values()) - 0.05
    assert max(book.contest.scores().values()) == pytest.approx(max(rates.values()), abs=0.05)


def test_a_shift_of_the_load_changes_the_policy_and_little_noise_does_not():
    steps = [*faithful(), *drifting(1200)]
    contest = play(steps, 6).contest
    assert contest.serving == "lru"
    assert 2 <= contest.switches <= 6
    assert play(erratic(1500), 8).contest.switches <= 1


def test_a_fixed_policy_replays_no_shadows():
    contest = play(drifting(), 6, "lfu").contest
    assert contest.serving == "lfu"
    assert set(contest.scores().values()) == {None}


def test_shadows_are_what_the_policies_alone_would_do():
    steps = list(drifting(Contest.DWELL - 1))
    book = play(steps, 6)
    assert book.contest.serving == "lru"
    lone = {policy: play(steps, 6, policy).counts for policy in ADAPTIVE}
    assert book.layers[0].slot_of == play(steps, 6, "lru").layers[0].slot_of
    order = sorted(ADAPTIVE, key=lambda policy: lone[policy].hits)
    assert sorted(ADAPTIVE, key=lambda policy: book.contest.scores()[policy]) == order


# What deciding costs the host, in what it does rather than in time


def replay_layers(monkeypatch, sizes, steps, policy="auto"):
    """The layers of each shadow replay while every layer runs the steps, and how often somebody's leaving was asked."""
    watched, settled = [], []
    replay, leave = Contest._replay, policies.settle
    monkeypatch.setattr(Contest, "_replay", staticmethod(lambda *given: watched.append(layer) or replay(*given)))
    for module in (policies, book_module):
        monkeypatch.setattr(module, "settle", lambda *given: settled.append(layer) or leave(*given))
    book = CacheBook(sizes, policy, prefetch=False)
    for needed in steps:
        for layer in range(len(sizes)):
            book.plan(layer, sorted(needed))
            book.learn(layer, sorted(needed))
    return watched, settled


@pytest.mark.parametrize("layers", [1, 2, 4, 5, 16, 47])
def test_no_more_than_a_few_layers_have_shadows_and_they_are_spread(layers, monkeypatch):
    watched, _ = replay_layers(monkeypatch, [(16, 6, 1)] * layers, cyclic(3))
    assert len(watched) == 3 * len(ADAPTIVE) * len(set(watched))
    assert min(layers, 2) <= len(set(watched)) <= Contest.WATCHED
    gaps = np.diff([-1, *sorted(set(watched)), layers])
    assert gaps.max() <= 2 * -(-layers // Contest.WATCHED)


def test_only_partly_resident_layers_are_watched_and_fixed_policies_watch_none(monkeypatch):
    sizes = [(16, 16, 1), (16, 6, 1)] * 3
    assert set(replay_layers(monkeypatch, sizes, cyclic(2))[0]) == {1, 3, 5}
    assert replay_layers(monkeypatch, sizes, cyclic(2), "lfu")[0] == []


def test_a_step_without_misses_ranks_nobody(monkeypatch):
    _, settled = replay_layers(monkeypatch, [(16, 6, 1)], [{1, 2, 3}] * 50)
    assert len(settled) == 1 + len(ADAPTIVE), "of the first step, the real one and the shadows"


def test_an_average_that_is_scaled_back_orders_alike(monkeypatch):
    steps, plain, scaled = list(drifting(400)), History(16), History(16)
    monkeypatch.setattr(scaled, "TOP_GAIN", 10.0)
    for needed in steps:
        for history in (plain, scaled):
            history.record(sorted(needed))
        assert in_order(range(16), scaled.keys("ewma")) == in_order(range(16), plain.keys("ewma"))
    assert max(score for score, _, _ in scaled.keys("ewma")) < 1e3 < max(score for score, _, _ in plain.keys("ewma"))


# Prefetching


def cyclic(steps, experts=16, width=4):
    for step in range(steps):
        yield {(width * step + i) % experts for i in range(width)}


def test_prefetching_what_follows_gains_hits_and_stays_on():
    steps = list(cyclic(400))
    with_it, without = (play(steps, 6, "lru", prefetch=prefetch).counts for prefetch in (True, False))
    book = play(steps, 6, "lru", prefetch=True)
    assert without.hits == 0
    assert with_it.hits > 0.45 * sum(map(len, steps)), "two of four, each step"
    assert with_it.bytes_copied <= without.bytes_copied * 1.02, "earlier, not more"
    assert book.gate.on
    assert with_it.bytes_wasted < 0.05 * with_it.bytes_prefetched


def erratic(steps):
    """Nothing follows from anything."""
    generator = np.random.default_rng(2)
    for _ in range(steps):
        yield set(generator.choice(16, size=3, replace=False).tolist())


def test_prefetching_turns_itself_off_when_it_loses(monkeypatch):
    monkeypatch.setattr(policies, "EWMA_WEIGHT", 0.9)  # sure after one step, so that it falls for it
    steps = list(erratic(4000))
    book = play(steps, 5, "lru", prefetch=True)
    counts, gate = book.counts, book.gate
    assert counts.bytes_prefetched > 0
    gained = counts.prefetch_hits - counts.prefetch_victims
    assert gained < counts.bytes_wasted, "the trace is a trap"
    assert gate._pause > gate.FIRST_PAUSE, "it was turned off and is tried more rarely"
    for limit in ("OUTCOMES", "TRIAL"):
        monkeypatch.setattr(policies.PrefetchGate, limit, 1 << 40)
    unguarded = play(steps, 5, "lru", prefetch=True).counts
    assert counts.bytes_wasted < 0.2 * unguarded.bytes_wasted
    without = play(steps, 5, "lru").counts
    assert counts.bytes_copied < 1.03 * without.bytes_copied


def test_looking_stops_where_nothing_is_ever_found(monkeypatch):
    looks, notes = [], []
    expect, record = Follower.expect, Follower.record
    monkeypatch.setattr(Follower, "expect", lambda *given: looks.append(1) or expect(*given))
    monkeypatch.setattr(Follower, "record", lambda *given: notes.append(1) or record(*given))
    book = play(erratic(20_000), 12, "lru", prefetch=True)
    assert book.counts.bytes_prefetched == 0
    trials = 7  # pauses of 256 + 512 + ... fit that often
    assert (trials - 1) * PrefetchGate.TRIAL < len(looks) <= trials * PrefetchGate.TRIAL
    assert len(looks) < len(notes) <= trials * (PrefetchGate.TRIAL + PrefetchGate.WARM_UP)


def gate_after(gained, wasted, host_s, copy_s) -> PrefetchGate:
    gate = PrefetchGate(num_layers=2)
    gate.gained, gate.wasted, gate.host_s, gate.copy_s = gained, wasted, host_s, copy_s
    gate.tick()
    return gate


def test_host_time_counts_in_copies():
    assert gate_after(30, 4, 0.0, 1e-3).on
    assert gate_after(30, 4, 25e-3, 1e-3).on
    assert not gate_after(30, 4, 27e-3, 1e-3).on, "27 copies' worth of host time for 26 copies"
    assert gate_after(30, 4, 27e-3, None).on, "what a copy takes is not known"
    assert not gate_after(16, 16, 0.0, None).on, "no gain"
    assert gate_after(3, 1, 1.0, 1e-3).on, "too early to say"


def test_a_gate_listens_again_before_its_pause_ends():
    gate = gate_after(0, 32, 0.0, None)
    heard = []
    while not gate.on:
        heard.append(gate.listening)
        gate.host_s += 1.0
        gate.tick()
    assert gate.host_s == 0
    assert heard == [False] * (2 * (256 - PrefetchGate.WARM_UP)) + [True] * (2 * PrefetchGate.WARM_UP)
    for _ in range(2 * PrefetchGate.TRIAL):
        gate.tick()
    assert not gate.on
    assert gate._left == 2 * 512, "the next pause is longer"


def test_on_demand_never_prefetches_and_never_hits():
    counts = play(cyclic(50), 8, "on-demand", prefetch=True).counts
    assert (counts.hits, counts.bytes_prefetched, counts.misses) == (0, 0, 200)


# Budgets


@pytest.mark.parametrize(
    ("text", "value"),
    [(5, 5), ("5", 5), ("8GiB", 8 << 30), ("1.5 kb", 1500), ("2TB", 2 * 10**12), (0.5, 0.5), ("50%", 0.5), (1.0, 1.0)],
)
def test_budgets_that_can_be_read(text, value):
    assert parse_budget(text) == value
    assert type(parse_budget(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [0, -1, "-5GiB", "lots", "8 GiBs", "", "0", "0%", "120%", 0.0, -0.5, 1.5, float("nan"), float("inf"), True, None],
)
def test_budgets_that_cannot_be_read_are_named(text):
    with pytest.raises(HbmBudgetError, match="hbm_budget=") as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 1000)), min_size=1, max_size=6),
    share=st.floats(0.01, 1.2),
)
def test_a_division_stays_within_the_budget_and_treats_layers_alike(layers, share):
    total = sum(experts * size for experts, size in layers)
    limit = max(1, int(share * total))
    if limit < sum(size for _, size in layers):
        with pytest.raises(HbmBudgetError, match=f"of {limit} bytes is below one expert"):
            split_budget(limit, layers)
        return
    slots = split_budget(limit, layers)
    assert sum(n * size for n, (_, size) in zip(slots, layers, strict=True)) <= limit
    assert all(1 <= n <= experts for n, (experts, _) in zip(slots, layers, strict=True))
    if limit >= total:
        assert slots == [experts for experts, _ in layers]
    if len({size for _, size in layers}) == len({experts for experts, _ in layers}) == 1:
        assert max(slots) - min(slots) <= 1


# Simulation


def random_trace(tokens=120, experts=8, layers=2, top_k=2, seed=0) -> RoutingTrace:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, tokens, experts, generator=generator) + torch.randn(
        layers, 1, experts, generator=generator
    )
    return RoutingTrace(scores.topk(top_k).indices.to(torch.int16), experts, "random")


def test_steps_and_next_uses_of_a_trace():
    trace = RoutingTrace(torch.tensor([[[0, 1], [1, 2], [-1, 3], [0, 9]]], dtype=torch.int16), 4, "by hand")
    needed = needed_by_step(trace, 1)
    assert [ids(step[0]) for step in needed] == [{0, 1}, {1, 2}, {3}, {0}]
    assert [ids(step[0]) for step in needed_by_step(trace, 3)] == [{0, 1, 2, 3}, {0}]
    assert next_use(needed)[:, 0].tolist() == [[3, 1, 1, 2], [3, 4, 4, 2], [3, 4, 4, 4], [4, 4, 4, 4]]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), slots=st.integers(3, 8), tokens=st.integers(1, 2))
def test_nothing_beats_knowing_the_future_and_everything_beats_keeping_nothing(seed, slots, tokens):
    trace = random_trace(60, seed=seed)
    if tokens * trace.top_k > slots:
        slots = tokens * trace.top_k
    rows = {
        policy: simulate(trace, slots, policy, tokens_per_step=tokens, prefetch=False, expert_bytes=10)
        for policy in SIMULATED
    }
    for row in rows.values():
        assert rows["optimal"].copies <= row.copies <= rows["on-demand"].copies
        assert row.hits + row.misses == rows["on-demand"].misses
        assert row.bytes_copied == 10 * row.copies
        assert row.simulated
        assert row.p50_ms is None
    assert rows["on-demand"].hit_rate == 0


def test_a_cache_of_every_expert_misses_each_once():
    trace = random_trace()
    row = simulate(trace, 8, "auto")
    assert row.misses == row.copies == trace.counts_LE().count_nonzero()
    assert row.evictions == 0


def test_what_cannot_be_simulated_is_refused(tmp_path):
    trace = random_trace()
    with pytest.raises(ValueError, match="budget_experts=9 must be from 1 to the trace's 8"):
        simulate(trace, 9)
    with pytest.raises(ValueError, match="policy='fifo' is not one of"):
        simulate(trace, 4, "fifo")
    with pytest.raises(ValueError, match="tokens_per_step=0"):
        simulate(trace, 4, tokens_per_step=0)
    with pytest.raises(ValueError, match="holds no tokens"):
        simulate(RoutingTrace(torch.empty(1, 0, 2, dtype=torch.int16), 4, "empty"), 2)
    for budget in ("0", "9", "8GiB", "200%", "few"):
        with pytest.raises(HbmBudgetError):
            slots_of(budget, 8)
    assert [slots_of(budget, 8) for budget in ("3", "25%", "1%", "100%")] == [3, 2, 1, 8]


def test_a_file_is_simulated_into_a_table_and_rows(tmp_path, capsys):
    random_trace().save(tmp_path / "trace.safetensors")
    seen = []
    rows = run_simulation(
        tmp_path / "trace.safetensors", ["2", "50%"], ["lru", "auto"], progress=lambda *step: seen.append(step[0])
    )
    assert [(row.slots_per_layer, row.policy) for row in rows] == [(2, "lru"), (2, "auto"), (4, "lru"), (4, "auto")]
    assert seen == [0, 1, 2, 3, 4]
    shown = capsys.readouterr().out
    assert "simulated" in shown
    assert f"{rows[0].hit_rate:.1%}" in shown


def test_histories_rank_ties_by_last_use_then_id():
    history = History(4, [1, 1, 1, 1])
    history.record([2])
    history.record([0, 1])
    for policy in ("static", "lru"):
        assert in_order(range(4), history.keys(policy)) == [3, 2, 0, 1]
