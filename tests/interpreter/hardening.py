"""Make Triton 3.6's interpreter trustworthy: right in bf16 and FP8, a wild address an error instead of a crash."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_ARGUMENT_RANGES: list[tuple[int, int]] = []


def _widen(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.asarray(handle.data, np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _round(handle):
    """float32 to bf16, to nearest even as the GPU rounds."""
    values = np.ascontiguousarray(handle.data, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def install_bf16() -> None:
    """The interpreter computes on bf16's raw bits; compute in float32 and round instead."""
    builder = interpreter.InterpreterBuilder
    dot, binary, unary = builder.create_dot, builder.binary_op, builder.unary_op
    cast, fma = builder.cast_impl, builder.create_fma

    def like(out, operand):
        return _round(out) if _is_bf16(operand) and out.data.dtype != np.bool_ else out

    def cast_impl(self, source, target):
        if _is_bf16(source) and target.scalar != tl.bfloat16:
            source = _widen(source)
        if target.scalar == tl.bfloat16 and not _is_bf16(source):
            return _round(cast(self, source, tl.float32))
        return source if source.dtype.scalar == target.scalar else cast(self, source, target)

    builder.create_dot = lambda self, a, b, d, *rest: dot(self, _widen(a), _widen(b), d, *rest)
    builder.binary_op = lambda self, a, b, op: like(binary(self, _widen(a), _widen(b), op), a)
    builder.unary_op = lambda self, a, op: like(unary(self, _widen(a), op), a)
    builder.create_fma = lambda self, x, y, z: like(fma(self, _widen(x), _widen(y), _widen(z)), z)
    builder.cast_impl = cast_impl


def install_xor() -> None:
    """The interpreter reduces by xor, of which sorting consists, element by element in Python; numpy has it."""
    apply_impl = interpreter.ReduceOps.apply_impl

    def faster(self, given):
        if self.combine_fn != tl.standard._xor_combine:
            return apply_impl(self, given)
        data = np.bitwise_xor.reduce(given[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, given[0].dtype)

    interpreter.ReduceOps.apply_impl = faster


def install_fp8() -> None:
    """The interpreter makes numbers of float8_e4m3fn's NaN; PyTorch's values instead, as the GPU's."""
    builder = interpreter.InterpreterBuilder
    convert = builder.create_fp_to_fp
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().numpy()

    def fp_to_fp(self, source, target, rounding):
        if source.dtype.scalar != tl.float8e4nv:
            return convert(self, source, target, rounding)
        wide = interpreter.TensorHandle(values[np.asarray(source.data, np.uint8)], tl.float32)
        return self.cast_impl(wide, target)

    builder.create_fp_to_fp = fp_to_fp


def _storages(argument) -> Iterator[tuple[int, int]]:
    if isinstance(argument, torch.Tensor):
        storage = argument.untyped_storage()
        yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    elif isinstance(argument, tuple | list):
        for item in argument:
            yield from _storages(item)
    elif hasattr(argument, "base"):
        yield from _storages(argument.base)


def _check_addresses(pointers, mask) -> None:
    used = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
    addresses = pointers.data[used].astype(np.uint64)
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    inside = np.zeros(addresses.shape, bool)
    for low, high in _ARGUMENT_RANGES:
        inside |= (addresses >= low) & (addresses + size <= high)
    if not inside.all():
        raise IndexError(f"{(~inside).sum()} of {inside.size} lanes address memory outside every argument")


def install_bounds() -> None:
    """Every unmasked lane of a load or store must lie inside the storage of some kernel argument."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, initialise = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    def checked_load(self, pointers, mask, *rest, **options):
        _check_addresses(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest):
        _check_addresses(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def remember_ranges(self, args, kwargs):
        out = initialise(self, args, kwargs)
        _ARGUMENT_RANGES[:] = [r for argument in (*out[0], *out[1].values()) for r in _storages(argument)]
        return out

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor._init_args_hst = remember_ranges
