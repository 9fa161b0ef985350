"""Attachment: the flags of an enabled experts module, under the names that they have on AdvancedMoELayer."""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_gpu.cuda_graph_manager import CUDAGraphManager
from moe_gpu.expert_cache import ExpertCache, LayerCache
from moe_gpu.huggingface.host_weights import HostWeights
from moe_gpu.layer_energy import EnergyReader, LayerEnergy
from moe_gpu.model import sm_budget_of
from moe_gpu.profiler import ExpertProfiler
from moe_gpu.slices.plan import GPUSlice

_LIVING: weakref.WeakSet[Attachment] = weakref.WeakSet()  # models may share a configuration; only here they meet


@dataclass(eq=False)
class Attachment:
    """What `enable` leaves at an experts module, and what `disable` needs to put back.

    config: the configuration that the module had; previous: the implementation that it named. served: False where the
    module only shared its configuration with served ones. profiler counts the routes as layer `layer_index`.
    why_no_graph: what of the module's layout keeps it from graphs. readers: of the energy counters, by device; all
    modules of a model share them. host: its weights under a budget. top_k: that of the latest call outside traces. A
    copy of the module counts nothing, has graphs of its own and shares slice and budget; a pickled one has no flags.
    """

    config: Any
    previous: str | None
    served: bool = False
    layer_index: int = 0
    profiler: ExpertProfiler | None = None
    graphs: CUDAGraphManager | None = None
    why_no_graph: str | None = None
    energy: LayerEnergy | None = None
    readers: dict[torch.device, EnergyReader] = field(default_factory=dict)
    host: HostWeights | None = None
    slice: GPUSlice | None = None
    top_k: int | None = None
    graph_owner: int = field(default_factory=CUDAGraphManager.new_owner)

    def __post_init__(self) -> None:
        _LIVING.add(self)

    @staticmethod
    def previous_of(config: Any) -> str | None:
        """What a configuration that names us named before, by any module attached to it; else what it names now."""
        return next((one.previous for one in _LIVING if one.config is config), config._experts_implementation)

    def retire(self) -> None:
        """The module was let go: its configuration may name us again by another's choice."""
        _LIVING.discard(self)

    def __deepcopy__(self, memo: dict) -> Attachment:
        return Attachment(
            copy.deepcopy(self.config, memo),
            self.previous,
            self.served,
            self.layer_index,
            graphs=copy.deepcopy(self.graphs, memo),
            why_no_graph=self.why_no_graph,
            energy=None if self.energy is None else LayerEnergy(),
            readers=copy.deepcopy(self.readers, memo),
            host=copy.deepcopy(self.host, memo),
            slice=self.slice,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Attachment, (self.config, self.previous, self.served, self.layer_index), {"host": self.host}

    @property
    def hbm(self) -> LayerCache | None:
        """The slots that the experts run from; None without a budget."""
        return None if self.host is None else self.host.member

    @property
    def expert_cache(self) -> ExpertCache | None:
        """The cache that the experts run from; None without an `hbm_budget`."""
        return None if self.hbm is None else self.hbm.cache

    @property
    def sm_budget(self) -> int | None:
        return sm_budget_of(self.slice)

    def note(self, num_tokens: int, top_k: int) -> None:
        """Count an eager call on the host."""
        self.top_k = top_k
        if self.energy is not None:
            self.energy.note(num_tokens)

    # What CUDAGraphManager asks, as of AdvancedMoELayer:

    def graph_facts(self) -> tuple[object, ...]:
        counters = None if self.profiler is None else self.profiler.state_LS
        return self.sm_budget, None if counters is None else counters.data_ptr(), self.layer_index, self.hbm is None

    def graph_conflict(self) -> str | None:
        return None if self.hbm is None else "an hbm_budget decides on the host which experts to load"

    def padding_conflict(self) -> str | None:
        return None

    def discount_padding(self, num_tokens: int) -> None:
        if self.profiler is not None:
            assert self.top_k is not None
            self.profiler.discount_invalid(num_tokens * self.top_k, self.layer_index)
