"""What `make run` and `make test` rest on: which PyTorch is installed, and that no failure is lost in the sum."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run_tests():
    return load("run_tests")


@pytest.fixture(scope="module")
def install():
    return load("install")


def test_the_choice_of_pytorch(install):
    assert install.torch_packages(False, None) == ["torch==2.13.0", "numpy<2.4"]
    assert install.torch_packages(True, None) == ["torch>=2.11", "numpy<2.4"]
    assert install.torch_packages(False, "torch==2.12.0 --pre") == ["torch==2.12.0", "--pre", "numpy<2.4"]


@pytest.mark.parametrize(("has_triton", "added"), [(True, []), (False, ["triton==3.6.0"])])
def test_triton_is_added_where_pytorch_brings_none(has_triton, added, install, monkeypatch, tmp_path):
    commands = []

    def run(command):
        commands.append(command)
        missing = command[1] == "-c" and not has_triton
        return subprocess.CompletedProcess(command, 1 if missing else 0)

    monkeypatch.delenv("MOE_GPU_TORCH", raising=False)
    monkeypatch.setattr(install, "create_venv", lambda venv: None)
    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.sys, "argv", ["install.py", "--venv", str(tmp_path), "--extras", "dev"])
    install.main()
    (newest,) = [command for command in commands if "--target" in command]
    commands.remove(newest)  # whenever it was: it is installed beside the others
    torch_first, _, project = commands
    assert any(word.startswith("torch") for word in torch_first)
    last = project[project.index("numpy<2.4") :]
    assert last == ["numpy<2.4", *added, "--editable", f"{ROOT}[dev]"]
    assert newest[-3:] == ["--target", str(tmp_path / install.NEWEST_TRITON_FOLDER), install.NEWEST_TRITON]


def test_a_newest_triton_that_cannot_be_had_fails_nothing(install, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(install.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    install.install_newest_triton(["pip"], tmp_path)
    assert "could not be installed" in capsys.readouterr().out


def test_a_newest_triton_that_is_there_is_kept(install, monkeypatch, tmp_path):
    (tmp_path / (install.NEWEST_TRITON.replace("==", "-") + ".dist-info")).mkdir()
    monkeypatch.setattr(install.subprocess, "run", lambda command: pytest.fail("installed again"))
    install.install_newest_triton(["pip"], tmp_path)


def test_the_newest_triton_is_found_where_it_is_installed(install, run_tests):
    assert Path(sys.prefix) / install.NEWEST_TRITON_FOLDER == run_tests.NEWEST_TRITON


def test_tests_run_with_the_newest_triton_or_say_that_it_is_missing(run_tests, monkeypatch, tmp_path, capfd):
    (tmp_path / "test_cases.py").write_text(
        "import os, triton\ndef test_newest(): assert triton.NEWEST and os.environ['MOE_GPU_OTHER_TRITON'] == '1'\n"
    )
    arguments = [str(tmp_path / "test_cases.py"), f"--rootdir={tmp_path}"]
    monkeypatch.setattr(run_tests, "NEWEST_TRITON", tmp_path / "newest")
    tally = run_tests.run_with_newest_triton("cases", arguments, {})
    assert (tally.passed, tally.skipped) == (0, 1)
    (tmp_path / "newest" / "triton").mkdir(parents=True)
    (tmp_path / "newest" / "triton" / "__init__.py").write_text("NEWEST = True\n")
    tally = run_tests.run_with_newest_triton("cases", arguments, {})
    assert (tally.passed, tally.failed, tally.skipped) == (1, 0, 0)


def test_a_python_without_ensurepip_is_told_the_remedy(install, monkeypatch, tmp_path):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"no ensurepip.*apt-get install python3-venv.*make PYTHON="):
        install.create_venv(tmp_path / "venv")


def test_an_old_python_is_told_the_remedy(install, monkeypatch):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 0))
    monkeypatch.setattr(install.sys, "argv", ["install.py", "--venv", "v", "--extras", "dev"])
    with pytest.raises(SystemExit, match=r"Python 3\.9; 3\.10 or newer is needed"):
        install.main()


CASES = """
import pytest
def test_right(): pass
def test_also_right(): pass
def test_wrong(): assert False
@pytest.mark.skip(reason="no GPU here")
def test_skipped(): pass
@pytest.fixture
def broken(): raise OSError
def test_error(broken): pass
"""


def test_every_outcome_is_counted(run_tests, tmp_path, capfd):
    (tmp_path / "test_cases.py").write_text(CASES)
    tally = run_tests.run_pytest("cases", [str(tmp_path), f"--rootdir={tmp_path}"], {})
    assert (tally.passed, tally.failed, tally.skipped) == (2, 2, 1)
    assert tally.skips == {("tests", "no GPU here"): 1}


@pytest.mark.parametrize(
    "content",
    ["import os\ndef test_right(): pass\ndef test_crash(): os._exit(11)\n", "import nothing_of_this_name\n", ""],
)
def test_a_process_that_dies_or_runs_nothing_is_a_failure(content, run_tests, tmp_path, capfd):
    (tmp_path / "test_cases.py").write_text(content)
    tally = run_tests.run_pytest("cases", [str(tmp_path), f"--rootdir={tmp_path}"], {})
    assert tally.failed == 1


def test_gpu_skips_are_counted_apart(run_tests, tmp_path):
    path = tmp_path / "junit.xml"
    skip = '<skipped type="pytest.skip" message="needs an NVIDIA GPU"/>'
    path.write_text(
        f'<testsuites><testsuite><testcase classname="tests.gpu.test_kernels">{skip}</testcase>'
        f'<testcase classname="tests.test_model">{skip}</testcase></testsuite></testsuites>'
    )
    assert run_tests.read_junit(path).skips == {
        ("GPU tests", "needs an NVIDIA GPU"): 1,
        ("tests", "needs an NVIDIA GPU"): 1,
    }


def dry_run(*arguments, **environment):
    """What make would run; not told of the make that may be running this test."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "MOE_GPU"))
    }
    inherited = {name: value for name, value in inherited.items() if name not in ("VENV", "PYTHON", "ARGS", "OUTPUT")}
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_make_installs_once_and_then_runs(tmp_path):
    venv = tmp_path / "venv"
    first = dry_run("test", f"VENV={venv}")
    assert any("scripts/install.py" in line and "--extras dev" in line for line in first)
    venv.mkdir()
    for stamp in (".installed-test", ".installed-run"):
        (venv / stamp).touch()
    assert dry_run("test", f"VENV={venv}") == [f"{venv}/bin/python scripts/run_tests.py "]
    assert dry_run("run", f"VENV={venv}") == [f"{venv}/bin/python -m moe_gpu demo --output-dir moe-gpu-output "]


@pytest.mark.parametrize(("arguments", "environment"), [(["VENV="], {}), ([], {"MOE_GPU_NO_INSTALL": "1"})])
def test_make_can_use_the_present_interpreter_and_install_nothing(arguments, environment):
    assert dry_run("test", "PYTHON=python3", *arguments, **environment) == ["python3 scripts/run_tests.py "]


def test_ci_runs_what_the_readme_says():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "make test"]
    assert "make test" in (ROOT / "README.md").read_text()


# The API reference


def undocumented() -> list[str]:
    """Public names, and their public methods, without a docstring."""
    import inspect

    import moe_gpu

    found = []
    for name in moe_gpu.__all__:
        value = getattr(moe_gpu, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        if not (value.__doc__ or "").strip() or (value.__doc__ or "").startswith(f"{name}("):  # as dataclass writes it
            found.append(name)
    return found


def test_every_public_name_has_a_docstring():
    assert undocumented() == []


def test_the_api_reference_builds_without_warnings(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed")
    command = [sys.executable, "scripts/build_api_docs.py", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    import moe_gpu

    page = (tmp_path / "moe_gpu.html").read_text()
    missing = [name for name in moe_gpu.__all__ if f'id="{name}"' not in page]
    assert missing == []
    assert (tmp_path / "moe_gpu" / "training.html").exists()


def test_the_api_reference_without_pdoc_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "pdoc", None)
    monkeypatch.setattr(sys, "argv", ["build_api_docs.py", str(tmp_path)])
    assert load("build_api_docs").main() == 1
    assert "moe-gpu[dev]" in capsys.readouterr().err


def test_a_warning_of_the_api_reference_is_an_error(monkeypatch, capsys, tmp_path):
    script = load("build_api_docs")
    monkeypatch.setattr(script, "build", lambda directory: ["no such name"])
    monkeypatch.setattr(sys, "argv", ["build_api_docs.py", str(tmp_path)])
    assert script.main() == 1
    assert "warning: no such name" in capsys.readouterr().err
