"""nvidia-ml-py on a fake NVML library, in processes of their own: readings, every fault in every phase, threads."""

from __future__ import annotations

import json

import pytest

from tests.energy_cases import UUID, with_fake_nvml

CODES = {
    "UNINITIALIZED": 1,
    "INVALID_ARGUMENT": 2,
    "NOT_SUPPORTED": 3,
    "NO_PERMISSION": 4,
    "NOT_FOUND": 6,
    "DRIVER_NOT_LOADED": 9,
    "TIMEOUT": 10,
    "IRQ_ISSUE": 11,
    "FUNCTION_NOT_FOUND": 13,
    "GPU_IS_LOST": 15,
    "RESET_REQUIRED": 16,
    "UNKNOWN": 999,
}
PHASES = {"start": (0.0, 2.0), "middle": (2.0, 3.5), "end": (4.3, 9.0)}  # seconds of a window of 5
FATAL = {"GPU_IS_LOST", "RESET_REQUIRED"}

# A monitor and a sampler whose clock is the library's own, moved by hand in steps of 10 ms.
MOVED = """
from moe_gpu.energy_monitor import Clock, EnergyMonitor, PowerSampler
at = [10**12]
put(time_ns=at[0])
listeners = []
def pass_s(seconds):
    for _ in range(round(seconds / 0.01)):
        at[0] += 10**7
        put(time_ns=at[0])
        for listen in listeners:
            listen()
clock = Clock(lambda: at[0], pass_s)
def open_monitor(device=None):
    monitor = EnergyMonitor(device, clock=clock, background=False, synchronise=False)
    listeners[:] = [monitor.poll]
    return monitor
"""


def facts(code: str):
    """What the program printed last, as JSON."""
    return json.loads(with_fake_nvml(MOVED + code).stdout.splitlines()[-1])


# Each scenario leaves its facts in `told`; all run in one process, the library put back to what it was between them.
SCENARIOS = {
    "device": """
device = nvml.Device()
told = [asdict(device.sample(7)), device.name, device.driver_version(), device.shared_with_others(),
    nvml.driver_version(), nvml.device_count(), nvml.mig_mode(0), nvml.power_w(device.uuid),
    nvml.sm_clock_mhz(device.uuid), device.power_limit_w()]
put(fault_code=3, fault_where=2)
told.append(device.power_limit_w())
""",
    "processes": """
put(processes=2)
told = [nvml.Device().shared_with_others()]
put(processes=0)
told.append(nvml.Device().shared_with_others())
""",
    "mig": f"""
mig = nvml.Device("{UUID.replace("GPU", "MIG")}")
put(mig=1)
told = [[mig.scope, mig.uuid], *measure(3, "{UUID}"), nvml.Device().sample(1).gpu_util_pct]
""",
    "nobody": """
try:
    nvml.Device("GPU-nobody")
except nvml.NvmlUnavailableError as error:
    told = str(error)
""",
    "zeros": """
put(power_mw=0, counter_offset_mj=0)
told = [asdict(nvml.Device().sample(1)), *measure(3)]
""",
    "no counter": """
put(fault_code=3, fault_where=1)
told = measure(5)
""",
    "no counter and no instant power": """
put(instant=0, fault_code=3, fault_where=1)
told = measure(5)
""",
    "reset": """
told = measure(5, at_half=lambda: put(counter_offset_mj=5))
""",
    "no start": """
told = []
for code in (9, 4):
    put(fault_code=code, fault_where=8)
    for make in (EnergyMonitor, PowerSampler):
        try:
            make()
        except EnergyUnavailableError as error:
            told.append(str(error))
        told.append(make(on_unavailable="none").reason)
""",
    "faults": f"""
told = []
for name, code in {CODES!r}.items():
    for phase, (begin, end) in {PHASES!r}.items():
        warned.clear()
        put(fault_code=0, fault_where=7)
        monitor = open_monitor()
        sampler = PowerSampler(hz=10, clock=clock, background=False)
        def step(took=[0.0]):
            took[0] += 0.01
            inside = begin <= took[0] < end
            put(fault_code=code if inside else 0)
            if round(took[0] * 100) % 10 == 0:
                sampler.take()
        listeners.insert(0, step)
        if phase == "start":
            put(fault_code=code)
        with monitor.window("work", tokens=10) as window:
            pass_s(5.0)
        put(fault_code=0)
        listeners.remove(step)
        with monitor.window("next", tokens=10) as after:
            pass_s(5.0)
        told.append(dict(
            code=name, phase=phase, work=asdict(window.measurement), next=asdict(after.measurement),
            samples=[asdict(sample) for sample in sampler.timeline()], warned=list(warned),
            available=monitor.available, lost=sampler.lost,
        ))
        monitor.close()
""",
}


@pytest.fixture(scope="module")
def told():
    """The facts of every scenario by name."""
    return facts(
        f"""
import logging
from dataclasses import asdict
from moe_gpu.energy_monitor import EnergyUnavailableError
warned = []
class Keep(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger("moe_gpu").addHandler(Keep())
def measure(seconds, device=None, at_half=lambda: None):
    monitor = open_monitor(device)
    with monitor.window("work", tokens=3) as window:
        pass_s(seconds / 2)
        at_half()
        pass_s(seconds / 2)
    return [asdict(window.measurement)]
names = "power_mw tick_ms fault_code fault_first fault_calls fault_where mig processes reasons counter_offset_mj"
before = {{name: get(name) for name in [*names.split(), "instant"]}}
found = {{}}
for scenario, code in {SCENARIOS!r}.items():
    put(**before)
    listeners.clear()
    scope = dict(globals())
    exec(code, scope)
    found[scenario] = scope["told"]
print(json.dumps(found))
"""
    )


@pytest.fixture(scope="module")
def outcomes(told):
    """Of every fault in every phase: the window, the one after it, the sampler's samples, and what was warned."""
    return told["faults"]


def test_every_fault_was_tried_in_every_phase(outcomes):
    assert {(o["code"], o["phase"]) for o in outcomes} == {(code, phase) for code in CODES for phase in PHASES}
    assert len(outcomes) == 36


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("code", CODES)
def test_a_fault_leaves_a_right_number_or_none_and_a_mark_and_the_work_goes_on(code, phase, outcomes):
    o = next(o for o in outcomes if (o["code"], o["phase"]) == (code, phase))
    work, after = o["work"], o["next"]
    assert work["tokens"] == 10
    if work["energy_j"] is None:
        assert work["quality"] == "invalid"
        assert work["reason"]
        assert work["joules_per_token"] is None
    else:
        assert work["energy_j"] == pytest.approx(1500, rel=0.02)
    integrated = work["source"] == "integrated"
    if not integrated:
        assert work["failed_reads"] > 0
    if code in FATAL:
        assert work["energy_j"] is None
        assert after["energy_j"] is None
        assert code in work["reason"]
        assert not o["available"]
        assert o["lost"]
    else:
        assert after["energy_j"] == pytest.approx(1500, rel=0.02)
        assert o["available"]
    # What the faulty driver did not say is None in the samples, never 0, and everything else is right.
    for sample in o["samples"]:
        assert sample["power_instant_w"] in (None, 300.0)
        assert sample["gpu_util_pct"] in (None, 97)
        assert sample["temperature_c"] in (None, 40)
        assert sample["energy_counter_mj"] is None or sample["energy_counter_mj"] > 5_000_000
    gaps = [sample for sample in o["samples"] if sample["power_instant_w"] is None]
    assert gaps
    if code not in ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND"):
        assert all(code in sample["error"] for sample in gaps)


def test_a_window_that_is_blind_for_two_fifths_at_its_start_is_unknown_and_one_with_a_hole_inside_is_not(outcomes):
    for o in outcomes:
        if o["code"] in ("TIMEOUT", "UNKNOWN", "NO_PERMISSION"):
            assert (o["work"]["energy_j"] is None) == (o["phase"] == "start"), (o["code"], o["phase"], o["work"])


def test_a_missing_permission_is_warned_of_once_a_reading(outcomes):
    for o in outcomes:
        if o["code"] == "NO_PERMISSION":
            assert len(o["warned"]) == len(set(o["warned"]))
            assert any("may not read the GPU's temperature" in line for line in o["warned"])


def test_the_device_as_the_library_tells_it(told):
    sample, name, *rest = told["device"]
    assert sample == {
        "timestamp_ns": 7,
        "gpu_uuid": UUID,
        "scope": "gpu",
        "power_instant_w": 300.0,
        "power_average_w": 300.0,
        "memory_power_w": 60.0,
        "energy_counter_mj": sample["energy_counter_mj"],
        "temperature_c": 40,
        "sm_clock_mhz": 1980,
        "mem_clock_mhz": 3201,
        "gpu_util_pct": 97,
        "mem_util_pct": 41,
        "clocks_event_reasons": 0,
        "error": None,
    }
    assert name == "Fake GPU, no real one"
    assert rest == ["999.99", False, "999.99", 1, False, 300.0, 1980, 700.0, None]


def test_other_processes_are_seen(told):
    assert told["processes"] == [True, None]


def test_a_device_is_found_by_uuid_and_a_mig_device_is_read_through_its_gpu(told):
    mig, work, util = told["mig"]
    assert mig == ["parent_gpu", UUID]
    assert work["scope"] == "parent_gpu"
    assert work["energy_j"] == pytest.approx(900, rel=0.01)
    assert work["gpu_util_pct"] is util is None
    assert told["nobody"] == "NVML finds no GPU GPU-nobody: NOT_FOUND"


def test_zeros_for_unknown_are_unknown(told):
    """Some boards answer 0 mJ, and 0 mW, with success."""
    sample, work = told["zeros"]
    assert sample["energy_counter_mj"] is sample["power_instant_w"] is sample["power_average_w"] is None
    assert work["energy_j"] is work["joules_per_token"] is None


@pytest.mark.parametrize("scenario", ["no counter", "no counter and no instant power"])
def test_without_a_counter_power_serves(scenario, told):
    (work,) = told[scenario]
    assert work["source"] == "integrated"
    assert work["energy_j"] == pytest.approx(1500, rel=0.01)


def test_a_reset_counter_discards_the_window(told):
    (work,) = told["reset"]
    assert work["energy_j"] is None
    assert "went backwards" in work["reason"]


def test_a_driver_that_does_not_start_is_named(told):
    assert len(told["no start"]) == 8
    assert all(line.startswith("NVML does not start: ") for line in told["no start"])


def test_threads_read_the_real_library_survive_a_lost_gpu_and_end_with_the_program():
    told = facts(
        """
import threading, time
put(time_ns=0, tick_ms=4)
monitor = EnergyMonitor(poll_s=0.001)
sampler = PowerSampler(hz=50)
sampler.start()
with monitor.window("work") as window:
    time.sleep(0.3)
good = window.measurement
with monitor.window("lost") as window:
    time.sleep(0.1)
    put(fault_code=15, fault_where=7)
    time.sleep(0.1)
time.sleep(0.05)
left = [thread.name for thread in threading.enumerate() if thread.name.startswith("moe_gpu-")]
put(fault_code=0)
again = EnergyMonitor(poll_s=0.001)
again.begin_window("open when the program ends")
print(json.dumps([good.energy_j / good.duration_s, good.n_ticks, window.measurement.energy_j, left,
    len(sampler.timeline()), sampler.lost]))
"""
    )
    watts, ticks, lost_j, left, samples, lost = told
    assert watts == pytest.approx(300, rel=0.1)
    assert ticks >= 20
    assert lost_j is None
    assert left == []
    assert samples >= 10
    assert "GPU_IS_LOST" in lost
