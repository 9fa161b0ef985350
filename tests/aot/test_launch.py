"""Launches that share a compiled kernel are ones for which Triton would compile the same; others never share one."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.knobs import HookChain
from triton.runtime import driver

from moe_gpu.triton_kernels import launch as launching
from moe_gpu.triton_kernels.hopper import grouped_gemm_hopper
from moe_gpu.triton_kernels.hopper_common import list_row_tiles, matrix, ragged
from moe_gpu.triton_kernels.tuning import HopperConfig
from tests.aot.compiling import _NoGpu


@triton.jit(do_not_specialize=["plain"])
def _kernel(a_ptr, b_ptr, size, plain, scale, WIDTH: tl.constexpr, FLAG: tl.constexpr):
    pass


MEMORY = torch.zeros(64, dtype=torch.int64)
TENSORS = [
    MEMORY.view(torch.float32),
    MEMORY.view(torch.float32)[1:],
    MEMORY.view(torch.float32)[4:],
    MEMORY.view(torch.bfloat16),
    None,
]
INTEGERS = [0, 1, 2, 15, 16, 17, -16, 2**31 - 1, 2**31, -(2**31) - 1, 2**40, 2**40 + 1]
DESCRIPTORS = [
    matrix(torch.zeros(64, 64, dtype=torch.bfloat16), 64, 64),
    matrix(torch.zeros(128, 64, dtype=torch.bfloat16), 64, 64),
    matrix(torch.zeros(64, 64, dtype=torch.float16), 64, 64),
    matrix(torch.zeros(64, 64, dtype=torch.bfloat16), 32, 64),
    ragged(torch.zeros(64, 64, dtype=torch.bfloat16)),
]
FIRST = (TENSORS[0], None, 5, 5, 1.0)


def calls():
    """Arguments that differ in one place, and options that do."""
    for place, values in enumerate((TENSORS + DESCRIPTORS, TENSORS, INTEGERS, INTEGERS, [1.0, 2.5])):
        for value in values:
            yield (*FIRST[:place], value, *FIRST[place + 1 :]), {"WIDTH": 8, "FLAG": False, "num_warps": 4}
    for width, flag, warps in itertools.product((8, 16), (False, True), (4, 8)):
        yield FIRST, {"WIDTH": width, "FLAG": flag, "num_warps": warps}
    yield FIRST, {"WIDTH": 4, "FLAG": False, "num_warps": 8}


def test_a_key_is_at_least_as_fine_as_what_triton_compiles_for():
    with mock.patch.object(driver, "_active", _NoGpu(90)):
        binder = _kernel.device_caches[90][-1]
        compiled_for: dict[object, str] = {}
        for arguments, options in calls():
            _, specialization, rest = binder(*arguments, **options)
            constants = {name: options[name] for name in ("WIDTH", "FLAG")}
            found = f"{specialization} {rest} {constants}"
            key, values = launching._key_of(_kernel, arguments, options)
            assert values == [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
            assert compiled_for.setdefault(key, found) == found
    assert len(compiled_for) > 25


def test_other_devices_kernels_and_unknown_arguments_do_not_share():
    here, _ = launching._key_of(_kernel, FIRST, {})
    assert here[1] == -1
    assert launching._key_of(object(), FIRST, {})[0] != here
    assert launching._key_of(_kernel, (*FIRST, (1, 2)), {}) is None
    with mock.patch.object(torch.Tensor, "get_device", return_value=3):
        there, _ = launching._key_of(_kernel, (None, FIRST[0], *FIRST[2:]), {})
        assert there[1] == 3
    for second in (TENSORS[1], DESCRIPTORS[0]):  # one of them is on the host
        with mock.patch.object(torch.Tensor, "get_device", side_effect=[3, -1]):
            assert launching._key_of(_kernel, (FIRST[0], second, *FIRST[2:]), {}) is None


def test_a_kernel_runs_on_the_device_of_its_tensors(kernel):
    x = torch.zeros(4)
    devices = mock.MagicMock()
    devices.current_device.side_effect = [0, 1, 1]
    with mock.patch.object(torch.Tensor, "get_device", return_value=1), mock.patch.object(torch, "cuda", devices):
        launching.launch(kernel, (1,), x, 5, FLAG=True, WIDTH=8)
        devices.device.assert_called_once_with(1)
        launching.launch(kernel, (1,), x, 5, FLAG=True, WIDTH=8)
    devices.device.assert_called_once_with(1)
    assert (len(kernel.compiled), len(kernel.direct)) == (1, 1)


class _Compiled(CompiledKernel):
    def __init__(self, calls: list) -> None:
        self.calls = calls

    run = None  # no launcher that is known

    def __getitem__(self, grid):
        return lambda *arguments: self.calls.append((grid, arguments))


class _Kernel:
    """Stands for a kernel: compiles at every call, and says what it was called with."""

    arg_names = ("x", "n", "WIDTH", "FLAG")

    def __init__(self) -> None:
        self.compiled: list = []
        self.direct: list = []

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.compiled.append((grid, arguments, options))
            return _Compiled(self.direct)

        return call


@pytest.fixture
def kernel():
    with mock.patch.dict(launching._KNOWN, clear=True):
        yield _Kernel()


def test_the_second_launch_calls_what_the_first_compiled(kernel):
    x, other = torch.zeros(4), torch.ones(4)
    launching.launch(kernel, (3,), x, 5, FLAG=True, WIDTH=8, num_warps=4)
    launching.launch(kernel, (7, 2), other, 6, FLAG=True, WIDTH=8, num_warps=4)
    assert kernel.compiled == [((3,), (x, 5), {"FLAG": True, "WIDTH": 8, "num_warps": 4})]
    ((grid, arguments),) = kernel.direct
    assert grid == (7, 2, 1)
    assert arguments[0] is other
    assert arguments[1:] == (6, 8, True)  # constants in the kernel's order, launch options left out


def test_another_specialisation_compiles_anew(kernel):
    x = torch.zeros(8)
    for tensor, n, width in ((x, 5, 8), (x[1:], 5, 8), (x, 16, 8), (x, 5, 16), (x.double(), 5, 8)):
        launching.launch(kernel, (1,), tensor, n, FLAG=True, WIDTH=width)
    assert len(kernel.compiled) == 5
    assert not kernel.direct


def test_what_is_not_compiled_is_called_every_time(kernel):
    with mock.patch.object(_Kernel, "__getitem__", lambda self, grid: lambda *a, **k: self.compiled.append(a)):
        for _ in range(2):
            launching.launch(kernel, (1,), torch.zeros(4), 5, FLAG=True, WIDTH=8)
    assert len(kernel.compiled) == 2


def test_descriptors_made_without_checks_equal_checked_ones():
    tensor = torch.zeros(128, 64, dtype=torch.float16)
    fast = matrix(tensor, 64, 64)
    checked = TensorDescriptor(tensor, [128, 64], [64, 1], [64, 64], fast.layout)
    assert vars(fast).keys() == vars(checked).keys() | {"box"}
    assert all(vars(fast)[name] is value or vars(fast)[name] == value for name, value in vars(checked).items())


class _Utils:
    """Stands for what Triton's driver does in C; a descriptor is encoded as what it was made from."""

    def load_binary(self, *_):
        return 0, 77, 32, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448}

    def fill_tma_descriptor(self, *arguments):
        return "encoded", *arguments[:5], *map(tuple, arguments[5:7]), arguments[7]


class _Driver(_NoGpu):
    utils = _Utils()
    launcher_cls = nvidia.CudaLauncher

    def get_current_stream(self, _):
        return 5


@pytest.fixture
def launches(monkeypatch):
    """Every launch, as Triton's launcher in C is called, with tensors as addresses."""
    found: list[tuple] = []
    bare = SimpleNamespace(launch=lambda *a: found.append(tuple(getattr(x, "data_ptr", lambda x=x: x)() for x in a)))
    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: bare)
    monkeypatch.setattr(driver, "_active", _Driver(90))
    monkeypatch.setattr(launching, "_has_pdl", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    with mock.patch.dict(launching._KNOWN, clear=True), mock.patch.dict(launching._ENCODED, clear=True):
        yield found


OPERANDS = [(torch.zeros(256, 64), torch.zeros(2, 128, 64), torch.zeros(256, 128)) for _ in range(2)]
OPERANDS = [tuple(tensor.bfloat16() for tensor in operands) for operands in OPERANDS]


def _gluon_product(number: int) -> None:
    """One of the kernels that take descriptors, and the list of row tiles before it, on operands of its own."""
    x, w, out = OPERANDS[number]
    grouped_gemm_hopper(x, w, list_row_tiles(OFFSETS, 256), HopperConfig(3), 4, out=out)


OFFSETS = torch.tensor([0, 100, 256], dtype=torch.int32)


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="other versions are called as they want to be")
def test_what_is_launched_below_triton_is_what_triton_launches(launches, monkeypatch):
    made: dict = {}  # so that a call's own tensors lie where they lay before
    monkeypatch.setattr(torch, "empty", lambda *a, _new=torch.empty, **k: made.setdefault(a, _new(*a, **k)))
    _gluon_product(0)  # compiles, and is launched by Triton
    assert all(known.bare is not None for known in launching._KNOWN.values())
    with monkeypatch.context() as by_triton:
        by_triton.setattr(launching, "_KNOWN", {k: known._replace(bare=None) for k, known in launching._KNOWN.items()})
        for number in (0, 1):
            _gluon_product(number)
    for number in (0, 1, 0):
        _gluon_product(number)
    _, _, *expected = launches[:6]
    found = launches[6:]
    hooks = slice(10, 13)  # empty ones from Triton, none from us
    for ours, theirs in zip(found, expected + expected[:2], strict=True):
        assert ours[hooks] == (None, None, None)
        assert ours[: hooks.start] + ours[hooks.stop :] == theirs[: hooks.start] + theirs[hooks.stop :]
    assert found[0] != found[2] or found[1] != found[3], "the operands lie elsewhere"
    assert [launched[6] for launched in found[:2]] == [True, False], "only the list may start early"
    for number, device in enumerate((-1, 0)):
        monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor, device=device: device)
        _gluon_product(0)  # the first compiles for the host's memory, which no launcher takes the address of
        _gluon_product(0)
        assert (launches[-1][11] is None) == (number == 1), "only Triton asks whether memory can be reached"
    hook = HookChain()
    hook.add(lambda metadata: None)
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    _gluon_product(0)
    assert [launched[11] is hook for launched in launches[-2:]] == [True, True], "a profiler is told of every launch"
