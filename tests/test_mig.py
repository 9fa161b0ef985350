"""MIG layouts, placement and their application, on described GPUs and through a stand-in for NVML written in C."""

from __future__ import annotations

import ctypes
from itertools import combinations_with_replacement

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_gpu.slices.device import KNOWN_DEVICES, described_device
from moe_gpu.slices.mig import COMPUTE_SLICES, MEMORY_SLICES, MIGError, MIGManager, plan_layout
from tests.stand_ins import compiled

H200 = described_device("H200")


@pytest.fixture(scope="module")
def library():
    return ctypes.CDLL(str(compiled("nvml_mig.c", "libnvidia-ml.so")))


@pytest.fixture
def fake(library, monkeypatch):
    """The stand-in in place of NVML, with MIG off and no instances."""
    pynvml = pytest.importorskip("pynvml", reason="the package nvidia-ml-py is not installed")
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.delenv("FAKE_MIG", raising=False)
    library.fake_reset()
    return library


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=7), st.sampled_from(sorted(KNOWN_DEVICES)))
@settings(max_examples=60, deadline=None)
def test_a_layout_fits_the_gpu_and_gives_the_heavier_load_no_fewer_sms(loads, name):
    device = KNOWN_DEVICES[name]
    layout = plan_layout(name, device.mig_profiles, loads)
    assert sorted(placed.load_index for placed in layout.placements) == list(range(len(loads)))
    assert sum(placed.profile.compute_slices for placed in layout.placements) <= COMPUTE_SLICES
    cells = [placed.start + step for placed in layout.placements for step in range(placed.profile.memory_slices)]
    assert len(cells) == len(set(cells))
    assert max(cells) < MEMORY_SLICES
    assert layout.sms <= device.num_sms
    sms = {placed.load_index: placed.profile.sms for placed in layout.placements}
    assert all(sms[heavy] >= sms[light] for heavy in sms for light in sms if loads[heavy] > loads[light])


def test_no_layout_is_less_pressed_than_the_one_chosen():
    loads = (5.0, 2.0, 1.0)
    chosen = plan_layout("x", H200.mig_profiles, loads)

    def placeable(profiles, used=0):
        if not profiles:
            return True
        first, rest = profiles[0], profiles[1:]
        masks = [((1 << first.memory_slices) - 1) << start for start in first.starts]
        return any(placeable(rest, used | mask) for mask in masks if not mask & used)

    best = min(
        max(load / profile.sms for load, profile in zip(loads, trio, strict=True))
        for trio in (
            sorted(some, key=lambda profile: -profile.sms)
            for some in combinations_with_replacement(H200.mig_profiles, 3)
        )
        if sum(profile.compute_slices for profile in trio) <= COMPUTE_SLICES and placeable(list(trio))
    )
    assert max(loads[p.load_index] / p.profile.sms for p in chosen.placements) == pytest.approx(best)


def test_memory_counts_and_what_does_not_fit_is_refused():
    layout = plan_layout("x", H200.mig_profiles, [1, 10], [60 << 30, 1 << 30])
    light = next(placed.profile for placed in layout.placements if placed.load_index == 0)
    assert light.memory_bytes >= 60 << 30
    for loads, memory, said in [
        ([1, 1], [100 << 30, 60 << 30], "fit no MIG layout"),
        ([1] * 8, None, "8 loads exceed the 7"),
        ([0, 0], None, "not all 0"),
        ([1, -1], None, "from 0 on"),
        ([1, 1], [1], "1 memory sizes"),
    ]:
        with pytest.raises(MIGError, match=said):
            plan_layout("x", H200.mig_profiles, loads, memory)
    with pytest.raises(MIGError, match="offers no MIG"):
        plan_layout("NVIDIA T4", (), [1])


def test_the_commands_name_profiles_and_placements():
    layout = MIGManager(device=H200).plan([3, 1])
    first, second = layout.placements
    tuples = f"{first.profile.profile_id}:{first.start},{second.profile.profile_id}:{second.start}"
    assert layout.commands(2) == ["nvidia-smi -i 2 -mig 1", f"nvidia-smi mig -i 2 -cgi {tuples} -C"]
    assert len(layout.commands(2, enable=False)) == 1
    with pytest.raises(MIGError, match="described, not present"):
        MIGManager(device=H200).apply(layout)


def test_profiles_are_read_as_the_driver_gives_them(fake):
    profiles = {profile.name: profile for profile in MIGManager().profiles()}
    assert set(profiles) == {profile.name for profile in H200.mig_profiles}, "those with video engines are left out"
    for known in H200.mig_profiles:
        read = profiles[known.name]
        assert (read.profile_id, read.sms, read.compute_slices, read.memory_slices, read.starts) == (
            known.profile_id,
            known.sms,
            known.compute_slices,
            known.memory_slices,
            known.starts,
        )
    assert not MIGManager().enabled()
    assert MIGManager().instances() == ()


def test_a_layout_is_applied_and_jobs_are_placed_by_load(fake):
    manager = MIGManager()
    layout = manager.plan([4, 1, 1])
    made = manager.apply(layout)
    assert sorted(instance.sms for instance in made) == sorted(placed.profile.sms for placed in layout.placements)
    assert manager.enabled()
    largest = max(made, key=lambda instance: instance.sms)
    assert manager.place("training", 10) == largest
    others = {manager.place("a", 2).uuid, manager.place("b", 2).uuid}
    assert len(others) == 2
    assert largest.uuid not in others
    with pytest.raises(MIGError, match="placed already"):
        manager.place("a", 1)
    with pytest.raises(MIGError, match=r"has 500\.0 GiB"):
        manager.place("huge", 1, 500 << 30)
    manager.remove("training")
    assert manager.place("next", 1) == largest
    with pytest.raises(MIGError, match="'gone' is not placed"):
        manager.remove("gone")
    with pytest.raises(MIGError, match="instances already"):
        manager.apply(layout)
    assert fake.fake_instances() == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("noperm", "no permission"),
        ("noperm_look", "no permission"),
        ("busy", "1 processes compute on it"),
        ("nosup", "offers no MIG"),
        ("pending", "gpu-reset"),
        ("second", "NVML refused"),
    ],
)
def test_a_refusal_names_its_remedy_and_leaves_the_gpu_as_it_was(fault, said, fake, monkeypatch):
    layout = MIGManager().plan([1, 1])
    monkeypatch.setenv("FAKE_MIG", fault)
    with pytest.raises(MIGError, match=said) as refused:
        MIGManager().apply(layout)
    assert "\n" not in str(refused.value)
    assert fake.fake_instances() == 0
    assert fake.fake_mode() == 0


def test_a_layout_of_another_gpu_and_a_gpu_that_is_not_there_are_refused(fake):
    other = plan_layout("NVIDIA A100-SXM4-80GB", described_device("A100").mig_profiles, [1])
    with pytest.raises(MIGError, match="is NVIDIA H200; plan it again"):
        MIGManager().apply(other)
    with pytest.raises(MIGError, match="GPU 3"):
        MIGManager(3).instances()
    assert fake.fake_mode() == 0


def test_without_a_driver_the_reason_is_one_line():
    pynvml = pytest.importorskip("pynvml", reason="the package nvidia-ml-py is not installed")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(MIGError, match="offers no MIG") as refused:
            MIGManager().instances()
        assert "\n" not in str(refused.value)
    else:
        pytest.skip("this machine has an NVIDIA driver")
