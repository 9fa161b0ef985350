"""Spare Triton 3.6's interpreter work that has no effect on results; half of its time is such work."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from types import SimpleNamespace

import triton.language as tl
from triton._utils import validate_block_shape
from triton.runtime import interpreter


def install() -> None:
    patch_once_a_launch()
    remember_numpy_types()
    remember_shapes()
    compute_no_unread_overflows()


def patch_once_a_launch() -> None:
    """A device function need not patch triton.language again within a launch for which that is done."""
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    nothing = SimpleNamespace(restore=lambda: None)
    patched: list[object] = []  # modules of the language

    @functools.cache
    def modules_of(fn):
        return [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]

    def patch_lang(fn):
        modules = modules_of(fn)
        if modules and all(module in patched for module in modules):
            return nothing
        scope = patch(fn)
        patched.extend(modules)
        return scope

    def restore_all(self):
        patched.clear()
        restore(self)

    interpreter._patch_lang = patch_lang
    interpreter._LangPatchScope.restore = restore_all


def remember_numpy_types() -> None:
    look_up, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = get_np_dtype


def remember_shapes() -> None:
    """Types of blocks and tensors describe the same few shapes again and again, in several objects each."""
    checked: dict[tuple[int, ...], tuple[tl.tuple, int, str]] = {}
    described: dict[tuple[int, ...], tuple[tl.tuple, tl.constexpr]] = {}

    def block_type(self, element_ty, shape):
        key = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if key not in checked:
            if not key:
                raise TypeError("0d block_type is forbidden")
            checked[key] = tl.tuple(key), validate_block_shape(key), str(key)
        self.element_ty = element_ty
        self.shape, self.numel, text = checked[key]
        self.name = f"<{text}, {element_ty.name}>"

    def tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in described:
            described[key] = tl.tuple([tl.constexpr(size) for size in key]), tl.constexpr(math.prod(key))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = described[key]

    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor


def compute_no_unread_overflows() -> None:
    """Sums in 64 bits beside every sum of integers, for an assertion that the interpreter then leaves out."""
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
