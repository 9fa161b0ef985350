"""How our operators are called: through PyTorch's dispatcher, or past it where nothing would see the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "moe_gpu"
# What computes each operator on a device, by its name; custom_ops.py fills it when it registers them.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
# Arguments of which no subclass of a tensor, fake or distributed, is one.
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype})


def call(name: str, *arguments: Any) -> Any:
    """`torch.ops.moe_gpu.<name>(*arguments)`, past the dispatcher where that is the same and costs the host less."""
    if is_heard(arguments):
        return getattr(torch.ops.moe_gpu, name)(*arguments)
    return IMPLEMENTATIONS[name](*arguments)


def is_heard(arguments: tuple[Any, ...]) -> bool:
    """Whether anything would see an operator's call: gradients, tracing, modes, transforms, a profiler, a subclass."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or arguments[0].is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
        or not _PLAIN.issuperset(map(type, arguments))
    )


def autograd_kernel(name: str, backward: Callable[..., Any], save: Callable[..., Any]) -> Callable[..., Any]:
    """The operator's kernel for the dispatcher's Autograd key.

    What `torch.library.register_autograd` makes, less its filling in of default arguments on every call: that converts
    the whole schema once for each argument, 0.1 ms for fifteen, and these operators have no defaults. What `save`
    returns, if anything, is the output instead.
    """
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    def below(keyset, *arguments):
        if not is_heard(arguments):
            return IMPLEMENTATIONS[name](*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments_and_keyset):
            *arguments, keyset = arguments_and_keyset
            output = below(keyset, *arguments)
            shown = save(ctx, arguments, output)
            return output if shown is None else shown

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

    def kernel(keyset, *arguments):
        wanted = (isinstance(value, torch.Tensor) and value.requires_grad for value in arguments)
        if torch.is_grad_enabled() and any(wanted):
            return Function.apply(*arguments, keyset)
        return below(keyset, *arguments)

    return kernel
