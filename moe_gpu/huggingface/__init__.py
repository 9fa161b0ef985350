"""moe_gpu in models of `transformers` (5.7 and later): `enable(model)`, or `experts_implementation="moe_gpu"`.

Nothing is registered by importing this: `enable` does it, or `register()` before loading a model by that name.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import torch
from torch import nn

from moe_gpu.huggingface.coverage import CoverageReport, ModuleCoverage
from moe_gpu.huggingface.forward import ATTACHMENT, Attachment, experts_forward, operations
from moe_gpu.huggingface.layout import (
    FP8,
    Conventions,
    describe,
    in_interface,
    known_fp8_gate,
    quantised_stacks,
    up_name,
    why_not,
)
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.triton_kernels.ops import TritonExpertOps

NAME = "moe_gpu"
"""The value of `experts_implementation` that chooses this library."""
_REMEDY = "pip install 'moe-gpu[hf]' (transformers>=5.7)"


@functools.cache
def register() -> Conventions:
    """Make `experts_implementation="moe_gpu"` known to transformers, FP8 experts included; once a process.

    Raises ImportError where transformers is missing or has no experts interface, with the remedy.
    """
    try:
        moe = importlib.import_module("transformers.integrations.moe")
        fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
        activations = importlib.import_module("transformers.activations")
        interfaces = (moe.ExpertsInterface, fp8.FP8ExpertsInterface)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"transformers with its experts interface is not here ({error}); {_REMEDY}") from error
    functions: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"}
    for name, function in (("SiLUActivation", "silu"), ("GELUActivation", "gelu"), ("GELUTanh", "gelu_tanh")):
        if hasattr(activations, name):
            functions[getattr(activations, name)] = function
    # Without a default gate to compare with, every module's own gate is called.
    gates = getattr(moe, "_default_apply_gate", None), known_fp8_gate(getattr(fp8, "FP8Experts", object))
    conventions = Conventions(gates[0], functions, gates[1])
    forward = functools.partial(experts_forward, conventions)
    for interface in interfaces:
        interface.register(NAME, forward)
    return conventions


def enable(model: nn.Module, profiler: ExpertProfiler | None = None) -> CoverageReport:
    """Serve the experts of a transformers model by moe_gpu, forward and backward; returns what is served and what not.

    The model's own weights are used in place. As in transformers, the choice is by configuration object: modules that
    share one switch together, and `model.set_experts_implementation(...)` switches away again. `profiler` counts the
    routes of each served module, `layer_index` in the report saying as which layer; a module of the report that is
    not served keeps the implementation that it had. `disable(model)` puts everything back.
    Raises ValueError, and changes nothing, where no module can be served or the profiler does not fit; ImportError
    without transformers>=5.7.
    """
    conventions = register()
    found = [
        (name, module) for name, module in model.named_modules() if in_interface(module) or _has_experts(name, module)
    ]
    rows: list[ModuleCoverage] = []
    served: list[Any] = []
    refused: list[Any] = []
    for name, module in found:
        row = _examine(name, module, conventions, len(served))
        rows.append(row)
        if row.covered:
            served.append(module)
        elif in_interface(module):
            refused.append(module)
    if not served:
        raise ValueError(_nothing_covered(rows))
    if profiler is not None:
        _check_profiler(profiler, served)
        _attach_on_gpu(profiler, getattr(served[0], up_name(served[0])).device)
    disable(model)
    shared = {id(module.config) for module in served}
    attachments = [Attachment(module.config, module.config._experts_implementation) for module in refused]
    for index, module in enumerate(served):
        attachment = Attachment(module.config, module.config._experts_implementation, profiler, index)
        setattr(module, ATTACHMENT, attachment)
    for module, attachment in zip(refused, attachments, strict=True):
        if id(module.config) in shared:
            setattr(module, ATTACHMENT, attachment)
            module.config = copy.copy(module.config)
    for module in served:
        _choose(module.config, NAME)
    return CoverageReport(tuple(rows))


def disable(model: nn.Module) -> None:
    """Undo `enable`: every configuration names its earlier implementation again, and no module keeps anything of ours.

    Where nothing was enabled, nothing changes. The name stays registered with transformers, for other models.
    """
    for module in model.modules():
        attachment = vars(module).get(ATTACHMENT)
        if attachment is None:
            continue
        if module.config is attachment.config:
            _choose(attachment.config, attachment.previous)
        else:
            module.config = attachment.config
        delattr(module, ATTACHMENT)


def _choose(config: Any, implementation: str | None) -> None:
    config._experts_implementation = {"": implementation}  # of this configuration alone, not of those inside it


def _has_experts(name: str, module: nn.Module) -> bool:
    """Whether a module outside the interface is worth a line in the report: it has experts, not a module that has."""
    if any(in_interface(inner) for inner in module.modules()):
        return False
    stacked = hasattr(module, "num_experts") and any(p.dim() == 3 for p in module.parameters(recurse=False))
    return stacked or name.rsplit(".", 1)[-1] == "experts"


@torch.no_grad()
def _examine(name: str, module: Any, conventions: Conventions, layer_index: int) -> ModuleCoverage:
    if not in_interface(module):
        return ModuleCoverage(name, None, None, why_not="outside transformers' experts interface")
    reason = why_not(module)
    if reason is not None:
        return ModuleCoverage(name, None, None, why_not=reason)
    activation = conventions.activation_of(module)
    how = "activation fused" if activation else "its own activation between grouped products"
    up = getattr(module, up_name(module))
    ops = operations(up.device)
    backend = ops.backend if up.dtype == FP8 else ops.backend_for(up.dtype)
    if up.dtype == FP8:
        how += f", {_how_fp8(module, ops)}, activations not quantised"
    layout = describe(module, activation)
    return ModuleCoverage(name, layout, backend.name, f"{how}; {backend.reason}", layer_index=layer_index)


def _how_fp8(module: Any, ops: TritonExpertOps) -> str:
    stacks = quantised_stacks(module)
    reasons = [ops.fp8_reason(stack) for stack in stacks] or ["only one of its weights is FP8, or they are transposed"]
    reason = next(filter(None, reasons), None)
    if reason is None:
        return "weights read as FP8 by inference in 16 bits, else dequantised on every call"
    return f"weights dequantised on every call ({reason})"


def _nothing_covered(rows: list[ModuleCoverage]) -> str:
    where = "see docs/huggingface.md for the layouts that are"
    if not rows:
        return f"this model has no experts that go through transformers' experts interface; {where}"
    first = rows[0]
    return f"none of {len(rows)} modules with experts can be served: {first.module}: {first.why_not}; {where}"


def _check_profiler(profiler: ExpertProfiler, served: list[Any]) -> None:
    if profiler.num_layers < len(served):
        raise ValueError(
            f"the profiler has num_layers={profiler.num_layers} and the model has {len(served)} layers with experts; "
            f"make ExpertProfiler(num_experts, num_layers={len(served)})"
        )
    for module in served:
        up = getattr(module, up_name(module))
        sharded = hasattr(up, "to_local")  # how many experts its forward sees is known there alone
        if not sharded and up.shape[0] != profiler.num_experts:
            raise ValueError(
                f"the profiler has num_experts={profiler.num_experts} and the model has {up.shape[0]}; "
                f"make ExpertProfiler({up.shape[0]}, num_layers={len(served)})"
            )


def _attach_on_gpu(profiler: ExpertProfiler, device: torch.device) -> None:
    """Create the counter now, since a compiled model could not, at an address that CUDA graphs may rely on."""
    if device.type == "cuda" and profiler.state_LS is None:
        profiler.attach(device)
        torch._dynamo.mark_static_address(profiler.state_LS)
