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


WAITED: list[int] = []  # streams there were each time that one was waited for


@pytest.fixture
def present(fake, monkeypatch):
    """An H200 that seems to be here; its streams tell how many there were when one was waited for."""
    cuda = SimpleNamespace(
        ExternalStream=lambda handle, device: SimpleNamespace(synchronize=lambda: WAITED.append(fake.fake_streams())),
        Stream=lambda index: ("stream", None),
        synchronize=lambda index: None,
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
    assert fake.fake_streams() == 2, "the former partitions were given back"
    WAITED.clear()
    manager.close()
    assert WAITED == [2, 2], "work in the partitions is waited for before they are given back"
    assert fake.fake_contexts() == 0


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
