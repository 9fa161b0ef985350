"""Frozen, validated descriptions of a Mixture-of-Experts layer, and the shapes of models that people run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Activation:
    """The nonlinearity of an expert: `function(gate) * up` when gated, else `function(up)`."""

    name: str
    function: str
    gated: bool


# A plain dict, since Dynamo refuses to read a mapping proxy once traced code has changed any dict.
ACTIVATIONS: Mapping[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("swiglu", "silu", gated=True),
        Activation("geglu", "gelu", gated=True),
        Activation("geglu_tanh", "gelu_tanh", gated=True),
        Activation("reglu", "relu", gated=True),
        Activation("silu", "silu", gated=False),
        Activation("gelu", "gelu", gated=False),
        Activation("gelu_tanh", "gelu_tanh", gated=False),
        Activation("relu", "relu", gated=False),
    )
}

SCORE_FUNCTIONS = ("softmax", "sigmoid")
HOT, COLD = 2.0, 0.5  # an expert's load over an even share: hot above the one, cold below the other


def _require_positive(owner: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{owner}: {name}={value!r} must be an integer of at least 1")


@dataclass(frozen=True)
class RouterConfig:
    """How logits become expert choices and weights.

    score_function: `softmax` (Mixtral, Qwen3, OLMoE, gpt-oss) or `sigmoid` (DeepSeek-V3).
    softmax_after_topk: choose by logit, then softmax over the chosen (gpt-oss); else softmax over all, then choose.
    norm_topk_prob: divide the chosen weights by their sum.
    routed_scaling_factor: multiplies the weights last.
    n_group, topk_group: group-limited top-k of DeepSeek-V3 (arXiv 2412.19437): only the `topk_group` groups whose two
        best experts score highest can be chosen from.
    """

    score_function: str = "softmax"
    softmax_after_topk: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1

    def __post_init__(self) -> None:
        if self.score_function not in SCORE_FUNCTIONS:
            raise ValueError(f"score_function={self.score_function!r} is not one of {', '.join(SCORE_FUNCTIONS)}")
        if self.softmax_after_topk and self.score_function != "softmax":
            raise ValueError("softmax_after_topk=True needs score_function='softmax'")
        _require_positive("RouterConfig", n_group=self.n_group, topk_group=self.topk_group)
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        if not math.isfinite(self.routed_scaling_factor):
            raise ValueError(f"routed_scaling_factor={self.routed_scaling_factor} must be finite")

    def validate_for(self, num_experts: int, top_k: int) -> None:
        """Raise ValueError unless `top_k` of `num_experts` can be chosen under the group limit."""
        if top_k > num_experts:
            raise ValueError(f"top_k={top_k} exceeds num_experts={num_experts}; choose at most {num_experts}")
        if num_experts % self.n_group:
            raise ValueError(f"num_experts={num_experts} is not a multiple of n_group={self.n_group}")
        eligible = num_experts // self.n_group * self.topk_group
        if top_k > eligible:
            raise ValueError(f"top_k={top_k} exceeds the {eligible} experts of topk_group={self.topk_group} groups")
        if self.n_group > 1 and num_experts // self.n_group < 2:
            raise ValueError(f"n_group={self.n_group} leaves fewer than 2 of num_experts={num_experts} in a group")


@dataclass(frozen=True)
class MoEConfig:
    """One MoE layer: sizes, router and expert type.

    input_dim H, hidden_dim I (each expert's intermediate width), expert_dim O (each expert's output width, usually H).
    depth: hidden layers of an expert; gated activations have 1, plain ones 1 or 2 (three linear layers).
    capacity_factor: None is dropless; a number caps an expert at `ceil(T * K / E * capacity_factor)` rows.
    shared_hidden_dim: intermediate width of one shared expert that every token visits; 0 for none.
    """

    input_dim: int
    expert_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int = 2
    capacity_factor: float | None = None
    activation: str = "swiglu"
    depth: int = 1
    bias: bool = False
    shared_hidden_dim: int = 0
    router: RouterConfig = field(default_factory=RouterConfig)
    selection_bias: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            "MoEConfig",
            input_dim=self.input_dim,
            expert_dim=self.expert_dim,
            hidden_dim=self.hidden_dim,
            num_experts=self.num_experts,
            top_k=self.top_k,
            depth=self.depth,
        )
        if self.shared_hidden_dim < 0:
            raise ValueError(f"shared_hidden_dim={self.shared_hidden_dim} must be 0 (none) or positive")
        validate_expert(self.activation, self.depth)
        if self.capacity_factor is not None and not (math.isfinite(self.capacity_factor) and self.capacity_factor > 0):
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive, or None for dropless")
        self.router.validate_for(self.num_experts, self.top_k)

    def capacity(self, num_tokens: int) -> int | None:
        """Most rows that one expert may take of `num_tokens` tokens; None when dropless."""
        if self.capacity_factor is None:
            return None
        return max(1, math.ceil(num_tokens * self.top_k / self.num_experts * self.capacity_factor))

    @property
    def up_rows(self) -> int:
        """G: rows of an expert's first weight (2I when gated)."""
        return self.hidden_dim * (2 if ACTIVATIONS[self.activation].gated else 1)

    @property
    def parameters_per_expert(self) -> int:
        weights = self.up_rows * self.input_dim + self.hidden_dim * self.expert_dim
        weights += (self.depth - 1) * self.hidden_dim**2
        if self.bias:
            weights += self.up_rows + (self.depth - 1) * self.hidden_dim + self.expert_dim
        return weights

    def forward_flops(self, num_rows: int) -> int:
        """FLOPs of the routed experts' matrix products for `num_rows` routed rows."""
        per_row = self.up_rows * self.input_dim + self.hidden_dim * self.expert_dim
        per_row += (self.depth - 1) * self.hidden_dim**2
        return 2 * num_rows * per_row

    def with_(self, **changes: Any) -> MoEConfig:
        return replace(self, **changes)


def validate_expert(activation: str, depth: int) -> Activation:
    """Return the activation, or raise ValueError for an unknown one or a depth it cannot have."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if depth not in (1, 2):
        raise ValueError(f"depth={depth} is not supported: 1 or 2 hidden layers")
    if depth == 2 and ACTIVATIONS[activation].gated:
        raise ValueError(f"depth=2 needs a plain activation (relu, gelu, silu), not the gated {activation!r}")
    return ACTIVATIONS[activation]


_DEEPSEEK_V3_ROUTER = RouterConfig("sigmoid", routed_scaling_factor=2.5, n_group=8, topk_group=4)

# Sizes from the models' published configurations. gpt-oss-20b's clamped, interleaved activation is not SwiGLU: its
# preset keeps the sizes, router and biases and uses plain SwiGLU.
PRESETS: Mapping[str, MoEConfig] = MappingProxyType(
    {
        "small": MoEConfig(512, 512, 1024, 8, 2),
        "medium": MoEConfig(1024, 1024, 2048, 16, 2),
        "large": MoEConfig(2048, 2048, 4096, 32, 2),
        "qwen3-30b-a3b": MoEConfig(2048, 2048, 768, 128, 8),
        "mixtral-8x7b": MoEConfig(4096, 4096, 14336, 8, 2),
        "olmoe-1b-7b": MoEConfig(2048, 2048, 1024, 64, 8, router=RouterConfig(norm_topk_prob=False)),
        "deepseek-v3": MoEConfig(
            7168, 7168, 2048, 256, 8, shared_hidden_dim=2048, router=_DEEPSEEK_V3_ROUTER, selection_bias=True
        ),
        "gpt-oss-20b": MoEConfig(2880, 2880, 2880, 32, 4, bias=True, router=RouterConfig(softmax_after_topk=True)),
    }
)
