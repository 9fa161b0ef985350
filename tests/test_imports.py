"""Imports point one way, cost little, have no effect, and need no GPU, no Triton and no optional package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe_gpu

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_gpu"

LEAVES = {"config", "reference", "results", "files", "machine", "nvml", "extras"}
MANAGERS = {"profiler", "gpu_slice_manager", "expert_cache", "cuda_graph_manager", "energy_monitor", "energy_model"}
LAYERS = LEAVES | MANAGERS | {"energy_work", "slices", "expert_slices", "triton_kernels", "expert_parallel"}
LAYERS |= {"moe_layer", "model"}
TOOLS = {"benchmark", "training", "plots", "report", "console"}

# Room -> the rooms it may import (itself always). A room is a module of moe_gpu, or a folder of modules.
ALLOWED = {
    "__init__": set(),  # lazily, by name
    "config": set(),
    "nvml": set(),
    "extras": set(),
    "reference": {"config"},
    "files": set(),
    "results": {"files"},
    "machine": {"results", "nvml"},
    "triton_kernels": LEAVES,
    "expert_parallel": LEAVES | {"triton_kernels"},
    "slices": LEAVES,
    **dict.fromkeys(MANAGERS, LEAVES),
    "expert_cache": LEAVES | {"profiler"},  # its asynchronous copies and routing traces
    "profiler": LEAVES | {"triton_kernels"},  # its counters are added up by a kernel
    "gpu_slice_manager": LEAVES | {"slices", "profiler"},
    "cuda_graph_manager": LEAVES | {"slices"},  # work beside work runs in slices
    "energy_work": set(),
    "energy_model": LEAVES | {"energy_monitor", "energy_work"},  # it calibrates on windows
    "layer_energy": LEAVES | MANAGERS | {"energy_work", "explain", "triton_kernels"},
    "moe_layer": LEAVES | {"profiler"},
    "expert_slices": LEAVES | {"slices", "gpu_slice_manager", "triton_kernels"},
    "model": LAYERS | {"layer_energy"},
    "huggingface": LAYERS | {"layer_energy"},
    "chrome_trace": LEAVES | {"profiler"},
    "live": LAYERS | {"huggingface"},
    "training": LAYERS | {"live"},
    "benchmark": LAYERS,
    "plots": LEAVES,
    "report": LEAVES | {"plots"},
    "console": set(),
    "doctor": LAYERS | {"benchmark"},
    "explain": LEAVES | {"slices", "triton_kernels", "energy_work"},
    "tune_problem": LAYERS | {"benchmark", "explain"},
    "tune": LAYERS | {"benchmark", "console", "explain", "tune_problem"},
    "metrics": LAYERS | {"live"},
    "top": LEAVES | {"live", "console", "metrics"},
    "energy": LAYERS | {"benchmark", "console", "layer_energy", "metrics"},
    "runs": LAYERS | TOOLS | {"explain", "energy"},
    "profile_runs": LAYERS | TOOLS | {"runs"},
    "slice_runs": LAYERS,
    "slice_bench": LAYERS | {"benchmark", "console"},
    "demo": LAYERS | TOOLS | {"runs"},
    "cli": LAYERS
    | TOOLS
    | {"runs", "profile_runs", "slice_runs", "slice_bench", "doctor", "demo", "tune", "energy", "top"},
    "__main__": {"cli"},
}

OPTIONAL = (
    "triton",
    "matplotlib",
    "plotly",
    "transformers",
    "pynvml",
    "prometheus_client",
    "scattermoe",
    "sonicmoe",
    "triton_kernels",
    "tokenizers",
    "yaml",
    "tensorboard",
    "textual",
)
# Device code cannot be written without Triton at its top; only ops.py reaches it, and only where Triton serves.
DOOR = "moe_gpu.triton_kernels.ops"
DASHBOARD = "moe_gpu.top.app"  # is a class of textual; run_top imports it where textual is found


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported_rooms(path: Path) -> set[str]:
    """Every room of moe_gpu that the file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write `from moe_gpu...`"
            names = [node.module or ""]
            if node.module == "moe_gpu":
                names = [f"moe_gpu.{alias.name}" for alias in node.names if alias.name != "__version__"]
        found |= {room_of(name) for name in names if name.split(".")[0] == "moe_gpu"}
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_left(module):
    room = room_of(module)
    assert room in ALLOWED, f"{module} has no row in ALLOWED: say which rooms it may import"
    if room == "__init__":
        return  # the names that TYPE_CHECKING lists for type checkers
    wrong = imported_rooms(modules()[module]) - ALLOWED[room] - {room}
    assert not wrong, f"{module} imports {sorted(wrong)}; allowed: {sorted(ALLOWED[room])}"


def test_the_arrows_themselves_have_no_cycle():
    done: set[str] = set()
    rooms = dict(ALLOWED)
    while rooms:
        ready = [room for room, allowed in rooms.items() if allowed & set(rooms) <= {room}]
        assert ready, f"cycle among {sorted(rooms)}"
        done |= set(ready)
        for room in ready:
            del rooms[room]


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The packages named in argv[1] look as if they were not installed.
BLOCK = """
import sys
from importlib.machinery import PathFinder
installed, blocked = PathFinder.find_spec, set(sys.argv[1].split(","))
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in blocked else installed(name, path, target)
PathFinder.find_spec = find_spec
"""


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["torch", "numpy", "typer", "rich", *OPTIONAL]
    loaded = run(f"import sys, moe_gpu; print([name for name in {heavy} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_command_starts_without_torch():
    loaded = run(
        "import sys, moe_gpu.cli; print([name for name in ('torch', 'numpy', 'triton') if name in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_public_names_resolve_without_triton_or_optional_packages():
    code = BLOCK + "import moe_gpu\nprint(len([getattr(moe_gpu, name) for name in moe_gpu.__all__]))"
    assert int(run(code, ",".join(OPTIONAL))) == len(moe_gpu.__all__) > 10


def test_every_module_imports_without_optional_packages_threads_or_cuda():
    importable = sorted(
        name for name in modules() if name == DOOR or not name.startswith(("moe_gpu.triton_kernels.", DASHBOARD))
    )
    code = (
        BLOCK
        + f"""
import importlib, threading
for name in {importable}:
    importlib.import_module(name)
import torch
assert threading.active_count() == 1, threading.enumerate()
assert not torch.cuda.is_initialized()
print(len({importable}))
"""
    )
    assert int(run(code, ",".join(OPTIONAL))) == len(importable) > 8


def test_the_layer_runs_without_triton():
    code = (
        BLOCK
        + """
import torch, moe_gpu
layer = moe_gpu.AdvancedMoELayer(16, 16, 32, 4)
out, stats = layer(torch.randn(5, 16))
print(tuple(out.shape), stats.backend, layer.features["triton"].reason)
"""
    )
    assert run(code, ",".join(OPTIONAL)).strip() == "(5, 16) reference the package triton is not installed"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        moe_gpu.Nonsense  # noqa: B018


def test_requirements_file_equals_the_packaging():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = project["dependencies"] + project["optional-dependencies"]["viz"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == expected
