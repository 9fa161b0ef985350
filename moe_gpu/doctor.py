"""What this machine can run: each part found or missing, and how to fix it. Imports nothing heavy until asked."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from moe_gpu import nvml

MIN_PYTHON = (3, 10)
MIN_CAPABILITY = (8, 0)
MIN_FREE_BYTES = 2 << 30
MIG_CONFIG = Path("/proc/driver/nvidia/capabilities/mig/config")

OK, MISSING = "ok", "missing"


@dataclass(frozen=True)
class Check:
    """One part of the machine: `status` is `ok` or `missing`, `fix` what to do; `needed` by the main job."""

    name: str
    status: str
    detail: str
    fix: str | None = None
    needed: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All checks; `can_run`: the main job runs here, on a GPU or the CPU; `limits`: what does not."""

    checks: list[Check]
    can_run: bool
    limits: list[str]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def package_version(distribution: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def module_found(module: str) -> bool:
    """Whether a module is installed, without importing it (only the packages that it lies in)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def check_python() -> Check:
    found = platform.python_version()
    if sys.version_info[:2] >= MIN_PYTHON:
        return Check("Python", OK, found, needed=True)
    return Check("Python", MISSING, f"{found}, below 3.10", "make run PYTHON=python3.11", needed=True)


def check_torch() -> Check:
    fix = "pip install 'torch>=2.11'"
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("PyTorch", MISSING, f"cannot be imported: {_one_line(error)}", fix, needed=True)
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    if not hasattr(torch.nn.functional, "grouped_mm") and not hasattr(torch, "_grouped_mm"):
        return Check("PyTorch", MISSING, f"{torch.__version__} ({cuda}) has no grouped_mm", fix, needed=True)
    return Check("PyTorch", OK, f"{torch.__version__}, {cuda}", needed=True)


def check_core() -> Check:
    """The small packages that every command needs."""
    absent = [name for name in ("numpy", "rich", "safetensors") if not module_found(name)]
    if absent:
        return Check("core packages", MISSING, ", ".join(absent), f"pip install {' '.join(absent)}", needed=True)
    return Check("core packages", OK, "numpy, rich, safetensors", needed=True)


def check_driver() -> Check:
    version = nvml.driver_version()
    if version:
        return Check("NVIDIA driver", OK, version)
    if shutil.which("nvidia-smi"):
        return Check("NVIDIA driver", MISSING, "nvidia-smi is there, the driver does not answer", "run nvidia-smi")
    return Check("NVIDIA driver", MISSING, "none found", "install the NVIDIA driver (only for a GPU)")


def check_gpu() -> Check:
    try:
        import torch
    except (ImportError, OSError):
        return Check("GPU", MISSING, "unknown without PyTorch", "fix PyTorch first")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Check("GPU", OK, ", ".join(names))
    if not torch.version.cuda and nvml.device_count():
        return Check("GPU", MISSING, "this PyTorch is built for the CPU", "install a CUDA build of torch>=2.11")
    return Check("GPU", MISSING, "no NVIDIA GPU: everything runs on the CPU", "use a machine with an NVIDIA GPU")


def gpu_capability() -> tuple[int, int] | None:
    """Compute capability of the first GPU, None without one."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None


def check_capability() -> Check:
    capability = gpu_capability()
    if capability is None:
        return Check("compute capability", MISSING, "no GPU", "the kernels need 8.0 (Ampere) or newer")
    text = f"{capability[0]}.{capability[1]}"
    if capability >= MIN_CAPABILITY:
        return Check("compute capability", OK, text)
    return Check("compute capability", MISSING, f"{text}, below 8.0", "use an Ampere or newer GPU; PyTorch serves here")


def check_triton() -> Check:
    if not module_found("triton"):
        return Check("Triton", MISSING, "not installed", "pip install 'triton>=3.6' (Linux)")
    return Check("Triton", OK, package_version("triton") or "version unknown")


def check_compiler() -> Check:
    """Triton compiles a small launcher in C for each kernel: it needs a compiler and Python's headers."""
    name, fix = "C compiler", "apt-get install gcc python3-dev (or name one in CC)"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not compiler or not shutil.which(compiler):
        return Check(name, MISSING, f"CC={compiler} is not a program" if compiler else "no gcc or clang", fix)
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return Check(name, MISSING, f"{compiler}, but no Python.h", fix)
    return Check(name, OK, f"{compiler}, Python.h")


def check_nvml() -> Check:
    try:
        with nvml.session():
            return Check("NVML", OK, f"{nvml.device_count()} GPU(s): clocks, power and temperature can be read")
    except nvml.NvmlUnavailableError as error:
        fix = "pip install nvidia-ml-py" if "not installed" in str(error) else "comes with the NVIDIA driver"
        return Check("NVML", MISSING, _one_line(error), fix)


def check_mig() -> Check:
    """Whether GPU 0 is in MIG mode and this process may create MIG instances."""
    mode = nvml.mig_mode(0)
    if mode is None:
        return Check("MIG", MISSING, "no GPU that offers MIG", "needs an A100, H100, H200 or B200")
    if not mode:
        return Check("MIG", MISSING, "off", "an administrator runs: nvidia-smi -i 0 -mig 1")
    device = mig_config_device()
    if device is None or not os.access(device, os.R_OK):
        return Check("MIG", MISSING, f"on, no permission for {device or MIG_CONFIG}", "run as root or get read access")
    return Check("MIG", OK, "on, instances may be created")


def mig_config_device() -> Path | None:
    """The device file that guards MIG configuration, None where the driver names none."""
    try:
        minor = re.search(r"DeviceFileMinor:\s*(\d+)", MIG_CONFIG.read_text())
    except OSError:
        return None
    return Path(f"/dev/nvidia-caps/nvidia-cap{minor.group(1)}") if minor else None


def check_package(name: str, module: str, distribution: str, gives: str, fix: str | None = None) -> Check:
    if module_found(module):
        return Check(name, OK, f"{package_version(distribution) or 'version unknown'}: {gives}")
    return Check(name, MISSING, f"not installed: no {gives}", fix or f"pip install {distribution}")


def check_transformers() -> Check:
    gives, fix = "moe_gpu.enable(model), peer transformers_grouped_mm", "pip install 'moe-gpu[hf]'"
    check = check_package("transformers", "transformers", "transformers", gives, fix)
    if check.status == OK and not module_found("transformers.integrations.moe"):
        version = package_version("transformers") or "version unknown"
        return Check("transformers", MISSING, f"{version} has no experts interface: no {gives}", fix)
    return check


def free_memory() -> tuple[str, int] | None:
    """Where tensors would go and how many bytes are free there; None where the system does not say."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    if torch.cuda.is_available():
        return "GPU", torch.cuda.mem_get_info(0)[0]
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return ("main memory", int(available.group(1)) * 1024) if available else None


def check_memory() -> Check:
    found = free_memory()
    if found is None:
        return Check("free memory", OK, "not measured: the system does not say")
    where, free = found
    detail = f"{free / 2**30:.1f} GiB of {where}"
    if free >= MIN_FREE_BYTES:
        return Check("free memory", OK, detail)
    return Check("free memory", MISSING, f"{detail}, below 2 GiB", "close other programs or choose smaller sizes")


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python,
    check_torch,
    check_core,
    check_gpu,
    check_driver,
    check_capability,
    check_triton,
    check_compiler,
    check_nvml,
    check_mig,
    check_memory,
    lambda: check_package("matplotlib", "matplotlib", "matplotlib", "plots", "pip install 'moe-gpu[viz]'"),
    lambda: check_package("tokenizers", "tokenizers", "tokenizers", "BPE in training", "pip install 'moe-gpu[train]'"),
    lambda: check_package("PyYAML", "yaml", "PyYAML", "YAML configurations", "pip install 'moe-gpu[train]'"),
    lambda: check_package(
        "tensorboard", "tensorboard", "tensorboard", "TensorBoard of a training", "pip install 'moe-gpu[metrics]'"
    ),
    lambda: check_package("textual", "textual", "textual", "dashboard of moe-gpu top", "pip install 'moe-gpu[live]'"),
    check_transformers,
    lambda: check_package("scattermoe", "scattermoe", "scattermoe", "peer scattermoe", "install from its repository"),
    lambda: check_package(
        "sonicmoe", "sonicmoe", "sonic-moe", "peer sonicmoe", "pip install sonic-moe (Hopper, newer)"
    ),
    lambda: check_package(
        "triton_kernels",
        "triton_kernels.matmul",
        "triton_kernels",
        "peer triton_kernels",
        "install python/triton_kernels from Triton's repository (the name on PyPI is another project)",
    ),
)


def diagnose() -> Diagnosis:
    """Run every check; nothing is changed, allocated or downloaded."""
    checks = [check() for check in CHECKS]
    missing = {check.name for check in checks if check.status != OK}
    limits = []
    if missing & {"GPU", "compute capability"}:
        limits.append("no usable GPU: plain PyTorch on the CPU, small shapes, every figure labelled CPU")
    elif missing & {"Triton", "C compiler"}:
        limits.append("no Triton kernels: plain PyTorch serves on the GPU")
    if "NVML" in missing:
        limits.append("clocks, power and temperature: not measured")
    if "MIG" in missing:
        limits.append("no MIG instances")
    if "matplotlib" in missing:
        limits.append("no PNG plots")
    return Diagnosis(checks, all(check.status == OK for check in checks if check.needed), limits)


def render(diagnosis: Diagnosis) -> str:
    """One line a check, then what follows from them."""
    width = max(len(check.name) for check in diagnosis.checks)
    lines = []
    for check in diagnosis.checks:
        fix = f"  -> {check.fix}" if check.fix and check.status != OK else ""
        lines.append(f"{check.status:<7}  {check.name:<{width}}  {check.detail}{fix}")
    lines.append("")
    lines += [f"limited: {limit}" for limit in diagnosis.limits]
    verdict = (
        "The main job runs here" if diagnosis.can_run else "The main job cannot run here: fix what is missing above"
    )
    lines.append(f"{verdict}: moe-gpu demo" if diagnosis.can_run else verdict)
    return "\n".join(lines)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
