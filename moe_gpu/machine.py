"""describe_machine: what a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_gpu.results import Machine

if TYPE_CHECKING:
    import torch


def _version(module: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> Machine:
    """The machine that `device` belongs to, as it is now; MOE_GPU_COMMIT names the commit outside a checkout."""
    import torch

    commit = os.environ.get("MOE_GPU_COMMIT") or _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    common: dict[str, Any] = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        os=platform.platform(terse=True),
        recorded_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit,
        commit_dirty=None if status is None else bool(status),
        num_threads=torch.get_num_threads(),
    )
    if device.type != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
        return Machine(device=_cpu_name(), device_type="cpu", memory_bytes=memory, **common)
    properties = torch.cuda.get_device_properties(device)
    return Machine(
        device=properties.name,
        device_type="cuda",
        cuda=torch.version.cuda,
        driver=_driver_version(),
        compute_capability=f"{properties.major}.{properties.minor}",
        num_sms=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=getattr(properties, "L2_cache_size", None),
        **common,
    )


def _driver_version() -> str | None:
    from moe_gpu import nvml

    return nvml.driver_version()
