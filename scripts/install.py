"""Create a virtual environment and install moe-gpu into it: `python3 install.py --venv .venv --extras viz`.

Runs on any Python 3 before anything is installed, so it uses the standard library alone and says what is missing.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MIN_PYTHON = (3, 10)

# Without an NVIDIA GPU: one exact release, so that pip takes a CPU wheel of it where one lies on the machine instead of
# the newest CUDA build. With a GPU: the current release. Triton's interpreter does not work with newer NumPy.
CPU_TORCH = "torch==2.13.0"
GPU_TORCH = "torch>=2.11"
NUMPY = "numpy<2.4"
# CUDA builds of PyTorch bring the Triton they were built for, CPU builds bring none.
TRITON = "triton==3.6.0"
# The newest release when last looked: the ahead-of-time tests compile with it too, from a folder of its own.
NEWEST_TRITON = "triton==3.9.0"
NEWEST_TRITON_FOLDER = "newest-triton"


def fail(message):
    sys.exit(f"moe-gpu: error: {message}")


def torch_packages(has_gpu, override):
    """What to install first; `override` (MOE_GPU_TORCH) replaces the choice of PyTorch."""
    if override:
        return [*shlex.split(override), NUMPY]
    return [GPU_TORCH if has_gpu else CPU_TORCH, NUMPY]


def create_venv(venv):
    if (venv / "bin" / "python").exists():
        return
    if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv"):
        command = [sys.executable, "-m", "venv", str(venv)]
    elif importlib.util.find_spec("virtualenv"):
        command = [sys.executable, "-m", "virtualenv", "--quiet", str(venv)]
    else:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        fail(
            f"{sys.executable} cannot create virtual environments (no ensurepip): run `apt-get install python3-venv` "
            f"(or python{version}-venv), or `{sys.executable} -m pip install virtualenv`, or choose another with "
            "make PYTHON=..."
        )
    if subprocess.run(command).returncode:
        shutil.rmtree(venv, ignore_errors=True)
        fail(f"could not create the virtual environment {venv}: see above")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--extras", required=True)
    arguments = parser.parse_args()
    if sys.version_info[:2] < MIN_PYTHON:
        found = f"{sys.version_info[0]}.{sys.version_info[1]}"
        fail(f"{sys.executable} is Python {found}; 3.10 or newer is needed: make PYTHON=python3.11 ...")
    root = Path(__file__).resolve().parent.parent
    create_venv(arguments.venv)
    pip = [str(arguments.venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    if not sys.stdout.isatty():
        pip.append("--quiet")
    if "dev" in arguments.extras.split(","):
        pip.append("--no-compile")  # a minute of bytecode, of which the tests import a tenth
    has_gpu = shutil.which("nvidia-smi") is not None
    first = torch_packages(has_gpu, os.environ.get("MOE_GPU_TORCH"))
    print(f"Installing into {arguments.venv} ({'NVIDIA GPU' if has_gpu else 'no GPU'}): {' '.join(first)}", flush=True)
    with ThreadPoolExecutor(1) as beside:  # pip works on one core
        if sys.platform == "linux" and "dev" in arguments.extras.split(","):
            beside.submit(install_newest_triton, pip, arguments.venv / NEWEST_TRITON_FOLDER)
        run_pip([*pip, *first])
        find_triton = "import importlib.util, sys; sys.exit(importlib.util.find_spec('triton') is None)"
        missing = sys.platform == "linux" and subprocess.run([pip[0], "-c", find_triton]).returncode
        # NumPy again, so that nothing moves it past the limit.
        run_pip([*pip, NUMPY, *([TRITON] if missing else []), "--editable", f"{root}[{arguments.extras}]"])


def install_newest_triton(pip, folder):
    """Beside the Triton in use, for the tests alone, which say when it is not there."""
    if list(folder.glob(NEWEST_TRITON.replace("==", "-") + "*.dist-info")):
        return
    if subprocess.run([*pip, "--no-deps", "--upgrade", "--target", str(folder), NEWEST_TRITON]).returncode:
        print(f"{NEWEST_TRITON} could not be installed: the ahead-of-time tests will leave it out", flush=True)


def run_pip(command):
    if subprocess.run(command).returncode:
        fail("installation failed: see pip's message above; run the same command again to go on")


if __name__ == "__main__":
    main()
