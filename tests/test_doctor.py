import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moe_gpu import doctor, nvml
from moe_gpu.doctor import MISSING, OK, Check


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nvml, "driver_version", lambda: None)
    monkeypatch.setattr(nvml, "mig_mode", lambda index: None)
    monkeypatch.setattr(nvml, "device_count", lambda: None)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (100 << 30, 140 << 30))
    monkeypatch.setattr(nvml, "driver_version", lambda: "580.1")
    monkeypatch.setattr(nvml, "mig_mode", lambda index: False)
    monkeypatch.setattr(nvml, "device_count", lambda: 1)


def hide(monkeypatch, *modules):
    original = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name, *rest: None if name in modules else original(name, *rest)
    )


def test_a_machine_without_a_gpu_can_run_and_says_what_is_limited(no_gpu):
    diagnosis = doctor.diagnose()
    found = {check.name: check for check in diagnosis.checks}
    assert diagnosis.can_run
    assert found["GPU"].status == MISSING
    assert found["NVIDIA driver"].status == MISSING
    assert found["compute capability"].status == MISSING
    assert any("CPU" in limit for limit in diagnosis.limits)
    assert any("not measured" in limit for limit in diagnosis.limits)


def test_whatever_is_missing_says_how_to_fix_it(no_gpu, monkeypatch):
    hide(monkeypatch, "triton", "matplotlib", "transformers", "scattermoe", "sonicmoe", "triton_kernels.matmul")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 60)
    checks = doctor.diagnose().checks
    missing = [check for check in checks if check.status == MISSING]
    assert len(missing) >= 12
    for check in missing:
        assert check.fix, check.name
        assert "\n" not in check.detail + check.fix
    for check in checks:
        assert check.status in (OK, MISSING)


def test_a_hopper_machine_is_not_limited_to_the_cpu(hopper):
    diagnosis = doctor.diagnose()
    found = {check.name: check for check in diagnosis.checks}
    assert found["GPU"].detail == "NVIDIA H200"
    assert found["compute capability"] == Check("compute capability", OK, "9.0")
    assert found["free memory"].detail == "100.0 GiB of GPU"
    assert not any("CPU" in limit for limit in diagnosis.limits)


def test_a_transformers_without_the_experts_interface_is_told_apart(monkeypatch):
    monkeypatch.setattr(doctor, "module_found", lambda module: module == "transformers")
    monkeypatch.setattr(doctor, "package_version", lambda distribution: "4.57.0")
    check = doctor.check_transformers()
    assert (check.status, check.fix) == (MISSING, "pip install 'moe-gpu[hf]'")
    assert check.detail.startswith("4.57.0 has no experts interface: no moe_gpu.enable(model)")
    monkeypatch.setattr(doctor, "module_found", lambda module: True)
    assert doctor.check_transformers().detail == "4.57.0: moe_gpu.enable(model), peer transformers_grouped_mm"


def test_every_finding_has_its_section_in_the_troubleshooting_page():
    page = (Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md").read_text()
    sections = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert sections == [check.name for check in doctor.diagnose().checks], "in doctor's order"


def test_an_old_gpu_falls_to_the_cpu_limits(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    check = doctor.check_capability()
    assert (check.status, check.detail) == (MISSING, "7.5, below 8.0")
    assert any("no usable GPU" in limit for limit in doctor.diagnose().limits)


def test_a_gpu_under_a_cpu_build_of_pytorch_is_told_apart(no_gpu, monkeypatch):
    monkeypatch.setattr(nvml, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA build" in doctor.check_gpu().fix


def test_without_pytorch_the_main_job_cannot_run(no_gpu, monkeypatch):
    monkeypatch.setitem(doctor.sys.modules, "torch", None)
    diagnosis = doctor.diagnose()
    assert not diagnosis.can_run
    assert diagnosis.checks[1].status == MISSING
    assert "cannot run here" in doctor.render(diagnosis)


def test_without_a_core_package_the_main_job_cannot_run(no_gpu, monkeypatch):
    hide(monkeypatch, "safetensors")
    diagnosis = doctor.diagnose()
    assert not diagnosis.can_run
    assert Check("core packages", MISSING, "safetensors", "pip install safetensors", needed=True) in diagnosis.checks


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    assert doctor.check_python().status == MISSING


@pytest.mark.parametrize(
    ("compiler", "header", "status", "detail"),
    [
        ("/usr/bin/gcc", True, OK, "Python.h"),
        ("/usr/bin/gcc", False, MISSING, "no Python.h"),
        (None, True, MISSING, "no gcc or clang"),
    ],
)
def test_triton_needs_a_compiler_and_headers(compiler, header, status, detail, monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: compiler if name in ("gcc", compiler) else None)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    if header:
        (tmp_path / "Python.h").touch()
    check = doctor.check_compiler()
    assert check.status == status
    assert detail in check.detail


def test_cc_that_is_no_program_is_named(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert doctor.check_compiler().detail == "CC=/nowhere/cc is not a program"


@pytest.mark.parametrize(
    ("mode", "readable", "status", "detail"),
    [
        (None, False, MISSING, "no GPU that offers MIG"),
        (False, False, MISSING, "off"),
        (True, False, MISSING, "no permission"),
        (True, True, OK, "instances may be created"),
    ],
)
def test_mig_permission(mode, readable, status, detail, monkeypatch, tmp_path):
    monkeypatch.setattr(nvml, "mig_mode", lambda index: mode)
    config = tmp_path / "config"
    config.write_text("DeviceFileMinor: 1\nDeviceFileMode: 256\n")
    monkeypatch.setattr(doctor, "MIG_CONFIG", config)
    assert doctor.mig_config_device() == Path("/dev/nvidia-caps/nvidia-cap1")
    monkeypatch.setattr(doctor.os, "access", lambda path, how: readable)
    check = doctor.check_mig()
    assert check.status == status
    assert detail in check.detail


def test_nvml_says_why_it_cannot_be_used(monkeypatch):
    @contextmanager
    def broken():
        raise nvml.NvmlUnavailableError("NVML does not start:\nDriver Not Loaded")
        yield

    monkeypatch.setattr(nvml, "session", broken)
    check = doctor.check_nvml()
    assert (check.status, check.detail) == (MISSING, "NVML does not start: Driver Not Loaded")


def test_little_memory_is_missing_memory(no_gpu, monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda: ("main memory", 1 << 30))
    check = doctor.check_memory()
    assert check.status == MISSING
    assert "1.0 GiB" in check.detail
    monkeypatch.setattr(doctor, "free_memory", lambda: None)
    assert "not measured" in doctor.check_memory().detail


def test_rendering_has_one_line_a_check_and_json_has_all_of_them(no_gpu):
    diagnosis = doctor.diagnose()
    lines = doctor.render(diagnosis).splitlines()
    assert [line.split()[0] for line in lines[: len(diagnosis.checks)]] == [c.status for c in diagnosis.checks]
    data = json.loads(json.dumps(diagnosis.to_dict()))
    assert [check["name"] for check in data["checks"]] == [check.name for check in diagnosis.checks]
    assert data["can_run"] is True
