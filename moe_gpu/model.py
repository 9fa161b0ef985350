"""AdvancedMoELayer: the weights of a MoE layer, served by every system of this package."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_gpu.config import MoEConfig, RouterConfig
from moe_gpu.cuda_graph_manager import BatchScheduler, CUDAGraphManager
from moe_gpu.energy_work import LayerWork
from moe_gpu.expert_cache import ExpertCache, LayerCache, apply_around_weights
from moe_gpu.expert_slices import ExpertSlices, equal_groups
from moe_gpu.gpu_slice_manager import AdvancedGPUSliceManager
from moe_gpu.layer_energy import LayerEnergy, feature_reason, work_of
from moe_gpu.moe_layer import MoEBase, MoEStats
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.reference import ExpertWeights, Routing, autocast_dtype
from moe_gpu.slices.plan import GPUSlice
from moe_gpu.slices.policies import SliceAllocationPolicy
from moe_gpu.triton_kernels.ops import TritonExpertOps

logger = logging.getLogger("moe_gpu")


@dataclass(frozen=True)
class Feature:
    """One flag of a layer: whether it is on, and why not where it was asked for and is not."""

    asked: bool
    active: bool
    reason: str


def sm_budget_of(held: GPUSlice | None) -> int | None:
    """The SMs that a slice's kernels keep to; None without a slice."""
    return None if held is None else held.got_sms or held.asked_sms


def slice_feature(held: GPUSlice, backend: str) -> Feature:
    """What a held slice comes to where this backend serves."""
    sms = sm_budget_of(held)
    if backend != "triton":
        return Feature(True, False, f"a slice of {sms} SMs is held; plain PyTorch serves and keeps to no budget")
    kept = f"every product launches thread blocks for at most {sms} SMs"
    if held.enforced:
        return Feature(True, True, f"{kept}; the {held.backend} enforces it for calls inside manager.enter(...)")
    return Feature(True, True, f"{kept}; nothing keeps other kernels off them")


_ANNOUNCED: set[str] = set()


class AdvancedMoELayer(MoEBase):
    """A MoE layer on the fastest backend the device has; `layer(x)` returns `(output, stats)`.

    x: (..., input_dim) in the layer's dtype (any float dtype but float64 under autocast); output: (..., expert_dim).
    `hidden_dim` is the experts' intermediate width. `capacity_factor=None` is dropless. `stats` is a `MoEStats`: lazy
    device tensors. `layer.features` says which flags are served, by what, and why not; a flag whose subsystem does not
    exist yet is never pretended: it is listed there as inactive and logged once.
    `hbm_budget` (bytes, "8GiB", a share of the experts, or an ExpertCache that several layers share) keeps the experts'
    weights in host memory and as many as fit in device memory, for inference: the layer begins in eval mode.
    `use_cuda_graphs` replays the layer as a CUDA graph in eval mode without gradients, once a number of tokens repeats;
    True gives the layer a CUDAGraphManager, or pass one, which several layers may share.
    Raises ValueError for sizes that do not fit and for a wrong dtype.
    """

    def __init__(
        self,
        input_dim: int,
        expert_dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int = 2,
        capacity_factor: float | None = None,
        total_slices: int = 8,
        use_triton: bool = True,
        use_cuda_graphs: bool | CUDAGraphManager = True,
        enable_energy_monitoring: bool = True,
        allocation_policy: SliceAllocationPolicy = SliceAllocationPolicy.DYNAMIC,
        *,
        router: RouterConfig | None = None,
        activation: str = "swiglu",
        depth: int = 1,
        bias: bool = False,
        shared_hidden_dim: int = 0,
        selection_bias: bool = False,
        profiler: ExpertProfiler | None = None,
        layer_index: int = 0,
        debug: bool = False,
        hbm_budget: int | float | str | ExpertCache | None = None,
    ) -> None:
        if not isinstance(total_slices, int) or total_slices < 1:
            raise ValueError(f"total_slices={total_slices!r} must be an integer of at least 1")
        if not isinstance(allocation_policy, SliceAllocationPolicy):
            raise ValueError(
                f"allocation_policy={allocation_policy!r} must be a SliceAllocationPolicy, "
                f"one of {', '.join(policy.name for policy in SliceAllocationPolicy)}"
            )
        if profiler is not None and not profiler.has_room_for(num_experts, layer_index):
            raise ValueError(
                f"the profiler counts {profiler.num_experts} experts in each of {profiler.num_layers} layers; "
                f"this layer has num_experts={num_experts} and layer_index={layer_index}"
            )
        super().__init__(
            MoEConfig(
                input_dim,
                expert_dim,
                hidden_dim,
                num_experts,
                top_k,
                capacity_factor,
                activation,
                depth,
                bias,
                shared_hidden_dim,
                router or RouterConfig(),
                selection_bias,
            )
        )
        self.use_triton = use_triton
        self.slice: GPUSlice | None = None
        self.ops = TritonExpertOps(self.gate_up_proj.device, use_triton)
        self.profiler = profiler
        self.layer_index = layer_index
        self.debug = debug
        self._energy = LayerEnergy() if enable_energy_monitoring else None
        self._hbm: LayerCache | None = None
        if hbm_budget is not None:
            self.eval().set_hbm_budget(hbm_budget)
        self.scheduler: BatchScheduler | None = None
        self.graphs: CUDAGraphManager | None = None
        if use_cuda_graphs:
            self.graphs = use_cuda_graphs if isinstance(use_cuda_graphs, CUDAGraphManager) else CUDAGraphManager()
        self._graph_owner = CUDAGraphManager.new_owner()
        self.divided: ExpertSlices | None = None
        self._total_slices, self._allocation_policy = total_slices, allocation_policy
        features = {
            "cuda_graphs": self._graphs_feature(),
            "slices": self._slices_feature(),
            "energy": self._energy_feature(),
        }
        for name, feature in features.items():
            if feature.asked and not feature.active and name not in _ANNOUNCED:
                _ANNOUNCED.add(name)
                logger.info("AdvancedMoELayer: %s asked for and not active: %s", name, feature.reason)

    @classmethod
    def from_config(cls, config: MoEConfig, **options) -> AdvancedMoELayer:
        """The layer of a MoEConfig; `options` are the constructor's flags that are not sizes."""
        c = config
        return cls(
            c.input_dim,
            c.expert_dim,
            c.hidden_dim,
            c.num_experts,
            c.top_k,
            c.capacity_factor,
            router=c.router,
            activation=c.activation,
            depth=c.depth,
            bias=c.bias,
            shared_hidden_dim=c.shared_hidden_dim,
            selection_bias=c.selection_bias,
            **options,
        )

    def set_hbm_budget(self, hbm_budget: int | float | str | ExpertCache | None) -> None:
        """Run the experts from slots in device memory within a budget, as the constructor's flag; None: from all of it.

        The layer's parameters are frozen: this is for inference. Raises ValueError, and changes nothing, for a layer in
        training mode, and HbmBudgetError for a budget that cannot be read or holds less than one expert.
        """
        if hbm_budget is None:
            if self._hbm is not None:
                self._hbm.cache.synchronize()
                self._hbm = None
                self._leave_host()
            return
        self._attach(_register(self, hbm_budget if isinstance(hbm_budget, ExpertCache) else ExpertCache(hbm_budget)))

    @property
    def expert_cache(self) -> ExpertCache | None:
        """The cache that the experts run from; None without an `hbm_budget`."""
        return None if self._hbm is None else self._hbm.cache

    def _attach(self, hbm: LayerCache) -> None:
        first = self._hbm is None
        self._hbm = hbm
        self.requires_grad_(False)
        if first:
            self.register_load_state_dict_pre_hook(_finish_copies)

    def _expert_parameters(self) -> dict[str, nn.Parameter]:
        """What lies in host memory under a budget."""
        names = ("gate_up_proj", "down_proj", "mid_proj", "gate_up_bias", "mid_bias", "down_bias")
        found = {name: self._parameters.get(name) for name in names}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def _leave_host(self) -> None:
        """Put the experts' weights where the router is, once there is no budget any more."""
        for parameter in self._expert_parameters().values():
            parameter.data = parameter.data.to(self.router_weight.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickled layer has lost its budget, if it had one; a copied one has not."""
        super().__setstate__(state)
        if self._hbm is None:
            self._leave_host()

    def _apply(self, fn, recurse=True):
        apply = partial(super()._apply, fn, recurse)
        if self._hbm is None:
            apply()
        else:
            apply_around_weights(self, self._expert_parameters(), self._hbm, fn, apply)
        self._make_ops()
        return self

    def _make_ops(self) -> None:
        self.ops = TritonExpertOps(self.router_weight.device, self.use_triton, sm_budget_of(self.slice))

    def use_slice(self, held: GPUSlice | None) -> None:
        """Keep this layer's kernels to a slice's SMs from the next call on; None: to none.

        The budget alone leaves open which SMs serve: call the layer inside `manager.enter(...)` for a green context.
        """
        self.slice = held
        self._make_ops()

    def divide_experts(self, groups: int | AdvancedGPUSliceManager | None, backend: str = "cta") -> None:
        """Compute the routed experts in groups, each in its own slice of the GPU, side by side; None: undivided.

        groups: a slice manager with the experts' tenants, or how many equal runs of experts to make tenants of a new
        one, with this layer's `total_slices` and `allocation_policy` on `backend` (`cta` or `green_context`);
        `layer.divided.manager` is that manager. Calls without gradients are divided, also in CUDA graphs, one for each
        plan; others are not, nor are those with an hbm_budget, in a slice of the whole layer, or in torch.compile.
        Raises SliceError for groups, experts or slices that cannot be; nothing changes then.
        """
        if isinstance(groups, int):
            settings = (self._total_slices, self._allocation_policy, backend, self.router_weight.device)
            groups = equal_groups(self.config.num_experts, groups, *settings)
        self.divided = None if groups is None else ExpertSlices(groups, self.config.num_experts)

    def use_scheduler(self, scheduler: BatchScheduler | None) -> None:
        """Let a scheduler run the shared expert beside the routed ones where that is faster; None: after each other.

        Not in a slice, under an hbm_budget, in torch.compile, nor away from the scheduler's kind of device. Raises
        ValueError for a layer without a shared expert.
        """
        if scheduler is not None and self.shared_expert is None:
            raise ValueError("this layer has no shared expert to run beside the others; give shared_hidden_dim")
        self.scheduler = scheduler

    @property
    def features(self) -> dict[str, Feature]:
        """What each flag came to on the layer's present device."""
        backend = self.ops.backend_for(self.gate_up_proj.dtype)
        features = {"triton": Feature(self.use_triton, backend.name == "triton", backend.reason)}
        features["profiler"] = Feature(
            self.profiler is not None, self.profiler is not None, "pass profiler=ExpertProfiler(...)"
        )
        features["expert_cache"] = (
            Feature(False, False, "pass hbm_budget=...") if self._hbm is None else Feature(True, True, str(self._hbm))
        )
        features["cuda_graphs"] = self._graphs_feature()
        features["slices"] = self._slices_feature()
        features["energy"] = self._energy_feature()
        return features

    def _graphs_feature(self) -> Feature:
        if self.graphs is None:
            return Feature(False, False, "use_cuda_graphs=False")
        device = self.router_weight.device
        reason = self.graph_conflict()
        if device.type != "cuda":
            reason = f"CUDA graphs need an NVIDIA GPU, and the layer is on {device}"
        if reason is not None:
            return Feature(True, False, reason)
        return Feature(True, True, f"{self.graphs}, in eval mode without gradients")

    def graph_facts(self) -> tuple[object, ...]:
        """What a graph of this layer depends on besides its input and the addresses of its weights."""
        counters = None if self.profiler is None else self.profiler.state_LS
        profiled = None if counters is None else (counters.data_ptr(), self.layer_index)
        divided = None if self.divided is None else self.divided.facts()
        settings = (self.ops.sm_budget, self.use_triton, self.debug, self._hbm is None)
        return (*settings, profiled, id(self.scheduler), divided)

    def graph_conflict(self) -> str | None:
        """Why no graph can be captured of this layer as it is; None where one can."""
        if self.debug:
            return "debug=True reads the routing on the host"
        return None if self._hbm is None else "an hbm_budget decides on the host which experts to load"

    def padding_conflict(self) -> str | None:
        """Why tokens of padding would change the others' results; None where they do not."""
        factor = self.config.capacity_factor
        return None if factor is None else f"capacity_factor={factor} drops routes by the number of tokens"

    def discount_padding(self, num_tokens: int) -> None:
        """Take back what the profiler counted for so many tokens of NaN that were padding."""
        if self.profiler is not None:
            self.profiler.discount_invalid(num_tokens * self.config.top_k, self.layer_index)

    def _energy_feature(self) -> Feature:
        if self._energy is None:
            return Feature(False, False, "enable_energy_monitoring=False")
        return Feature(True, *feature_reason(self.router_weight.device, self.gate_up_proj.dtype))

    def _slices_feature(self) -> Feature:
        dtype = self.gate_up_proj.dtype
        if self.slice is not None:
            return slice_feature(self.slice, self.ops.backend_for(dtype).name)
        if self.divided is None:
            return Feature(
                self._total_slices > 1,
                False,
                "no slice is held: layer.divide_experts(groups) divides the experts among slices by "
                f"{self._allocation_policy.name}, layer.use_slice(slice) keeps the whole layer to one",
            )
        device = self.router_weight.device
        reason = self.divided.why_not(self.ops, device, dtype)
        if reason is None and self._hbm is not None:
            reason = "the experts run from an hbm_budget"
        if reason is None and device.type != "cuda":
            reason = f"{self.divided}, in turn: nothing is enforced on {device}"
        return Feature(True, reason is None, reason or f"{self.divided}, in calls without gradients")

    def get_performance_stats(self) -> dict[str, object]:
        """Features, the latest figures of a profiler and of a budget, and the GPU's energy since the last call of this.

        Reads only what has already reached the host, and the driver's energy counter.
        """
        energy = None
        if self._energy is not None:
            device, dtype = self.router_weight.device, self.gate_up_proj.dtype
            budget = self.ops.sm_budget
            energy = self._energy.stats(self.config, device, dtype, self.profiler, self.layer_index, budget)
        return {
            "features": self.features,
            "experts": None if self.profiler is None else self.profiler.snapshot(self.layer_index),
            "energy": energy,
            "expert_cache": None if self._hbm is None else self._hbm.cache.stats(),
            "cuda_graphs": None if self.graphs is None else self.graphs.get_stats(),
        }

    def energy_work(self, num_tokens: int, mode: str = "forward") -> LayerWork:
        """What a call with so many tokens executes, for `EnergyModel.attribute`; `forward` is inference.

        Raises ValueError for experts of depth 2 and for another mode than forward and forward+backward.
        """
        w = self.gate_up_proj
        return work_of(self.router_weight.device, self.config, num_tokens, w.dtype, mode, self.ops.sm_budget)

    def forward(self, x: torch.Tensor, router_logits_TE: torch.Tensor | None = None) -> tuple[torch.Tensor, MoEStats]:
        """`(output, stats)`; `router_logits_TE` replaces the router's own logits."""
        if self._hbm is not None and self.training:
            raise ValueError(
                "hbm_budget serves inference only and this layer is training; call .eval(), or give no budget"
            )
        x_TH = self._flatten(x)
        traced = torch.compiler.is_compiling()
        if self.graphs is None or router_logits_TE is not None or traced:
            out_TO, stats = self._compute(x_TH, router_logits_TE)
        else:
            if self.profiler is not None and self.profiler.state_LS is None:
                self.profiler.attach(x.device)
            out_TO, stats = self.graphs.call(self._compute, x_TH, (self,), self._graph_owner)
            if self.profiler is not None:
                self.profiler.poll_if_due()
        if self._energy is not None and not traced:
            self._energy.note(x_TH.shape[0])
        return (out_TO if x.dim() == 2 else out_TO.view(*x.shape[:-1], self.config.expert_dim)), stats

    def _compute(
        self, x_TH: torch.Tensor, router_logits_TE: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, MoEStats]:
        """What a graph holds: everything that a call does on the device."""
        ops = self.ops
        rows_TH = x_TH.to(autocast_dtype(x_TH.device) or x_TH.dtype)
        weights = self.expert_weights
        shared_TO: torch.Tensor | None = None
        if self.scheduler is not None and self._may_schedule(self.scheduler):
            (out_TO, routing, logits_TE), shared_TO = self.scheduler.run(
                partial(self._routed, x_TH, rows_TH, weights, router_logits_TE),
                lambda _: self._shared(x_TH),
                key=(1 << max(0, x_TH.shape[0] - 1).bit_length(), rows_TH.dtype),
            )
        elif self._hbm is not None:
            # The host waits for the routing: the shared expert keeps the device busy meanwhile.
            logits_TE, routing = self._route(x_TH, router_logits_TE, ops)
            shared_TO = self._shared(x_TH)
            out_TO = self._hbm.run(rows_TH, routing, weights, self.config.activation, ops)
        else:
            out_TO, routing, logits_TE = self._routed(x_TH, rows_TH, weights, router_logits_TE, ops.sm_budget)
            shared_TO = self._shared(x_TH)
        if shared_TO is not None:
            out_TO = out_TO + shared_TO
        if self.profiler is not None:
            self.profiler.record(routing.demand_P, self.layer_index)
        return out_TO, MoEStats(routing, logits_TE, ops.backend_for(rows_TH.dtype).name)

    def _may_schedule(self, scheduler: BatchScheduler) -> bool:
        here = scheduler.streams.device.type == self.router_weight.device.type
        return here and self._hbm is None and self.slice is None and not torch.compiler.is_compiling()

    def _shared(self, x_TH: torch.Tensor) -> torch.Tensor | None:
        return None if self.shared_expert is None else self.shared_expert(x_TH)

    def _route(
        self, x_TH: torch.Tensor, given_TE: torch.Tensor | None, ops: TritonExpertOps
    ) -> tuple[torch.Tensor, Routing]:
        c = self.config
        logits_TE = self._logits(x_TH, given_TE)
        routing = ops.route(logits_TE, c.top_k, c.router, self.selection_bias_E, c.capacity(x_TH.shape[0]))
        if self.debug and int(routing.num_invalid):
            raise ValueError(f"{int(routing.num_invalid)} routes have NaN router logits (debug=True)")
        return logits_TE, routing

    def _routed(
        self,
        x_TH: torch.Tensor,
        rows_TH: torch.Tensor,
        weights: ExpertWeights,
        given_TE: torch.Tensor | None,
        sm_budget: int | None,
    ) -> tuple[torch.Tensor, Routing, torch.Tensor]:
        """The routed experts' output, in so many SMs (None: all), with the routing and its logits."""
        ops = self.ops.with_budget(sm_budget)
        logits_TE, routing = self._route(x_TH, given_TE, ops)
        weights, activation = weights.to(rows_TH.dtype), self.config.activation
        if self._divided(sm_budget, rows_TH.dtype):
            assert self.divided is not None
            return self.divided.run(rows_TH, routing, weights, activation, ops), routing, logits_TE
        return ops.experts(rows_TH, routing, weights, activation), routing, logits_TE

    def _divided(self, sm_budget: int | None, dtype: torch.dtype) -> bool:
        """Whether this call's experts are computed in slices of their own."""
        if self.divided is None or sm_budget is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return self.divided.why_not(self.ops, self.router_weight.device, dtype) is None


def _finish_copies(layer: AdvancedMoELayer, *_: object) -> None:
    """Before weights are loaded in place: no copy may read them while they change."""
    if layer._hbm is not None:
        layer._hbm.cache.synchronize()


def _register(layer: AdvancedMoELayer, cache: ExpertCache) -> LayerCache:
    if layer.training:
        raise ValueError("hbm_budget serves inference only and this layer is training; call .eval() first")
    expert_bytes = sum(parameter[0].nbytes for parameter in layer._expert_parameters().values())
    return cache.register(layer.config.num_experts, expert_bytes)


def set_hbm_budget(model: nn.Module, hbm_budget: int | float | str | ExpertCache) -> ExpertCache:
    """Let all AdvancedMoELayers of a model share one budget, in the order in which the model lists them.

    Raises ValueError, and changes nothing, where there is none, one is training, or the budget does not suffice.
    """
    layers = [module for module in model.modules() if isinstance(module, AdvancedMoELayer)]
    if not layers:
        raise ValueError(
            f"hbm_budget={hbm_budget!r}: {type(model).__name__} has no AdvancedMoELayer to apply it to; "
            "a transformers model takes it by moe_gpu.enable(model, hbm_budget=...)"
        )
    cache = hbm_budget if isinstance(hbm_budget, ExpertCache) else ExpertCache(hbm_budget)
    members = [_register(layer, cache) for layer in layers]
    for layer, member in zip(layers, members, strict=True):
        layer._attach(member)
    return cache
