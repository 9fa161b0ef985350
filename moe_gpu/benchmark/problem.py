"""One layer to benchmark: the same inputs, weights and imposed routing for every provider, and the memory they take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from moe_gpu.config import MoEConfig
from moe_gpu.profiler import RoutingTrace
from moe_gpu.reference import ExpertWeights

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
    }
)
MODES = ("forward", "backward", "forward+backward")
MEMORY_SHARE = 0.9

# The chosen experts' offsets start here and the others' stay near 0: no rounding of the logits can change a choice.
CHOSEN_OFFSET, CHOSEN_SPREAD, OTHER_SPREAD, ROUTER_SPREAD = 4.0, 2.0, 0.25, 0.05


class MemoryLimitError(ValueError):
    """A problem does not fit; the message names the size, the limit and the remedy."""


@dataclass(frozen=True)
class Problem:
    """What every provider computes: `logits = logit_offset + x @ router_weight.T`, its own routing, experts, combine.

    All tensors are in one dtype on one device; x, the router weight and the expert weights are leaves that want
    gradients. topk_ids_TK: the choices that the offset imposes. selection_bias_E: float32, steers the choice alone.
    """

    config: MoEConfig
    routing: str
    x_TH: torch.Tensor
    router_weight_EH: nn.Parameter
    logit_offset_TE: torch.Tensor
    weights: ExpertWeights
    grad_out_TO: torch.Tensor
    topk_ids_TK: torch.Tensor
    selection_bias_E: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.x_TH.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x_TH.dtype

    @property
    def device(self) -> torch.device:
        return self.x_TH.device

    def logits(self) -> torch.Tensor:
        """Router logits (T, E): one matrix product, the imposed routing included, the same for every provider."""
        return torch.addmm(self.logit_offset_TE, self.x_TH, self.router_weight_EH.t())

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        """Every tensor that training would want a gradient of."""
        w = self.weights
        named = {
            "x": self.x_TH,
            "router_weight": self.router_weight_EH,
            "up": w.up_EGH,
            "down": w.down_EOI,
            "mid": w.mid_EII,
            "up_bias": w.up_bias_EG,
            "mid_bias": w.mid_bias_EI,
            "down_bias": w.down_bias_EO,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def rows_E(self) -> torch.Tensor:
        """int64 rows that each expert computes under the imposed routing, at most its capacity."""
        c = self.config
        ids = self.topk_ids_TK[self.topk_ids_TK >= 0]
        return torch.bincount(ids, minlength=c.num_experts).clamp(max=c.capacity(self.num_tokens) or ids.numel())

    def flops(self, mode: str) -> int:
        """FLOPs of the router's and the experts' matrix products in one pass; a backward pass has twice as many."""
        c = self.config
        forward = c.forward_flops(int(self.rows_E().sum())) + 2 * self.num_tokens * c.input_dim * c.num_experts
        return forward * {"forward": 1, "backward": 2, "forward+backward": 3}[mode]

    def min_bytes(self, mode: str) -> int:
        """Bytes that a pass moves at least: inputs and outputs once, and once each expert's weights that are hit.

        A backward pass writes the gradient of every weight, hit or not.
        """
        c = self.config
        hit = int(self.rows_E().count_nonzero())
        router = c.num_experts * c.input_dim
        read = hit * c.parameters_per_expert + router
        rows = self.num_tokens * (c.input_dim + c.expert_dim)
        forward = read + rows
        backward = read + c.num_experts * c.parameters_per_expert + router + rows + self.num_tokens * c.input_dim
        elements = {"forward": forward, "backward": backward, "forward+backward": forward + backward}[mode]
        return elements * self.x_TH.element_size()


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name, or of itself; ValueError for one that is not benchmarked."""
    known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if known is None or known not in DTYPES.values():
        raise ValueError(f"dtype={str(dtype).removeprefix('torch.')!r} is not one of {', '.join(DTYPES)}")
    return known


def zipf_exponent(routing: str) -> float | None:
    """The exponent of a routing named `zipf-S`, None for another valid name; ValueError for an unknown one."""
    if routing in ("uniform", "one-expert", "trace"):
        return None
    name, _, exponent = routing.partition("-")
    try:
        value = float(exponent)
    except ValueError:
        value = math.nan
    if name != "zipf" or not 0 < value < math.inf:
        raise ValueError(
            f"routing={routing!r} is not one of uniform, one-expert, trace, zipf-S with S above 0 (zipf-1.2)"
        )
    return value


def sample_choices(
    config: MoEConfig, num_tokens: int, routing: str, generator: torch.Generator, trace: RoutingTrace | None = None
) -> torch.Tensor:
    """Choices int64 (T, K) on the host for a named routing.

    `uniform` and `zipf-S` (popularity of the r-th expert ~ r^-S, ranks shuffled) sample without replacement by Gumbel
    noise on the log-popularity; `one-expert` gives every token the same K experts; `trace` replays layer 0 of `trace`.
    Raises ValueError for a trace of another shape.
    """
    c = config
    exponent = zipf_exponent(routing)
    if routing == "trace":
        return check_trace(c, trace).replay(num_tokens).long()
    if routing == "one-expert":
        return torch.arange(c.top_k).expand(num_tokens, c.top_k).clone()
    log_popularity_E = torch.zeros(c.num_experts)
    if exponent is not None:
        rank_E = torch.randperm(c.num_experts, generator=generator) + 1
        log_popularity_E = -exponent * rank_E.log()
    scores_TE = log_popularity_E - torch.empty(num_tokens, c.num_experts).exponential_(generator=generator).log_()
    if c.router.n_group > 1:
        scores_TE = _within_groups(scores_TE, c.router.n_group, c.router.topk_group)
    return scores_TE.topk(c.top_k).indices


def _within_groups(scores_TE: torch.Tensor, n_group: int, topk_group: int) -> torch.Tensor:
    """-inf outside each token's best groups, so that the router's group limit allows every sampled choice."""
    grouped = scores_TE.view(scores_TE.shape[0], n_group, -1)
    best = grouped.logsumexp(-1).topk(topk_group).indices
    keep = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).view_as(scores_TE)


def check_trace(config: MoEConfig, trace: RoutingTrace | None) -> RoutingTrace:
    """The trace; ValueError unless it can be replayed on this layer."""
    if trace is None:
        raise ValueError("routing='trace' needs a recorded trace; give one, or choose uniform or zipf-1.2")
    if (trace.num_experts, trace.top_k) != (config.num_experts, config.top_k):
        raise ValueError(
            f"the trace has num_experts={trace.num_experts} and top_k={trace.top_k}, the layer "
            f"num_experts={config.num_experts} and top_k={config.top_k}; give the layer the trace's sizes"
        )
    return trace


def make_problem(
    config: MoEConfig,
    num_tokens: int,
    routing: str = "uniform",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trace: RoutingTrace | None = None,
    seed: int = 0,
) -> Problem:
    """The one set-up for all providers: seeded, normally distributed, scaled so that outputs are of order 1.

    The routing depends on the seed alone, the numbers also on the device. A shared expert is left out: it is a dense
    MLP that costs every provider the same.
    """
    c = config.with_(shared_hidden_dim=0)
    device = torch.device(device)
    host = torch.Generator().manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=std, generator=generator)

    def parameter(*shape: int, std: float) -> nn.Parameter:
        return nn.Parameter(normal(*shape, std=std))

    ids_TK = sample_choices(c, num_tokens, routing, host, trace).to(device)
    # One column more than experts: there the routes that a trace dropped write, and impose nothing.
    offset_TP = torch.empty(num_tokens, c.num_experts + 1, device=device).normal_(std=OTHER_SPREAD, generator=generator)
    chosen_TK = torch.empty(ids_TK.shape, device=device).uniform_(generator=generator) * CHOSEN_SPREAD + CHOSEN_OFFSET
    offset_TP.scatter_(1, torch.where(ids_TK >= 0, ids_TK, c.num_experts), chosen_TK)

    e, i = c.num_experts, c.hidden_dim
    into, inner = c.input_dim**-0.5, i**-0.5
    mid = c.depth == 2
    weights = ExpertWeights(
        up_EGH=parameter(e, c.up_rows, c.input_dim, std=into),
        down_EOI=parameter(e, c.expert_dim, i, std=inner),
        mid_EII=parameter(e, i, i, std=inner) if mid else None,
        up_bias_EG=parameter(e, c.up_rows, std=0.1) if c.bias else None,
        mid_bias_EI=parameter(e, i, std=0.1) if c.bias and mid else None,
        down_bias_EO=parameter(e, c.expert_dim, std=0.1) if c.bias else None,
    )
    bias_E = None
    if c.selection_bias:
        bias_E = torch.empty(e, device=device).normal_(std=0.01, generator=generator)
    return Problem(
        config=c,
        routing=routing,
        x_TH=normal(num_tokens, c.input_dim, std=1.0).requires_grad_(),
        router_weight_EH=parameter(e, c.input_dim, std=ROUTER_SPREAD * into),
        logit_offset_TE=offset_TP[:, :-1].to(dtype).contiguous(),
        weights=weights,
        grad_out_TO=normal(num_tokens, c.expert_dim, std=1.0),
        topk_ids_TK=ids_TK,
        selection_bias_E=bias_E,
    )


def free_memory_bytes(device: torch.device) -> int | None:
    """Memory that could be allocated on the device now; None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def estimate_bytes(config: MoEConfig, num_tokens: int, dtype: torch.dtype, gradients: bool) -> int:
    """About the most memory that one provider at a time takes, weights and inputs included."""
    fixed, per_token = _fixed_and_per_token(config, dtype, gradients)
    return fixed + num_tokens * per_token


def _fixed_and_per_token(c: MoEConfig, dtype: torch.dtype, gradients: bool) -> tuple[int, int]:
    size = dtype.itemsize
    passes = 2 if gradients else 1
    fixed = c.num_experts * (c.parameters_per_expert + c.input_dim) * size * passes
    # The peers keep the rows, both halves, the activation, and the output before and after weighting and sorting back.
    row = c.input_dim + 2 * c.up_rows + (1 + c.depth) * c.hidden_dim + 3 * c.expert_dim
    per_token = c.top_k * (row * size * passes + 64)
    per_token += 2 * (c.input_dim + c.expert_dim) * size * passes
    per_token += c.num_experts * (2 * size + 16)  # logits, offsets, and scores in float32
    return fixed, per_token


def check_memory(config: MoEConfig, num_tokens: int, dtype: torch.dtype, gradients: bool, device: torch.device) -> None:
    """Raise MemoryLimitError before anything is allocated where the problem would not fit."""
    free = free_memory_bytes(device)
    if free is None:
        return
    limit = int(free * MEMORY_SHARE)
    fixed, per_token = _fixed_and_per_token(config, dtype, gradients)
    need = fixed + num_tokens * per_token
    if need <= limit:
        return
    most = (limit - fixed) // per_token
    remedy = f"give at most num_tokens={most}" if most > 0 else "choose fewer or smaller experts"
    raise MemoryLimitError(
        f"num_tokens={num_tokens} needs about {_gib(need)}, and {_gib(limit)} may be used on {device.type}; {remedy}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
