"""moe_gpu in models of `transformers` (5.7 and later): `enable(model)`, or `experts_implementation="moe_gpu"`.

Nothing is registered by importing this: `enable` does it, or `register()` before loading a model by that name. An
enabled model has what `AdvancedMoELayer` has, under its names: `features`, `get_performance_stats`, `use_slice`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moe_gpu.cuda_graph_manager import CUDAGraphManager
from moe_gpu.expert_cache import ExpertCache
from moe_gpu.huggingface.attachment import Attachment
from moe_gpu.huggingface.coverage import CoverageReport, ModuleCoverage
from moe_gpu.huggingface.flags import device_of, features, features_of, get_performance_stats, use_slice
from moe_gpu.huggingface.forward import backend_of, operations
from moe_gpu.huggingface.host_weights import HostWeights, copies_on_host, put_back, why_not_from_slots
from moe_gpu.huggingface.interface import NAME, register
from moe_gpu.huggingface.layout import (
    ATTACHMENT,
    FP8,
    Conventions,
    describe,
    in_interface,
    quantised_stacks,
    stored,
    up_name,
    why_not,
)
from moe_gpu.layer_energy import EnergyReader, LayerEnergy
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.triton_kernels.ops import TritonExpertOps

__all__ = [
    "NAME",
    "CoverageReport",
    "ModuleCoverage",
    "disable",
    "enable",
    "features",
    "get_performance_stats",
    "register",
    "use_slice",
]


@dataclass(frozen=True)
class _Found:
    """The modules with experts of a model: a row of the report for each; those served, and those refused."""

    rows: list[ModuleCoverage]
    served: dict[str, Any]
    refused: list[Any]

    @classmethod
    def of(cls, model: nn.Module, conventions: Conventions) -> _Found:
        found = cls([], {}, [])
        for name, module in model.named_modules():
            if not (in_interface(module) or _has_experts(name, module)):
                continue
            row = _examine(name, module, conventions, len(found.served))
            found.rows.append(row)
            if row.covered:
                found.served[name] = module
            elif in_interface(module):
                found.refused.append(module)
        if not found.served:
            raise ValueError(_nothing_covered(found.rows))
        return found


def enable(
    model: nn.Module,
    profiler: ExpertProfiler | None = None,
    *,
    use_cuda_graphs: bool | CUDAGraphManager = False,
    enable_energy_monitoring: bool = True,
    hbm_budget: int | float | str | ExpertCache | None = None,
) -> CoverageReport:
    """Serve the experts of a transformers model by moe_gpu, forward and backward; returns what is served and what not.

    The model's own weights are used in place. As in transformers, the choice is by configuration object: modules that
    share one switch together, and `model.set_experts_implementation(...)` switches away again. A module of the report
    that is not served keeps the implementation that it had. `disable(model)` puts everything back.

    The flags are those of AdvancedMoELayer; the report and `features(model)` say what they came to. profiler counts the
    routes of each served module, as layer `layer_index` of the report. use_cuda_graphs: repeated calls of an experts
    module without gradients are replayed as a CUDA graph; True gives the model a CUDAGraphManager, or pass one.
    hbm_budget: the experts' weights go to host memory, frozen, and run from slots in device memory, all modules under
    one budget; inference only.
    Raises ValueError, and changes nothing, where no module can be served or a flag does not fit the model; ImportError
    without transformers>=5.7; HbmMemoryError where the host has no memory for the weights.
    """
    conventions = register()
    found = _Found.of(model, conventions)
    served = list(found.served.values())
    graphs = _graphs_for(len(served), use_cuda_graphs)
    if profiler is not None:
        _check_profiler(profiler, served)
    places: list[HostWeights | None] = [None] * len(served)
    on_host: list[dict[str, torch.Tensor]] = []
    if hbm_budget is not None:
        _check_budget(hbm_budget, found.served, conventions)
        cache = hbm_budget if isinstance(hbm_budget, ExpertCache) else ExpertCache(hbm_budget)
        planned = [HostWeights.plan(module, cache) for module in served]
        cache.book()  # its profile must fit the model too
        on_host = copies_on_host(served, planned)
        places = list(planned)
    device = device_of(served[0])
    _detach(model, staying_on_host=served if hbm_budget is not None else ())
    if profiler is not None:
        _attach_on_gpu(profiler, device)
    shared = {id(module.config) for module in served}
    attachments = [Attachment(module.config, _named_before(module.config)) for module in found.refused]
    readers: dict[torch.device, EnergyReader] = {}
    for index, module in enumerate(served):
        attachment = Attachment(
            module.config,
            _named_before(module.config),
            True,
            index,
            profiler,
            graphs,
            _why_no_graph(module),
            LayerEnergy() if enable_energy_monitoring else None,
            readers,
            places[index],
        )
        setattr(module, ATTACHMENT, attachment)
        if attachment.host is not None:
            attachment.host.move(module, on_host[index])
    for module, attachment in zip(found.refused, attachments, strict=True):
        if id(module.config) in shared:
            setattr(module, ATTACHMENT, attachment)
            module.config = copy.copy(module.config)
            _choose(module.config, attachment.previous)
    for module in served:
        _choose(module.config, NAME)
    rows = [replace(row, features=features_of(found.served[row.module])) if row.covered else row for row in found.rows]
    return CoverageReport(tuple(rows))


def disable(model: nn.Module) -> None:
    """Undo `enable`: every configuration names its earlier implementation again, and no module keeps anything of ours.

    Weights under a budget go back to the device of their module, which must have room: HbmMemoryError, and nothing is
    changed, where it has not. Where nothing was enabled, nothing changes. The name stays registered with transformers,
    for other models.
    """
    _detach(model)


def _detach(model: nn.Module, staying_on_host: Sequence[Any] = ()) -> None:
    """`disable`, but that the weights of some modules stay where they are, since they are enabled again at once."""
    staying = {id(module) for module in staying_on_host}
    attached = [module for module in model.modules() if ATTACHMENT in vars(module)]
    put_back([module for module in attached if id(module) not in staying])
    for module in attached:
        attachment: Attachment = vars(module)[ATTACHMENT]
        if attachment.graphs is not None:
            attachment.graphs.forget(attachment.graph_owner)
        if attachment.host is not None:
            attachment.host.release(module)
        if module.config is attachment.config:
            _choose(attachment.config, attachment.previous)
        else:
            module.config = attachment.config
        delattr(module, ATTACHMENT)
        attachment.retire()


def _named_before(config: Any) -> str | None:
    """What `disable` gives a configuration back, though another model that shares it may have been enabled first."""
    chosen = config._experts_implementation
    return Attachment.previous_of(config) if chosen == NAME else chosen


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
    backend = backend_of(module)
    if up.dtype == FP8:
        how += f", {_how_fp8(module)}, activations not quantised"
    layout = describe(module, activation)
    return ModuleCoverage(name, layout, backend.name, f"{how}; {backend.reason}", layer_index=layer_index)


def _how_fp8(module: Any) -> str:
    reason = _why_dequantised(module)
    if reason is None:
        return "weights read as FP8 by inference in 16 bits, else dequantised on every call"
    return f"weights dequantised on every call ({reason})"


def _why_dequantised(module: Any) -> str | None:
    """Why no kernel reads the FP8 weights of a module as they are, or None."""
    ops = operations(getattr(module, up_name(module)).device)
    stacks = quantised_stacks(module)
    reasons = [ops.fp8_reason(stack) for stack in stacks] or ["only one of its weights is FP8, or they are transposed"]
    return next(filter(None, reasons), None)


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


def _graphs_for(num_modules: int, use_cuda_graphs: bool | CUDAGraphManager) -> CUDAGraphManager | None:
    if not isinstance(use_cuda_graphs, CUDAGraphManager):
        # As many graphs for each module as a layer with a manager of its own may have.
        return CUDAGraphManager(max_graphs=16 * num_modules) if use_cuda_graphs else None
    if use_cuda_graphs.max_graphs < num_modules:
        raise ValueError(
            f"the graph manager has max_graphs={use_cuda_graphs.max_graphs} and the model has {num_modules} modules "
            f"with experts, a graph each: they would evict each other; give at least {num_modules}"
        )
    return use_cuda_graphs


def _why_no_graph(experts: Any) -> str | None:
    """What of a module's layout keeps it from graphs; None where nothing does."""
    for name in (up_name(experts), "down_proj"):
        weight = stored(experts, name)
        if hasattr(weight, "to_local"):
            return f"{name} is sharded: what its forward reads comes and goes"
        reason = _why_dequantised(experts) if weight.dtype == FP8 else None
        if reason is not None:
            return f"{name} is float8 and dequantised: each graph would keep memory for that ({reason})"
    return None


def _check_budget(hbm_budget: object, served: dict[str, Any], conventions: Conventions) -> None:
    for name, module in served.items():
        shown = repr(hbm_budget) if not isinstance(hbm_budget, ExpertCache) else repr(hbm_budget.budget)
        if module.training:
            raise ValueError(
                f"hbm_budget={shown} serves inference only and {name} is training; call model.eval() first"
            )
        reason = why_not_from_slots(module, conventions.activation_of(module))
        if reason is not None:
            raise ValueError(f"hbm_budget={shown} cannot serve {name}: {reason}; enable the model without a budget")
