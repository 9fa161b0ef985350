"""The experts of a transformers model under a budget: bits, what is refused, and what is put back."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from moe_gpu import ExpertCache, ExpertProfiler, disable, enable
from moe_gpu.expert_cache import HbmBudgetError, HbmMemoryError
from moe_gpu.expert_cache import cache as cache_module
from moe_gpu.model import Feature
from tests.cache_cases import LateLane, use_late_lane
from tests.training_cases import one_thread  # noqa: F401

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts interface")

from moe_gpu.huggingface import features, forward, get_performance_stats  # noqa: E402 they need transformers
from moe_gpu.huggingface.host_weights import StayingOnHost  # noqa: E402
from tests.huggingface_cases import (  # noqa: E402
    FUSED,
    VOCABULARY,
    attachment_of,
    check_outcome,
    expert_bytes,
    experts_of,
    make_fp8,
    make_model,
    prompt,
    run,
    state_of,
)


@contextmanager
def late_copies(model: nn.Module, cache: ExpertCache, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateLane]:
    """Copies that arrive as late as they may, and an error where one may overtake the wave that reads its slot."""
    late = use_late_lane(cache)
    ops = forward.operations(torch.device("cpu"))
    rows = type(ops).expert_rows
    slots = [attachment_of(experts).hbm for experts in experts_of(model)]

    def expert_rows(self, x_TH, routing, weights, activation, first_bin, num_experts, out_RO=None):
        out = rows(self, x_TH, routing, weights, activation, first_bin, num_experts, out_RO)
        counts = routing.offsets_P.diff()[first_bin : first_bin + weights.up_EGH.shape[0]]
        (own,) = [hbm for hbm in slots if hbm._slots and hbm._slots.up_EGH.data_ptr() == weights.up_EGH.data_ptr()]
        for slot in counts.nonzero().flatten().tolist():
            for stack in own._slots.tensors():
                if stack is not None:
                    late.read(stack[slot].data_ptr())
        return out

    with monkeypatch.context() as patched:
        patched.setattr(type(ops), "expert_rows", expert_rows)
        yield late


@pytest.mark.parametrize("name", sorted(FUSED))
def test_logits_from_slots_have_the_bits_of_resident_weights(name, monkeypatch):
    plain, model = make_model(name), make_model(name)
    enable(plain)
    modules, experts = len(experts_of(model)), experts_of(model)[0].num_experts
    for slots in range(1, experts + 1):
        cache = ExpertCache(slots * modules * expert_bytes(model))
        enable(model, hbm_budget=cache)
        with torch.no_grad(), late_copies(model, cache, monkeypatch) as late:
            for length in (9, 1, 3, 1, 1):
                tokens = prompt()[:, :length]
                expected = plain(tokens, use_cache=False).logits
                assert torch.equal(model(tokens, use_cache=False).logits, expected)
        stats = cache.stats()
        assert late.late > 0
        assert stats.slots_by_layer == [slots] * modules
        assert stats.counts.unread_steps == (5 * modules if slots == experts else 0)


def test_biases_and_experts_without_a_gate_run_from_slots():
    """No model of transformers has biases in this layout yet; NemotronH's gate is no gate."""
    for model in (make_model("nemotron_h", mlp_hidden_act="silu"), make_model("mixtral")):
        for experts in experts_of(model):
            if experts.has_gate:
                experts.has_bias = True
                experts.gate_up_proj_bias = nn.Parameter(torch.randn(6, 48))
                experts.down_proj_bias = nn.Parameter(torch.randn(6, 32))
        enable(model)
        with torch.no_grad():
            expected = model(prompt()).logits
            enable(model, hbm_budget=0.4)
            assert torch.equal(model(prompt()).logits, expected)
            assert len(get_performance_stats(model)) == 2


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_generated_tokens_are_those_of_eager_under_a_budget(name, static):
    model = make_model(name)
    options = dict(max_new_tokens=8, do_sample=False)
    if static:
        options["cache_implementation"] = "static"
    expected = model.generate(prompt(), **options)
    enable(model, hbm_budget="34%")
    assert torch.equal(model.generate(prompt(), **options), expected)
    counts = next(iter(get_performance_stats(model).values()))["expert_cache"].counts
    assert counts.hits > 0
    assert counts.misses > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_autocast_under_a_budget(dtype):
    plain, model = make_model("qwen3_moe"), make_model("qwen3_moe")
    enable(plain)
    enable(model, hbm_budget="50%")
    size = attachment_of(experts_of(model)[0]).hbm.expert_bytes
    with torch.no_grad():
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", dtype):
                assert torch.equal(model(prompt()).logits, plain(prompt()).logits)
        plain.to(dtype), model.to(dtype)  # transformers' own `to`: the weights change their dtype on the host
        assert torch.equal(model(prompt()).logits, plain(prompt()).logits)
    assert attachment_of(experts_of(model)[0]).hbm.expert_bytes == size * dtype.itemsize // 4
    assert experts_of(model)[0].down_proj.dtype == dtype
    disable(model)
    assert torch.equal(experts_of(model)[0].down_proj, experts_of(plain)[0].down_proj)


def test_what_does_not_fit_the_budget_or_the_meta_device_is_refused_by_to():
    model = make_model("qwen3_moe")
    enable(model, hbm_budget=2 * expert_bytes(model))
    with pytest.raises(HbmBudgetError, match="below one expert"):
        experts_of(model)[0].double()
    with pytest.raises(ValueError, match=r"cannot go to the meta device; .* moe_gpu\.disable"):
        model.to("meta")
    assert experts_of(model)[0].down_proj.dtype == torch.float32
    assert experts_of(model)[0].down_proj.device.type == "cpu"


def test_disable_puts_everything_back():
    model = make_model("qwen3_moe")
    experts_of(model)[1].down_proj.requires_grad_(False)
    before, expected = state_of(model), run(model)
    for budget in ("20%", "100%", ExpertCache("50%")):  # another budget each time, without a disable between
        enable(model, hbm_budget=budget)
        assert not any(p.requires_grad for experts in experts_of(model) for p in experts.parameters())
        assert type(vars(experts_of(model)[0])["_apply"]) is StayingOnHost
        with torch.no_grad():
            model(prompt())
    disable(model)
    assert state_of(model) == before
    check_outcome(run(model), expected)


def test_enabling_without_a_budget_takes_it_away_and_the_same_cache_serves_again():
    model, cache = make_model("qwen3_moe"), ExpertCache("50%")
    before = state_of(model)
    for _ in range(3):
        enable(model, hbm_budget=cache)
        assert len(cache.layers) == 2
        with torch.no_grad():
            model(prompt())
    enable(model)
    assert features(model)["model.layers.0.mlp.experts"]["expert_cache"] == Feature(False, False, "pass hbm_budget=...")
    gc.collect()
    assert cache.layers == []
    run(model)  # with gradients
    disable(model)
    assert state_of(model) == before


def spoil_own_gate(experts):
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[1]


def spoil_parametrised(experts):
    parametrize.register_parametrization(experts, "down_proj", nn.Identity())


def spoil_dtype(experts):
    experts.down_proj = nn.Parameter(experts.down_proj.data.double())


def spoil_sharded(experts):
    experts.down_proj.to_local = lambda: None  # as of a DTensor


REFUSED = {
    "own gate": ("mixtral", spoil_own_gate, "its own gate, activation or norm runs between its products"),
    "own activation": ("nemotron_h", lambda e: None, "its own gate, activation or norm runs between its products"),
    "transposed": ("mixtral", lambda e: setattr(e, "is_transposed", True), "its weights are transposed"),
    "parametrised": ("mixtral", spoil_parametrised, "its weights are parametrised: they are computed on every call"),
    "two dtypes": ("mixtral", spoil_dtype, "its weights have several dtypes"),
    "sharded": ("mixtral", spoil_sharded, "down_proj is sharded"),
    "meta": ("mixtral", lambda e: e.to("meta"), "gate_up_proj is on the meta device"),
}


@pytest.mark.parametrize(("name", "spoil", "reason"), REFUSED.values(), ids=REFUSED)
def test_layouts_that_slots_cannot_serve_are_refused_and_nothing_changes(name, spoil, reason):
    model = make_model(name)
    for experts in experts_of(model)[1 if name == "mixtral" else 0 :]:
        spoil(experts)
    before, cache = state_of(model), ExpertCache("50%")
    with pytest.raises(
        ValueError, match=rf"hbm_budget=0\.5 cannot serve model\.layers\.1\.\S+: {reason}; enable"
    ) as caught:
        enable(model, hbm_budget=cache)
    assert "\n" not in str(caught.value)
    assert state_of(model) == before
    assert cache.layers == []


def test_fp8_experts_under_a_budget_are_refused():
    with pytest.raises(ValueError, match="gate_up_proj is float8: it is dequantised on every call"):
        enable(make_fp8()[0].eval(), hbm_budget="50%")


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("lots", "hbm_budget='lots' is not a size"),
        (9216, "hbm_budget of 9216 bytes is below one expert of each of 2 layers"),
        (
            ExpertCache("50%", "static", profile_LE=[[1, 2, 3, 4, 5, 6]]),
            "profile_LE has 1 rows; give one for each of 2",
        ),
    ],
    ids=["unreadable", "too small", "another profile"],
)
def test_a_budget_that_does_not_do_changes_nothing(budget, said):
    model = make_model("qwen3_moe")
    before = state_of(model)
    with pytest.raises(ValueError, match=said) as caught:
        enable(model, hbm_budget=budget)
    assert "\n" not in str(caught.value)
    del caught
    assert state_of(model) == before


def test_a_budget_is_for_inference():
    model = make_model("qwen3_moe").train()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"mlp.experts is training; call model\.eval\(\) first"):
        enable(model, hbm_budget="50%")
    assert state_of(model) == before
    enable(model.eval(), hbm_budget="50%")
    with pytest.raises(ValueError, match=r"a gradient is asked for; run under torch\.no_grad"):
        model(prompt())
    with torch.no_grad(), pytest.raises(ValueError, match=r"experts are training; call model\.eval"):
        model.train()(prompt())


def test_host_memory_that_cannot_be_had_changes_nothing(monkeypatch):
    model = make_model("qwen3_moe")
    before = state_of(model)

    def refuse(tensor, pin):
        raise RuntimeError("DefaultCPUAllocator: not enough\nmemory")

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "host_copy", refuse)
        with pytest.raises(HbmMemoryError, match=r"keeps all experts in host memory, \d+ bytes") as caught:
            enable(model, hbm_budget="50%")
    assert "\n" not in str(caught.value)
    assert state_of(model) == before


def test_weights_that_do_not_fit_on_the_device_again_stay_on_the_host(monkeypatch):
    model = make_model("qwen3_moe")
    enable(model, hbm_budget="50%")
    before = state_of(model)

    def exhausted(tensor, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", exhausted)
        with pytest.raises(HbmMemoryError, match=r"no memory for the experts' weights, \d+ bytes, on cpu; make room"):
            disable(model)
    assert state_of(model) == before
    with torch.no_grad():
        got = model(prompt()).logits
    disable(model)
    enable(model)
    assert torch.equal(got, model(prompt()).logits)


def test_weights_loaded_later_are_used_after_copies_under_way_are_done(monkeypatch):
    model, other = make_model("qwen3_moe"), make_model("qwen3_moe", std=0.1)
    enable(other)
    cache = ExpertCache("50%")
    enable(model, hbm_budget=cache)
    waits = []
    monkeypatch.setattr(cache, "synchronize", lambda: waits.append(1))
    with torch.no_grad():
        model(prompt())
        waits.clear()
        model.load_state_dict(other.state_dict())
        assert len(waits) == 2
        assert torch.equal(model(prompt()).logits, other(prompt()).logits)
        assert not experts_of(model)[0].down_proj.requires_grad


def test_copies_share_the_budget_and_pickles_have_none():
    model = make_model("qwen3_moe")
    before = state_of(model)
    cache = ExpertCache(8 * expert_bytes(model))
    enable(model, hbm_budget=cache)
    with torch.no_grad():
        expected = model(prompt()).logits
        twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert cache.stats().slots_by_layer == [2] * 4
        for other in (twin, model, pickled):
            assert torch.equal(other(prompt()).logits, expected)
            other.double(), other.float()  # moves keep working
            assert torch.equal(other(prompt()).logits, expected)
    assert attachment_of(experts_of(twin)[0]).expert_cache is cache
    assert attachment_of(experts_of(pickled)[0]).expert_cache is None
    for other in (twin, pickled, model):
        disable(other)
        assert [names for _, names, _ in state_of(other)[1]] == [names for _, names, _ in before[1]]
        assert all(p.requires_grad for p in other.parameters())
        assert not any(m._load_state_dict_pre_hooks for m in experts_of(other))
        run(other)
    gc.collect()
    assert cache.layers == []


def test_a_model_is_not_kept_alive_by_its_flags():
    model = make_model("qwen3_moe")
    enable(model, ExpertProfiler(6, 2), use_cuda_graphs=True, hbm_budget="50%")
    gone = weakref.ref(experts_of(model)[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_compiled_model_breaks_its_graph_at_experts_under_a_budget():
    model = make_model("qwen3_moe")
    enable(model, hbm_budget="50%")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(prompt(), use_cache=False).logits
        torch.testing.assert_close(compiled(prompt(), use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="decides on the host which experts to load"):
            torch.compile(model, backend="eager", fullgraph=True)(prompt(), use_cache=False)
    assert get_performance_stats(model)["model.layers.0.mlp.experts"]["expert_cache"].counts.steps >= 4


def test_threads_that_share_a_budget_get_the_bits_of_resident_weights():
    model = make_model("qwen3_moe")
    prompts = [torch.randint(2, VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        enable(model)
        expected = [model(one).logits for one in prompts]
        enable(model, hbm_budget="34%")

    def differing(index: int) -> int:
        with torch.no_grad():
            return sum(not torch.equal(model(prompts[index]).logits, expected[index]) for _ in range(10))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(prompts)) as pool:
            assert sum(pool.map(differing, range(len(prompts)))) == 0
    finally:
        sys.setswitchinterval(interval)
