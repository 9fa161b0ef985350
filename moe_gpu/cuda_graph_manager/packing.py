"""Results of a graph in one buffer that the graph fills itself, so that one copy makes them all the caller's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_gpu.cuda_graph_manager.capture import map_leaves, map_tensors

LARGEST_BYTES = 256 << 10  # of a tensor that is packed: a larger one's own copy costs more than its launch
ALIGNMENT = 16  # bytes: for pointers aligned less, kernels are compiled anew


@dataclass(frozen=True)
class _Piece:
    """Stands for a tensor of the results: it begins `at` so many of its own elements, or is one of the others."""

    at: int
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Packed:
    """Results in tensors that each replay overwrites. `template`: their structure, with pieces in the place of tensors.

    flat: uint8, None where nothing was packed.
    """

    template: Any
    flat: torch.Tensor | None
    others: tuple[torch.Tensor, ...]

    def views(self) -> Any:
        """The results in the tensors that the next replay overwrites."""
        return _restore(self.template, self.flat, self.others)

    def copies(self) -> Any:
        """The results as the caller's own; what can be `deferred` is only put together when it is looked at."""
        flat = None if self.flat is None else self.flat.clone()
        return _restore(self.template, flat, tuple(tensor.clone() for tensor in self.others))


def pack(output: Any) -> Packed:
    """Copy the small contiguous tensors of results, if there are several, into one new buffer; others stay as they are.

    One is left as it is too: packing it would only be a kernel more.
    """
    found: list[torch.Tensor] = []
    map_tensors(output, found.append)
    several = sum(map(_packable, found)) > 1
    parts: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    size = 0

    def place(tensor: torch.Tensor) -> _Piece:
        nonlocal size
        if not several or not _packable(tensor):
            others.append(tensor)
            return _Piece(len(others) - 1)
        piece = _Piece(size // tensor.itemsize, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        parts.append(tensor.reshape(-1).view(torch.uint8))
        size += tensor.nbytes
        filling = -size % ALIGNMENT
        if filling:
            parts.append(tensor.new_empty(filling, dtype=torch.uint8))
            size += filling
        return piece

    template = map_tensors(output, place)
    return Packed(template, torch.cat(parts) if parts else None, tuple(others))


def _packable(tensor: torch.Tensor) -> bool:
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    return plain and not tensor.is_complex() and tensor.is_contiguous() and 0 < tensor.nbytes <= LARGEST_BYTES


def _restore(template: Any, flat: torch.Tensor | None, others: tuple[torch.Tensor, ...]) -> Any:
    def tensor(piece: _Piece) -> torch.Tensor:
        if piece.dtype is None:
            return others[piece.at]
        assert flat is not None
        return flat.view(piece.dtype).as_strided(piece.shape, piece.strides, piece.at)

    def restored(value: Any) -> Any:
        return map_leaves(value, _Piece, tensor)

    def part(value: Any) -> Any:
        if hasattr(type(value), "deferred"):
            return type(value).deferred(lambda: restored(value))
        return restored(value)

    return tuple(part(value) for value in template) if type(template) is tuple else part(template)
