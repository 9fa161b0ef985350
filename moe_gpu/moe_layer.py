"""What every MoE layer is made of: Expert, the weights and router of MoEBase, MoELayer (the plain loop), MoEStats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moe_gpu.config import MoEConfig, validate_expert
from moe_gpu.profiler import AsyncCopy
from moe_gpu.reference import (
    ExpertWeights,
    Routing,
    activate_reference,
    autocast_dtype,
    load_balancing_loss,
    router_z_loss,
    topk_reference,
    update_selection_bias,
)


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class Expert(nn.Module):
    """One feed-forward expert, (..., H) to (..., O).

    activation: gated (`swiglu`, `geglu`, `geglu_tanh`, `reglu`) or plain (`relu`, `gelu`, `gelu_tanh`, `silu`); by
    default SwiGLU at depth 1 and GELU at depth 2. depth=2 is the plain MLP of three linear layers. bias: by default
    only at depth 2. Raises ValueError for a combination that does not exist.
    """

    def __init__(
        self,
        input_dim: int,
        expert_dim: int,
        hidden_dim: int,
        activation: str | None = None,
        depth: int = 1,
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation or ("swiglu" if depth == 1 else "gelu")
        kind = validate_expert(self.activation, depth)
        bias = depth == 2 if bias is None else bias
        self.up = nn.Linear(input_dim, hidden_dim * (2 if kind.gated else 1), bias)
        self.mid = nn.Linear(hidden_dim, hidden_dim, bias) if depth == 2 else None
        self.down = nn.Linear(hidden_dim, expert_dim, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = activate_reference(self.up(x), self.activation)
        if self.mid is not None:
            h = activate_reference(self.mid(h), self.activation)
        return self.down(h)


@dataclass(frozen=True)
class MoEStats:
    """What a forward pass did. Every tensor stays on the device; nothing is read until asked for.

    `counts_E`, `dropped_tokens` and the losses are tensors: use them in a loss, or hand them to the profiler, whose
    copies to the host are asynchronous, or call `copy_counts()`. Reading one directly waits for the GPU.
    """

    routing: Routing
    router_logits_TE: torch.Tensor
    backend: str

    @classmethod
    def deferred(cls, make: Callable[[], MoEStats]) -> MoEStats:
        """What `make()` returns, asked for when the first field is read: a replayed graph's caller may read none."""
        stats = object.__new__(cls)
        stats.__dict__["_make"] = make
        return stats

    def __getattr__(self, name: str) -> Any:
        """A field of deferred statistics; nothing else is missing from an object."""
        if "_make" not in self.__dict__ or name not in self.__dataclass_fields__:
            raise AttributeError(f"MoEStats has no attribute {name!r}")
        made = self.__dict__["_make"]()
        value = getattr(made, name)
        self.__dict__.update(made.__dict__)
        del self.__dict__["_make"]
        return value

    def __getstate__(self) -> dict[str, Any]:
        """The fields, for copies and pickles."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def counts_E(self) -> torch.Tensor:
        """int32 rows that each expert computed."""
        return self.routing.counts_E

    @property
    def dropped_tokens(self) -> torch.Tensor:
        """0-dim: routes that a full expert turned away."""
        return self.routing.num_dropped

    @property
    def invalid_routes(self) -> torch.Tensor:
        """0-dim: routes without a usable expert, such as a token of NaN logits."""
        return self.routing.num_invalid

    def copy_counts(self) -> AsyncCopy:
        """Start copying `counts_E` to the host: `.ready()` never waits, `.result()` waits for this copy alone."""
        return AsyncCopy(self.counts_E)

    def first_tokens(self, keep: int) -> MoEStats:
        """What the first `keep` tokens did, where all after them were padding."""
        return replace(self, routing=self.routing.first_tokens(keep), router_logits_TE=self.router_logits_TE[:keep])

    @property
    def load_balancing_loss(self) -> torch.Tensor:
        """0-dim, differentiable: 1 when balanced."""
        return load_balancing_loss(self.router_logits_TE, self.routing.demand_E, self.routing.top_k)

    @property
    def router_z_loss(self) -> torch.Tensor:
        """0-dim, differentiable."""
        return router_z_loss(self.router_logits_TE)


class MoEBase(nn.Module):
    """Router, stacked expert weights and shared expert: what both layers hold, under the same names."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.router_weight = _uniform(c.num_experts, c.input_dim, fan_in=c.input_dim)
        if c.selection_bias:
            self.register_buffer("selection_bias_E", torch.zeros(c.num_experts, dtype=torch.float32))
        else:
            self.selection_bias_E = None
        self.gate_up_proj = _uniform(c.num_experts, c.up_rows, c.input_dim, fan_in=c.input_dim)
        self.down_proj = _uniform(c.num_experts, c.expert_dim, c.hidden_dim, fan_in=c.hidden_dim)
        self.mid_proj = self.gate_up_bias = self.mid_bias = self.down_bias = None
        if c.depth == 2:
            self.mid_proj = _uniform(c.num_experts, c.hidden_dim, c.hidden_dim, fan_in=c.hidden_dim)
        if c.bias:
            self.gate_up_bias = _uniform(c.num_experts, c.up_rows, fan_in=c.input_dim)
            self.down_bias = _uniform(c.num_experts, c.expert_dim, fan_in=c.hidden_dim)
            if c.depth == 2:
                self.mid_bias = _uniform(c.num_experts, c.hidden_dim, fan_in=c.hidden_dim)
        self.shared_expert = None
        if c.shared_hidden_dim:
            self.shared_expert = Expert(c.input_dim, c.expert_dim, c.shared_hidden_dim, c.activation, c.depth, c.bias)

    @property
    def expert_weights(self) -> ExpertWeights:
        """The stacked weights as the kernels take them (the parameters themselves, no copy)."""
        return ExpertWeights(
            self.gate_up_proj, self.down_proj, self.mid_proj, self.gate_up_bias, self.mid_bias, self.down_bias
        )

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"input_dim={c.input_dim}, hidden_dim={c.hidden_dim}, expert_dim={c.expert_dim}, "
            f"num_experts={c.num_experts}, top_k={c.top_k}, activation={c.activation}"
        )

    def _flatten(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() < 2 or x.shape[-1] != self.config.input_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., input_dim={self.config.input_dim})")
        if x.dtype != self.gate_up_proj.dtype and not self._cast_alike(x):
            raise ValueError(
                f"x is {x.dtype} and the layer is {self.gate_up_proj.dtype}; convert one, or run under autocast"
            )
        return x if x.dim() == 2 else x.reshape(-1, self.config.input_dim)

    def _cast_alike(self, x: torch.Tensor) -> bool:
        """Whether autocast brings x and the weights to one dtype; it leaves float64 alone."""
        wide = torch.float64 in (x.dtype, self.gate_up_proj.dtype)
        return autocast_dtype(x.device) is not None and not wide

    def _logits(self, x_TH: torch.Tensor, given_TE: torch.Tensor | None) -> torch.Tensor:
        if given_TE is None:
            return F.linear(x_TH, self.router_weight)
        expected = (x_TH.shape[0], self.config.num_experts)
        if given_TE.shape != expected:
            raise ValueError(f"router logits have shape {tuple(given_TE.shape)}; expected {expected}")
        return given_TE

    @torch.no_grad()
    def update_selection_bias(self, stats: MoEStats, step_size: float = 1e-3) -> None:
        """Loss-free balancing: call once an optimiser step, after the forward pass; needs `selection_bias=True`."""
        if self.selection_bias_E is None:
            raise ValueError("this layer has no selection bias; build it with selection_bias=True")
        update_selection_bias(self.selection_bias_E, stats.routing.demand_E, step_size)


class MoELayer(MoEBase):
    """The plain layer that everybody writes first: a loop over experts, kept as the baseline. (..., H) to (..., O)."""

    def forward(self, x: torch.Tensor, router_logits_TE: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output; `router_logits_TE` replaces the router's own logits."""
        c = self.config
        x_TH = self._flatten(x)
        logits_TE = self._logits(x_TH, router_logits_TE)
        ids_TK, weights_TK = topk_reference(logits_TE, c.top_k, c.router, self.selection_bias_E)
        capacity = c.capacity(x_TH.shape[0])
        out_TO = self.run_experts(x_TH, ids_TK, weights_TK, capacity)
        if self.shared_expert is not None:
            out_TO = out_TO + self.shared_expert(x_TH)
        return out_TO.view(*x.shape[:-1], c.expert_dim)

    def run_experts(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, capacity: int | None = None
    ) -> torch.Tensor:
        """The routed experts for given choices, one after another."""
        out_TO: torch.Tensor | None = None
        for expert in range(self.config.num_experts):
            token, k = torch.where(ids_TK == expert)
            token, k = token[:capacity], k[:capacity]
            h = self._linear(x_TH[token], self.gate_up_proj, self.gate_up_bias, expert)
            h = activate_reference(h, self.config.activation)
            if self.mid_proj is not None:
                h = activate_reference(self._linear(h, self.mid_proj, self.mid_bias, expert), self.config.activation)
            y = self._linear(h, self.down_proj, self.down_bias, expert)
            if out_TO is None:
                out_TO = y.new_zeros(x_TH.shape[0], self.config.expert_dim)
            out_TO.index_add_(0, token, y * weights_TK[token, k].unsqueeze(-1).to(y.dtype))
        assert out_TO is not None  # there is at least one expert
        return out_TO

    @staticmethod
    def _linear(x: torch.Tensor, stacked: torch.Tensor, bias: torch.Tensor | None, expert: int) -> torch.Tensor:
        return F.linear(x, stacked[expert], None if bias is None else bias[expert])
