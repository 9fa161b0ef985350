"""What kernels call, by the names of `triton.language` and of Gluon."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from tests.emulator.memory import Barrier, Barriers, Cell, Descriptor, Pointer, SharedMemory, block
from tests.emulator.program import Copy, Fault, now, pause


def _load(pointer: Pointer, mask: Any = None, other: Any = 0, volatile: bool = False) -> Any:
    if volatile:
        pause()
    values = pointer.memory[pointer.check(mask)]
    if mask is not None:
        values = torch.where(mask, values, torch.tensor(other, dtype=values.dtype))
    return values.item() if values.dim() == 0 else block(values)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offset = pointer.check(mask)
    value = torch.as_tensor(value, dtype=pointer.memory.dtype).expand(offset.shape)
    if mask is None:
        pointer.memory[offset] = value
    else:
        mask = torch.as_tensor(mask).expand(offset.shape)
        pointer.memory[offset[mask]] = value[mask]


def _atomic_add(pointer: Pointer, value: int, sem: str = "acq_rel") -> int:
    pause()
    before = _load(pointer)
    _store(pointer, before + value)
    return before


def _either(scalars: Callable, tensors: Callable) -> Callable:
    def choose(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return tensors(torch.as_tensor(a), torch.as_tensor(b))
        return scalars(a, b)

    return choose


def _where(condition: Any, a: Any, b: Any) -> torch.Tensor:
    return torch.where(torch.as_tensor(condition).bool(), a, b)


def _reduce(operation: Callable) -> Callable:
    def reduce(x: torch.Tensor, axis: int) -> Any:
        values = operation(x, axis)
        return values.item() if values.dim() == 0 else values

    return reduce


def _associative_scan(x: torch.Tensor, axis: int, combine: Callable) -> torch.Tensor:
    parts = list(x.unbind(axis))
    for i in range(1, len(parts)):
        parts[i] = combine(parts[i - 1], parts[i])
    return block(torch.stack(parts, axis))


def _allocate(dtype: torch.dtype, shape: Sequence[int], layout: None) -> SharedMemory | Barriers:
    if dtype == torch.int64:
        barriers = tuple(Barrier() for _ in range(math.prod(shape)))
        now.program.barriers += barriers
        return Barriers(barriers)
    cells = tuple(Cell(f"stage or slot {i} of shape {list(shape)}") for i in range(shape[0]))
    now.program.cells += cells
    poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
    return SharedMemory(torch.full(shape, poison, dtype=dtype), cells)


def _fence(cluster: bool = False) -> None:
    pause()
    for cell in now.program.cells:
        cell.fenced.add(now.group.number)
    for barrier in now.program.barriers:
        barrier.fenced = True


def _begin_copy(destination: SharedMemory) -> None:
    cell = destination.cell
    cell.before_write()
    destination.values.fill_(torch.nan)
    cell.writers += 1


def _end_copy(destination: SharedMemory, generic: bool) -> None:
    destination.cell.writers -= 1
    destination.cell.written(generic)


def _tma_load(descriptor: Descriptor, coordinates: Sequence[int], barrier: Barrier, destination: SharedMemory) -> None:
    assert tuple(destination.shape) == descriptor.block_shape
    if not barrier.fenced:
        raise Fault("a copy is to complete on a barrier whose initialisation was not fenced")
    _begin_copy(destination)

    def land() -> None:
        source, inside = descriptor.box(coordinates)
        destination.values.zero_()
        destination.values[inside] = source
        _end_copy(destination, generic=False)
        barrier.change(expected=-destination.values.numel() * destination.values.element_size())

    now.program.under_way.append(Copy(land))
    pause()


def _tma_store(descriptor: Descriptor, coordinates: Sequence[int], source: SharedMemory) -> None:
    assert tuple(source.shape) == descriptor.block_shape
    source.cell.before_asynchronous_read()
    source.cell.readers += 1

    def leave() -> None:
        destination, inside = descriptor.box(coordinates)
        destination.copy_(source.values[inside])
        source.cell.readers -= 1

    now.group.stores.append(leave)
    pause()


def _store_wait(pendings: int) -> None:
    pause()
    while len(now.group.stores) > pendings:
        now.group.stores.pop(0)()


def _cp_async(destination: SharedMemory, pointer: Pointer, mask: Any = None) -> None:
    assert destination.shape == pointer.shape
    _begin_copy(destination)

    def land() -> None:
        values = pointer.memory[pointer.check(mask)]
        destination.values.copy_(values if mask is None else torch.where(mask, values, 0))
        _end_copy(destination, generic=True)

    copy = Copy(land)
    now.group.copies.append(copy)
    now.program.under_way.append(copy)
    pause()


def _arrive_after_copies(barrier: Barrier, increment_count: bool = True) -> None:
    assert not increment_count, "the barrier counts these arrivals"
    group = now.group
    copies, group.copies = tuple(group.copies), []
    now.program.under_way.append(Copy(lambda: barrier.change(arrivals=32 * group.warps), copies))
    pause()


def _init(barrier: Barrier, count: int) -> None:
    barrier.init(count)


def _expect(barrier: Barrier, bytes: int, pred: bool = True) -> None:
    if pred:
        barrier.change(arrivals=1, expected=bytes)
    pause()


def _arrive(barrier: Barrier, *, count: int = 1, pred: bool = True) -> None:
    if pred:
        barrier.change(arrivals=count)
    pause()


def _wait(barrier: Barrier, phase: int, pred: bool = True) -> None:
    if pred:
        pause(until=lambda: barrier.phase != phase)


@dataclass(eq=False)
class Accumulator:
    """Sums of products that may still be under way."""

    value: torch.Tensor


def _warpgroup_mma_init(value: Any) -> Accumulator:
    return value if isinstance(value, Accumulator) else Accumulator(value)


def _warpgroup_mma(a: SharedMemory, b: SharedMemory, acc: Accumulator, *, is_async: bool = False) -> Accumulator:
    assert is_async
    assert a.values.shape[0] in (64, 128), "a warpgroup multiplies 64 rows, or twice 64"
    for operand in (a, b):
        operand.cell.before_asynchronous_read()
        operand.cell.readers += 1

    def multiply() -> None:
        for operand in (a, b):
            operand.cell.before_read()
            operand.cell.readers -= 1
        acc.value = acc.value + a.values.float() @ b.values.float()

    now.group.products.append(multiply)
    pause()
    return acc


def _warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Accumulator] = ()) -> Any:
    pause()
    while len(now.group.products) > num_outstanding:
        now.group.products.pop(0)()
    # While products are under way, the sums are nothing to look at.
    results = deps if now.group.products else [block(acc.value) for acc in deps]
    return results[0] if len(results) == 1 else tuple(results)


def _warp_specialize(parts: Sequence[tuple[Callable, tuple]], warps: Sequence[int], registers: Sequence[int]) -> None:
    now.program.specialize(parts, warps)


def _nothing(*arguments: Any, **options: Any) -> None:
    """Layouts."""


_LANGUAGE = types.SimpleNamespace(
    constexpr=tl.constexpr,
    int32=torch.int32,
    int64=torch.int64,
    float16=torch.float16,
    bfloat16=torch.bfloat16,
    float32=torch.float32,
    program_id=lambda axis: now.program.ids[axis],
    num_programs=lambda axis: now.program.grid[axis],
    num_warps=lambda: now.group.warps,
    static_range=range,
    static_assert=_nothing,
    cdiv=lambda a, b: -(-a // b),
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    arange=lambda start, end, layout=None: block(torch.arange(start, end, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout=None: block(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, value, dtype, layout=None: block(torch.full(shape, value, dtype=dtype)),
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    reshape=lambda x, shape: x.reshape(shape),
    permute=lambda x, order: x.permute(order),
    split=lambda x: (x[..., 0], x[..., 1]),
    convert_layout=lambda x, layout: x,
    minimum=_either(min, torch.minimum),
    maximum=_either(max, torch.maximum),
    where=_where,
    sum=_reduce(torch.sum),
    max=_reduce(torch.amax),
    cumsum=torch.cumsum,
    associative_scan=_associative_scan,
    exp=torch.exp,
    erf=torch.erf,
    thread_barrier=_nothing,
    barrier=_nothing,
    allocate_shared_memory=_allocate,
    warp_specialize=_warp_specialize,
    BlockedLayout=_nothing,
    SliceLayout=_nothing,
    SwizzledSharedLayout=_nothing,
    NVMMADistributedLayout=_nothing,
    NVMMASharedLayout=types.SimpleNamespace(get_default_for=_nothing),
)
# By the last part of a module's name; copies carry the names of every release.
MODULES = {
    "language": _LANGUAGE,
    "_core": _LANGUAGE,
    "tma": types.SimpleNamespace(
        async_copy_global_to_shared=_tma_load,
        async_load=_tma_load,
        async_copy_shared_to_global=_tma_store,
        async_store=_tma_store,
        store_wait=_store_wait,
    ),
    "mbarrier": types.SimpleNamespace(init=_init, expect=_expect, arrive=_arrive, wait=_wait, MBarrierLayout=_nothing),
    "async_copy": types.SimpleNamespace(
        async_copy_global_to_shared=_cp_async, async_load=_cp_async, mbarrier_arrive=_arrive_after_copies
    ),
    "hopper": types.SimpleNamespace(
        fence_async_shared=_fence,
        warpgroup_mma=_warpgroup_mma,
        warpgroup_mma_init=_warpgroup_mma_init,
        warpgroup_mma_wait=_warpgroup_mma_wait,
    ),
}
