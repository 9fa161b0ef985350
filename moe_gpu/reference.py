"""Every operation in plain PyTorch: the truth that the tests compare with, and the backend where there is no GPU.

The symbol legend of the whole project. A tensor's name ends in its shape, a letter an axis:

    T tokens                     H input width               I intermediate width of an expert
    E experts                    O output width (mostly H)   G rows of the first weight: 2I (gate, up) or I
    K experts chosen per token   R = T*K routed rows, sorted by expert, stable in token order
    P = E + 1                    boundaries of E segments, or E bins and one for routes that no expert can take

Routing works on any dtype; the products run in the dtype of their inputs, so float64 inputs give the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moe_gpu.config import ACTIVATIONS, RouterConfig

PADDING_TILES = (16, 32, 64, 128)
"""Rows of a tile for which `count_load_reference` counts padding: the heights that products are tiled by."""

INVALID = -1
"""The expert id, or the row, of a route that is dropped: over capacity, a NaN logit, or an id out of range."""


@dataclass(frozen=True)
class Routing:
    """Which rows each expert computes; all tensors stay on the device.

    topk_ids_TK: int32 chosen experts, INVALID where the token's logits were not numbers.
    topk_weights_TK: float32 weights of the chosen experts.
    demand_P: int32 routes that asked for each expert; the last entry counts invalid routes.
    offsets_P: int32 first row of each expert; the last entry is the number of rows in use, at most R.
    row_route_R: int32 route `t * K + k` of each row; rows past the last offset belong to dropped routes.
    row_of_route_TK: int32 row of each route, INVALID where it is dropped.
    """

    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor
    demand_P: torch.Tensor
    offsets_P: torch.Tensor
    row_route_R: torch.Tensor
    row_of_route_TK: torch.Tensor

    @property
    def counts_E(self) -> torch.Tensor:
        """int32 rows that each expert computes."""
        return self.offsets_P.diff()

    @property
    def row_token_R(self) -> torch.Tensor:
        """int32 token of each row."""
        return self.row_route_R // self.top_k

    @property
    def demand_E(self) -> torch.Tensor:
        """int32 routes that asked for each expert, dropped ones included."""
        return self.demand_P[:-1]

    @property
    def num_dropped(self) -> torch.Tensor:
        """0-dim int: routes dropped because their expert was full."""
        return self.demand_P[:-1].sum() - self.offsets_P[-1]

    @property
    def num_invalid(self) -> torch.Tensor:
        """0-dim int: routes of NaN logits or of ids out of range."""
        return self.demand_P[-1]

    @property
    def num_experts(self) -> int:
        return self.offsets_P.shape[0] - 1

    def first_tokens(self, keep: int) -> Routing:
        """The routing of the first `keep` tokens, where all after them are padding: tokens of NaN logits, dropless."""
        num_tokens, top_k = self.topk_ids_TK.shape
        demand_P = self.demand_P.clone()
        demand_P[-1].sub_((num_tokens - keep) * top_k)
        return Routing(
            self.topk_ids_TK[:keep],
            self.topk_weights_TK[:keep],
            demand_P,
            self.offsets_P,
            self.row_route_R[: keep * top_k],
            self.row_of_route_TK[:keep],
        )

    @property
    def top_k(self) -> int:
        return self.topk_ids_TK.shape[1]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast brings products to there; None where it is off, and on the meta device, which it does not know."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights in the layout of `transformers`; gated experts keep the gate half first.

    up_EGH, down_EOI; mid_EII for the second hidden layer of a plain expert; optional biases of each.
    """

    up_EGH: torch.Tensor
    down_EOI: torch.Tensor
    mid_EII: torch.Tensor | None = None
    up_bias_EG: torch.Tensor | None = None
    mid_bias_EI: torch.Tensor | None = None
    down_bias_EO: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """The same weights in another dtype (the same tensors where nothing changes)."""
        if all(tensor is None or tensor.dtype == dtype for tensor in self.tensors()):
            return self

        def convert(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(dtype)

        return ExpertWeights(*map(convert, self.tensors()))

    def some(self, first: int, end: int) -> ExpertWeights:
        """Of the experts from `first` to before `end`: views."""

        def part(tensor: Any) -> Any:
            return None if tensor is None else tensor[first:end]

        return ExpertWeights(*map(part, self.tensors()))

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All weights in the order of the fields, None where there is none."""
        biases = self.up_bias_EG, self.mid_bias_EI, self.down_bias_EO
        return self.up_EGH, self.down_EOI, self.mid_EII, *biases


@dataclass(frozen=True)
class QuantisedStack:
    """FP8 weights and the scale of each block of them: a weight is its value times its block's scale.

    values_ENK: float8_e4m3fn. scales_EBC: float32 or float8_e8m0fnu, each of N / B rows and K / C columns, whole
    blocks; one scale for all is B = C = 1.
    """

    values_ENK: torch.Tensor
    scales_EBC: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """(E, N, K)."""
        return self.values_ENK.shape


@dataclass(frozen=True)
class QuantisedExperts:
    """`ExpertWeights` of depth 1 in FP8, for inference; biases have the activations' dtype."""

    up_EGH: QuantisedStack
    down_EOI: QuantisedStack
    up_bias_EG: torch.Tensor | None = None
    down_bias_EO: torch.Tensor | None = None


def dequantise_reference(values_ENK: torch.Tensor, scales_EBC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Value times scale, multiplied in float32 (float64 for float64) and rounded once to `dtype`.

    16-bit numbers hold every value, so that nothing wider is ever made of them.
    """
    out = values_ENK.detach().to(dtype)
    experts, across, along = scales_EBC.shape
    rows, columns = (size // count for size, count in zip(out.shape[1:], (across, along), strict=True))
    scales = scales_EBC.detach().float().to(torch.promote_types(dtype, torch.float32))
    out.view(experts, across, rows, along, columns).mul_(scales[:, :, None, :, None])
    return out


def apply_function(function: str, x: torch.Tensor) -> torch.Tensor:
    """`silu`, `gelu` (exact), `gelu_tanh` or `relu`, elementwise."""
    if function == "silu":
        return F.silu(x)
    if function == "gelu":
        return F.gelu(x)
    if function == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if function == "relu":
        return F.relu(x)
    raise ValueError(f"unknown elementwise function {function!r}")


def activate_reference(h_RG: torch.Tensor, activation: str) -> torch.Tensor:
    """Pre-activations (R, G) to (R, I): `f(gate) * up` of the two halves, or `f(h)`."""
    kind = ACTIVATIONS[activation]
    if not kind.gated:
        return apply_function(kind.function, h_RG)
    gate_RI, up_RI = h_RG.chunk(2, dim=-1)
    return apply_function(kind.function, gate_RI) * up_RI


def _stable_topk(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest, best first; the lower index wins a tie (torch.topk promises nothing there)."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :k]


def _group_limited(scores_TE: torch.Tensor, router: RouterConfig) -> torch.Tensor:
    """Scores with -inf outside the best `topk_group` groups; a group scores the sum of its two best experts."""
    num_tokens, num_experts = scores_TE.shape
    grouped = scores_TE.view(num_tokens, router.n_group, num_experts // router.n_group)
    group_scores = torch.sort(grouped, dim=-1, descending=True).values[..., :2].sum(-1)
    chosen = _stable_topk(group_scores, router.topk_group)
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).view(num_tokens, num_experts)


def topk_reference(
    logits_TE: torch.Tensor, top_k: int, router: RouterConfig, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts (T, K) int32 and their weights (T, K), differentiable in the logits.

    `bias_E` steers the choice and never the weights (loss-free balancing, arXiv 2408.15664). Ties go to the lower id.
    A token with a logit that gives no finite score gets INVALID ids and zero weights.
    """
    num_experts = logits_TE.shape[1]
    router.validate_for(num_experts, top_k)
    logits = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    numbers = logits if router.score_function == "sigmoid" else torch.softmax(logits.detach(), dim=-1)
    invalid = torch.isnan(numbers).any(-1, keepdim=True)
    logits = logits.masked_fill(invalid, 0)
    if router.score_function == "sigmoid":
        scores = torch.sigmoid(logits)
    elif router.softmax_after_topk:
        scores = logits
    else:
        scores = torch.softmax(logits, dim=-1)
    # Without a bias and groups the order of the scores is that of the logits, and the logits carry no rounding.
    choice = (logits if bias_E is None and router.n_group == 1 else scores).detach()
    if bias_E is not None:
        choice = choice + bias_E.to(choice.dtype)
    if router.n_group > 1:
        choice = _group_limited(choice, router)
    ids = _stable_topk(choice, top_k)

    if router.softmax_after_topk or (router.score_function == "softmax" and router.norm_topk_prob):
        # The softmax over all, renormalised over the chosen, is the softmax over the chosen logits.
        weights = torch.softmax(logits.gather(1, ids), dim=-1)
    else:
        weights = scores.gather(1, ids)
        if router.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * router.routed_scaling_factor
    ids = ids.masked_fill(invalid, INVALID).to(torch.int32)
    return ids, weights.masked_fill(invalid, 0)


def sort_routes_reference(
    topk_ids_TK: torch.Tensor, num_experts: int, capacity: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows by expert, stable in token order: (demand_P, offsets_P, row_route_R, row_of_route_TK), all int32.

    An id outside [0, E) takes no row; neither does a route beyond the first `capacity` of its expert.
    """
    num_tokens, top_k = topk_ids_TK.shape
    device = topk_ids_TK.device
    ids = topk_ids_TK.reshape(-1).to(torch.int64)
    bins = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    # Not torch.bincount, whose output has a size that depends on the data: no graph could hold it.
    demand = bins.new_zeros(num_experts + 1).scatter_add_(0, bins, torch.ones_like(bins))
    order = torch.sort(bins, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=device)
    ends = demand.cumsum(0)
    if capacity is None:  # the sorted routes are the rows, those of no expert last
        offsets = F.pad(ends[:-1], (1, 0))
        row_of_route = torch.where(bins < num_experts, place, INVALID).view(num_tokens, top_k)
        return demand.int(), offsets.int(), order.int(), row_of_route.int()
    rank = place - (ends - demand)[bins]
    kept_route = (bins < num_experts) & (rank < capacity)
    counts = demand[:-1].clamp(max=capacity)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    overflow = torch.cat([demand[:-1] - counts, demand[-1:]])
    overflow_first = offsets[-1] + overflow.cumsum(0) - overflow
    limit_of = torch.where(bins < num_experts, capacity, 0)
    row = torch.where(kept_route, offsets[bins] + rank, overflow_first[bins] + rank - limit_of)
    row_route = torch.empty_like(order)
    row_route[row] = torch.arange(order.numel(), device=device)
    row_of_route = torch.where(kept_route, row, INVALID).view(num_tokens, top_k)
    return demand.int(), offsets.int(), row_route.int(), row_of_route.int()


def route_reference(
    logits_TE: torch.Tensor,
    top_k: int,
    router: RouterConfig,
    bias_E: torch.Tensor | None = None,
    capacity: int | None = None,
) -> Routing:
    """Logits to a Routing: `topk_reference`, then `sort_routes_reference`."""
    ids, weights = topk_reference(logits_TE, top_k, router, bias_E)
    return Routing(ids, weights, *sort_routes_reference(ids, logits_TE.shape[1], capacity))


def permute_reference(x_TH: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Rows sorted by expert, (R, H); zero in the rows that no expert computes."""
    rows = x_TH.index_select(0, routing.row_token_R)
    used = torch.arange(rows.shape[0], device=rows.device) < routing.offsets_P[-1]
    return torch.where(used.unsqueeze(-1), rows, torch.zeros((), dtype=rows.dtype, device=rows.device))


def combine_reference(y_RO: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Weighted sum over a token's routes, (T, O): accumulated in float32 (or wider), order of k fixed."""
    row = routing.row_of_route_TK.long()
    kept = (row != INVALID).unsqueeze(-1)
    wide = torch.promote_types(y_RO.dtype, torch.float32)
    y_TKO = y_RO.index_select(0, row.clamp(min=0).flatten()).view(*row.shape, y_RO.shape[1])
    parts = y_TKO.to(wide) * routing.topk_weights_TK.to(wide).unsqueeze(-1)
    return torch.where(kept, parts, torch.zeros((), dtype=wide, device=y_RO.device)).sum(1).to(y_RO.dtype)


def grouped_gemm_reference(
    a_RK: torch.Tensor, w_ENK: torch.Tensor, offsets_P: torch.Tensor, bias_EN: torch.Tensor | None = None
) -> torch.Tensor:
    """`a[rows of e] @ w[e].T + bias[e]` for each expert e, (R, N); zero in the rows past the last offset."""
    bounds = offsets_P.tolist()
    # One unbind instead of an index each: the gradient of an index is as large as all the experts.
    biases = [None] * w_ENK.shape[0] if bias_EN is None else bias_EN.unbind()
    pieces = []
    for expert, (weight, bias) in enumerate(zip(w_ENK.unbind(), biases, strict=True)):
        pieces.append(F.linear(a_RK[bounds[expert] : bounds[expert + 1]], weight, bias))
    pieces.append(a_RK.new_zeros(a_RK.shape[0] - bounds[-1], w_ENK.shape[1]))
    return torch.cat(pieces)


def starts_aligned(tensor: torch.Tensor) -> bool:
    """Whether it starts on 64 bytes: BLAS libraries round otherwise elsewhere."""
    try:
        return tensor.data_ptr() % 64 == 0
    except RuntimeError:  # it has no memory of its own, as inside torch.func's transforms
        return False


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if starts_aligned(tensor) else tensor.clone()


def expert_rows_reference(
    rows_RH: torch.Tensor, offsets_P: torch.Tensor, weights: ExpertWeights, activation: str
) -> torch.Tensor:
    """The experts' own rows (R, O): up, activation, (mid, activation,) down; zero in the rows that no expert has.

    One expert after another, so that what an expert gives depends to the bit on its own rows and weights alone, not on
    where they lie or which experts are computed beside it. The offsets may begin above 0.
    """
    bounds = offsets_P.tolist()
    width, num_experts = weights.down_EOI.shape[1], weights.down_EOI.shape[0]
    # One unbind instead of an index each: the gradient of an index is as large as all the experts.
    stacks: list[Any] = [[None] * num_experts if stack is None else stack.unbind() for stack in weights.tensors()]
    up, down, mid, up_bias, mid_bias, down_bias = stacks
    pieces = [rows_RH.new_zeros(bounds[0], width)]
    for e in range(num_experts):
        rows = _aligned(rows_RH[bounds[e] : bounds[e + 1]])
        h = activate_reference(F.linear(rows, _aligned(up[e]), up_bias[e]), activation)
        if weights.mid_EII is not None:
            h = activate_reference(F.linear(h, _aligned(mid[e]), mid_bias[e]), activation)
        pieces.append(F.linear(h, _aligned(down[e]), down_bias[e]))
    pieces.append(rows_RH.new_zeros(rows_RH.shape[0] - bounds[-1], width))
    return torch.cat(pieces)


_ACTIVATED_BY_ONE_THREAD = 1 << 15  # with as many numbers or more PyTorch divides them among threads, anywhere


def _activate_by_expert(h_RG: torch.Tensor, activation: str, offsets_P: torch.Tensor) -> torch.Tensor:
    """`activate_reference` with the bits of one expert after another, where every row has one; of all rows in a trace.

    PyTorch rounds a function's last few numbers otherwise than those before, and GELU of one row otherwise than of two.
    """
    kind = ACTIVATIONS[activation]
    # SiLU of gates is computed row by row, since between two rows of them lies one of the up half.
    row_by_row = kind.function == "silu" and kind.gated and h_RG.numel() // 2 < _ACTIVATED_BY_ONE_THREAD
    unread = torch.compiler.is_compiling() or h_RG.device.type == "meta"  # offsets that nothing can read
    if unread or kind.function == "relu" or row_by_row:
        return activate_reference(h_RG, activation)
    return torch.cat([activate_reference(rows, activation) for rows in h_RG.split(offsets_P.diff().tolist())])


def experts_reference(
    x_TH: torch.Tensor,
    routing: Routing,
    weights: ExpertWeights,
    activation: str,
    grouped_gemm: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """The whole expert part: permute, up, activation, (mid, activation,) down, combine; (T, O).

    grouped_gemm: multiplies the rows of all experts at once, as `grouped_gemm_reference` does; without it one expert
    after another is computed.
    """
    rows = x_TH.index_select(0, routing.row_token_R)  # those past the last offset are not read
    offsets = routing.offsets_P
    if grouped_gemm is None:
        return combine_reference(expert_rows_reference(rows, offsets, weights, activation), routing)
    h = _activate_by_expert(grouped_gemm(rows, weights.up_EGH, offsets, weights.up_bias_EG), activation, offsets)
    if weights.mid_EII is not None:
        h = _activate_by_expert(grouped_gemm(h, weights.mid_EII, offsets, weights.mid_bias_EI), activation, offsets)
    return combine_reference(grouped_gemm(h, weights.down_EOI, offsets, weights.down_bias_EO), routing)


def load_balancing_loss(logits_TE: torch.Tensor, demand_E: torch.Tensor, top_k: int) -> torch.Tensor:
    """Switch's auxiliary loss (arXiv 2101.03961): `E * sum_e(share of routes * mean probability)`, 1 when balanced."""
    num_tokens, num_experts = logits_TE.shape
    mean_probability = torch.softmax(logits_TE.float(), dim=-1).mean(0) if num_tokens else logits_TE.float().sum(0)
    share = demand_E.float() / max(num_tokens * top_k, 1)
    return num_experts * (share * mean_probability).sum()


def router_z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean squared log-partition of the router (ST-MoE, arXiv 2202.08906); 0 without tokens."""
    if logits_TE.shape[0] == 0:
        return logits_TE.float().sum()
    return torch.logsumexp(logits_TE.float(), dim=-1).square().mean()


@torch.no_grad()
def update_selection_bias(bias_E: torch.Tensor, demand_E: torch.Tensor, step_size: float) -> None:
    """Loss-free balancing (arXiv 2408.15664), in place: raise the bias of underloaded experts, lower the others'."""
    load = demand_E.float()
    bias_E.add_(torch.sign(load.mean() - load).to(bias_E.dtype), alpha=step_size)


def load_state_size(num_experts: int) -> int:
    """Numbers in one layer's load counters: E + 1 counts, E peaks, a sum of padded rows for each tile, and calls."""
    return 2 * num_experts + 1 + len(PADDING_TILES) + 1


def repeated_by_checkpointing() -> bool:
    """Whether this runs inside a backward pass: then it is a forward pass that gradient checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@torch.no_grad()
def count_load_reference(state_S: torch.Tensor, demand_P: torch.Tensor) -> None:
    """Add one call's histogram, in place, to int64 counters `state_S`, laid out as `load_state_size` says.

    Nothing is added for a forward pass that gradient checkpointing repeats.
    """
    if repeated_by_checkpointing():
        return
    num_experts = demand_P.shape[0] - 1
    rows = demand_P[:-1].long()
    state_S[: num_experts + 1] += demand_P
    peaks = state_S[num_experts + 1 : 2 * num_experts + 1]
    torch.maximum(peaks, rows, out=peaks)
    padded = state_S[2 * num_experts + 1 : -1]
    padded += torch.stack([((rows + tile - 1) // tile * tile).sum() for tile in PADDING_TILES])
    state_S[-1] += 1
