"""Memory of the emulator: global memory with its bounds, shared memory and barriers with what is under way."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.emulator.program import Fault, now, pause


class Block(torch.Tensor):
    """A tensor of a kernel; `type.layout` is there and says nothing."""

    type = types.SimpleNamespace(layout=None)


def block(tensor: torch.Tensor) -> Block:
    return tensor.as_subclass(Block)


@dataclass(frozen=True)
class Pointer:
    """One address, or a block of them, as offsets from a tensor's first element."""

    memory: torch.Tensor
    offset: Any = 0

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        return cls(tensor.as_strided((size,), (1,)))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    @property
    def shape(self) -> torch.Size:
        return self.offset.shape

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def check(self, mask: torch.Tensor | None) -> torch.Tensor:
        """The offsets, 0 where masked; all others must lie in the tensor."""
        offset = torch.as_tensor(self.offset).long()
        if mask is not None:
            mask = torch.as_tensor(mask)
            offset = torch.where(mask, offset, 0)
        if offset.numel() and not 0 <= int(offset.min()) <= int(offset.max()) < len(self.memory):
            raise Fault(f"offsets {int(offset.min())} to {int(offset.max())} of {len(self.memory)} elements")
        return offset


@dataclass(frozen=True)
class Descriptor:
    """A TMA descriptor of global memory; what lies outside its shape is neither read nor written."""

    memory: torch.Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: None = None

    @classmethod
    def of(cls, descriptor: Any) -> Descriptor:
        memory = Pointer.to(descriptor.base).memory
        return cls(memory, *(tuple(getattr(descriptor, name)) for name in ("shape", "strides", "block_shape")))

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def box(self, coordinates: Sequence[int]) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """The part of a box that exists: in global memory, and where it lies in the box."""
        first = [max(at, 0) for at in coordinates]
        last = [min(at + n, size) for at, n, size in zip(coordinates, self.block_shape, self.sizes, strict=True)]
        count = [max(b - a, 0) for a, b in zip(first, last, strict=True)]
        inside = tuple(slice(a - at, a - at + n) for a, at, n in zip(first, coordinates, count, strict=True))
        if not all(count):
            return self.memory[:0].reshape(count), inside
        # The hardware adds modulo 2^64; a ragged descriptor rests on it.
        size = self.memory.element_size()
        address = sum(a * stride for a, stride in zip(first, self.strides, strict=True)) * size % (1 << 64)
        offset = (address - (1 << 64) if address >> 63 else address) // size
        end = offset + sum((n - 1) * stride for n, stride in zip(count, self.strides, strict=True))
        if not 0 <= offset <= end < len(self.memory):
            raise Fault(f"a box at {list(coordinates)} covers {offset} to {end} of {len(self.memory)} elements")
        strides = [stride if n > 1 else 0 for n, stride in zip(count, self.strides, strict=True)]
        return self.memory.as_strided(count, strides, self.memory.storage_offset() + offset), inside


@dataclass(eq=False)
class Cell:
    """What is known of one stage or slot of shared memory."""

    name: str
    writers: int = 0  # copies under way into it
    readers: int = 0  # wgmma and TMA stores that are still to read it
    generic: bool = False  # written through the generic proxy
    fenced: set[int] = field(default_factory=set)  # groups that have fenced since

    def before_write(self) -> None:
        if self.readers:
            raise Fault(f"{self.name} is written while wgmma or a TMA store is still to read it")

    def before_read(self) -> None:
        if self.writers:
            raise Fault(f"{self.name} is read while a copy into it is under way")

    def before_asynchronous_read(self) -> None:
        self.before_read()
        if self.generic and now.group.number not in self.fenced:
            raise Fault(f"{self.name} goes from the generic to the asynchronous proxy without a fence")

    def written(self, generic: bool) -> None:
        self.generic = generic
        self.fenced.clear()


@dataclass(frozen=True)
class SharedMemory:
    """Shared memory: all stages or slots of an allocation, or a view of one of them."""

    values: torch.Tensor
    cells: tuple[Cell, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def cell(self) -> Cell:
        assert len(self.cells) == 1, "all of an allocation at once"
        return self.cells[0]

    def _view(self, values: torch.Tensor) -> SharedMemory:
        return SharedMemory(values, self.cells)

    def index(self, number: int) -> SharedMemory:
        _check_index(number, len(self.cells))
        return SharedMemory(self.values[number], self.cells[number : number + 1])

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        return self._view(self.values.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return self._view(self.values.permute(*order))

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return self._view(self.values.view(*shape))

    def store(self, value: torch.Tensor) -> None:
        pause()
        assert (value.shape, value.dtype) == (self.values.shape, self.values.dtype)
        self.cell.before_write()
        self.cell.before_read()
        self.values.copy_(value)
        self.cell.written(generic=True)

    def load(self, layout: None) -> Block:
        pause()
        self.cell.before_read()
        return block(self.values.clone())


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes that were announced have come."""

    count: int = 0
    missing: int = 0
    bytes: int = 0
    phase: int = 0
    fenced: bool = False  # since it was initialised

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.fenced = False

    def change(self, arrivals: int = 0, expected: int = 0) -> None:
        self.missing -= arrivals
        self.bytes += expected
        if self.missing < 0:
            raise Fault("more arrivals than the barrier counts in a phase")
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count


@dataclass(frozen=True)
class Barriers:
    barriers: tuple[Barrier, ...]

    def index(self, number: int) -> Barrier:
        _check_index(number, len(self.barriers))
        return self.barriers[number]


def _check_index(number: int, count: int) -> None:
    if not 0 <= number < count:
        raise Fault(f"stage or slot {number} of {count}")
