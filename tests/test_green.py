"""Green contexts through a stand-in for the CUDA driver: disjoint parts, sizes read back, and nothing left behind."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.slices import backends, green
from moe_gpu.slices.backends import GreenContextBackend, availability, make_backend
from moe_gpu.slices.device import described_device
from moe_gpu.slices.green import GreenPartitions
from moe_gpu.slices.plan import BackendUnavailableError
from moe_gpu.slices.policies import SliceAllocationPolicy
from tests.stand_ins import compiled


@pytest.fixture(scope="module")
def driver():
    return compiled("cuda_green.c", "libcuda.so")


@pytest.fixture
def fake(driver, monkeypatch):
    monkeypatch.setattr(green, "LIBRARY", str(driver))
    monkeypatch.delenv("FAKE_GREEN", raising=False)
    monkeypatch.setattr(green, "_idle", {})
    library = ctypes.CDLL(str(driver))
    library.fake_reset()
    return library


def test_parts_are_disjoint_and_their_sizes_are_what_the_driver_gave(fake):
    parts = GreenPartitions(0, (32, 60, 8))
    assert parts.sms == [32, 64, 8], "60 was rounded by the driver"
    assert len(set(parts.streams)) == 3
    parts.close()
    assert fake.fake_contexts() == 0
    assert fake.fake_streams() == 0


@pytest.mark.parametrize(
    ("fault", "sizes", "said"),
    [
        (None, (64, 80), "asks for 80 SMs, 68 are left"),
        (None, (64, 66), "gives no green context of 66"),
        ("split", (64,), "cuDevSmResourceSplitByCount failed with CUDA error 801"),
        ("create", (64, 32), "cuGreenCtxCreate failed with CUDA error 2"),
        ("stream", (64,), "cuGreenCtxStreamCreate failed"),
    ],
)
def test_a_refusal_gives_back_what_was_made(fault, sizes, said, fake, monkeypatch):
    if fault:
        monkeypatch.setenv("FAKE_GREEN", fault)
    with pytest.raises(BackendUnavailableError, match=said):
        GreenPartitions(0, sizes)
    assert fake.fake_contexts() == 0
    assert fake.fake_streams() == 0


def test_without_a_driver_or_its_functions_the_reason_names_a_remedy(monkeypatch):
    h200 = described_device("H200")
    for library, said in [("libnowhere.so.9", "cannot be opened"), ("libc.so.6", "driver 550 or newer")]:
        monkeypatch.setattr(green, "LIBRARY", library)
        with pytest.raises(BackendUnavailableError, match=said) as refused:
            GreenContextBackend(h200)
        assert "backend='cta'" in str(refused.value)
    assert make_backend("green_context", h200).name == "green_context", "a described device is only planned for"
    assert set(availability(h200)) == {"device", "cta", "green_context", "mig"}


@pytest.fixture
def present(fake, monkeypatch):
    """An H200 that seems to be here, its streams named by their handles."""
    cuda = SimpleNamespace(
        ExternalStream=lambda handle, device: ("stream", handle), Stream=lambda index: ("stream", None)
    )
    monkeypatch.setattr(backends, "torch", SimpleNamespace(zeros=lambda *size, device: None, cuda=cuda))
    return replace(described_device("H200"), index=0)


def test_the_manager_shows_what_it_asked_for_and_what_it_got(present, fake):
    manager = AdvancedGPUSliceManager(4, SliceAllocationPolicy.STATIC, present, "green_context")
    assert [item.enforced for item in manager.slices] == [False], "the whole device is no slice"
    manager.allocate_slices(0, 2)
    manager.allocate_slices(1, 1)
    stats = manager.get_stats()
    assert [(item["asked_sms"], item["got_sms"], item["enforced"]) for item in stats["slices"]] == [
        (64, 64, True),
        (32, 32, True),
    ]
    assert (stats["simulated"], stats["note"]) == (False, None)
    assert "hardware" in stats["enforced_by"]
    assert manager.budget(1) == 32
    waits = fake.fake_waits()
    manager.close()
    assert fake.fake_waits() == waits + 2, "work in the partitions has ended before anyone else gets them"


def test_a_split_is_made_once_and_used_again_in_any_order(present, fake):
    manager = AdvancedGPUSliceManager(4, SliceAllocationPolicy.STATIC, present, "green_context")
    manager.allocate_slices(0, 2)
    manager.allocate_slices(1, 1)
    first, contexts, streams = manager.slices, fake.fake_contexts(), fake.fake_streams()
    stream = manager._backend.stream(manager._slice_of(0).index)
    for _ in range(20):
        manager.release_slices(0)
        manager.allocate_slices(0, 2)
    assert fake.fake_contexts() == contexts + 1, "that of tenant 1 alone"
    assert fake.fake_streams() == streams + 1
    manager.close()
    other = AdvancedGPUSliceManager(4, SliceAllocationPolicy.STATIC, present, "green_context")
    other.allocate_slices(5, 1)
    other.allocate_slices(6, 2)
    assert fake.fake_contexts() == contexts + 1
    assert {item.tenant: item.got_sms for item in other.slices} == {5: 32, 6: 64}
    assert {item.tenant: item.got_sms for item in first} == {0: 64, 1: 32}
    assert other._backend.stream(other._slice_of(6).index) == stream, "the same 64 SMs"
    other.close()


def test_partitions_in_use_are_nobody_elses(fake):
    first = green.take_partitions(0, (32, 64))
    second = green.take_partitions(0, (64, 32))
    assert not set(first.streams) & set(second.streams)
    assert [sms for sms, _ in first.in_order_of((32, 64))] == [32, 64]
    green.keep_partitions(first)
    assert green.take_partitions(0, (64, 32)) is first


def test_a_plan_that_the_driver_refuses_changes_nothing(present, fake, monkeypatch):
    manager = AdvancedGPUSliceManager(4, SliceAllocationPolicy.PROPORTIONAL, present, "green_context")
    manager.allocate_slices(0, 2)
    before = (manager.plan, manager.allocations, manager.get_stats(), len(manager.log), fake.fake_contexts())
    monkeypatch.setenv("FAKE_GREEN", "stream")
    for call in (lambda: manager.allocate_slices(1, 1), lambda: manager.optimize_allocations([1, 1])):
        with pytest.raises(BackendUnavailableError, match="use backend='cta'"):
            call()
        now = (manager.plan, manager.allocations, manager.get_stats(), len(manager.log), fake.fake_contexts())
        assert now == before


def test_a_budget_is_not_called_enforced(present):
    manager = AdvancedGPUSliceManager(4, SliceAllocationPolicy.STATIC, present, "cta")
    manager.allocate_slices(0, 2)
    item = manager.get_stats()["slices"][0]
    assert (item["asked_sms"], item["got_sms"], item["enforced"]) == (66, 66, False)
    assert "nothing keeps other kernels off" in manager.get_stats()["enforced_by"]
