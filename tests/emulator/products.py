"""Products over ragged rows by the launchers of the kernels for Hopper, each checked against PyTorch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_gpu.config import ACTIVATIONS
from moe_gpu.reference import activate_reference
from moe_gpu.triton_kernels.hopper import grouped_gemm_hopper
from moe_gpu.triton_kernels.hopper_common import list_row_tiles
from moe_gpu.triton_kernels.hopper_grad import grouped_gemm_grad_act_hopper
from moe_gpu.triton_kernels.hopper_grad_w import grouped_gemm_grad_w_hopper
from moe_gpu.triton_kernels.tuning import HopperConfig
from tests.kernel_cases import check_close

# Rows an expert: more than a tile and a half, none, one, a granule, one more, a whole tile.
ROWS_PER_EXPERT = (200, 0, 1, 64, 65, 128)
TAIL = 30  # rows of dropped routes after the last expert's: their tokens exist, nothing writes them
TOP_K = 2


@dataclass(frozen=True)
class Ragged:
    """Rows of a few experts, sorted by expert, and how to make operands over them."""

    dtype: torch.dtype
    rows_per_expert: tuple[int, ...] = ROWS_PER_EXPERT
    tail: int = TAIL
    programs: int = 3

    @property
    def experts(self) -> int:
        return len(self.rows_per_expert)

    @property
    def num_rows(self) -> int:
        return sum(self.rows_per_expert) + self.tail

    @property
    def num_tokens(self) -> int:
        return self.num_rows // TOP_K

    @property
    def offsets(self) -> torch.Tensor:
        return torch.tensor([0, *self.rows_per_expert]).cumsum(0).to(torch.int32)

    @property
    def groups(self) -> list[slice]:
        ends = self.offsets.tolist()
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def route(self) -> torch.Tensor:
        assert self.num_rows % TOP_K == 0
        return torch.randperm(self.num_rows).to(torch.int32)

    def new(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(self.dtype)

    def weights(self, rows: int, columns: int, by_row: bool) -> torch.Tensor:
        w = self.new(self.experts, rows, columns, scale=columns**-0.5)
        return w if by_row else w.transpose(1, 2).contiguous().transpose(1, 2)

    def check(self, what: str, got: torch.Tensor, compute: Callable[[torch.dtype], torch.Tensor]) -> None:
        """`compute` gives the rows of all experts in a dtype; those of dropped routes must be as they were."""
        rows = sum(self.rows_per_expert)
        check_close(what, got[:rows], compute(self.dtype), compute(torch.float64), self.dtype)
        assert got[rows:].isnan().all(), f"{what}: rows after the last were written"

    def product(self, a: torch.Tensor, w_ENK: torch.Tensor, bias_EN: torch.Tensor | None = None) -> torch.Tensor:
        out = [a[rows] @ w_ENK[e].T for e, rows in enumerate(self.groups)]
        if bias_EN is not None:
            out = [rows + bias_EN[e] for e, rows in enumerate(out)]
        return torch.cat(out)


def check_up(
    on: Ragged,
    config: HopperConfig,
    activation: str | None = "swiglu",
    save_h: bool = False,
    bias: bool = False,
    gather: bool = True,
    by_row: bool = True,
    width: int = 192,
    columns: int = 192,
) -> None:
    """out = f(X W^T + b) and the pre-activations, the rows of X gathered or in order."""
    gated = activation is not None and ACTIVATIONS[activation].gated
    route = on.route() if gather else None
    x = on.new(on.num_tokens if gather else on.num_rows, width)
    w = on.weights(columns * (2 if gated else 1), width, by_row)
    bias_EN = on.new(on.experts, w.shape[1]) if bias else None
    out, h = grouped_gemm_hopper(
        x,
        w,
        list_row_tiles(on.offsets, on.num_rows, config.rows),
        config,
        on.programs,
        route_R=route,
        top_k=TOP_K if gather else 1,
        activation=activation,
        bias_EN=bias_EN,
        save_h=save_h,
    )

    def compute_h(dtype: torch.dtype) -> torch.Tensor:
        rows = x if route is None else x[route.long() // TOP_K]
        # The epilogue adds the bias and activates before it rounds.
        wide = torch.float32 if dtype == on.dtype else dtype
        return on.product(rows.to(wide), w.to(wide), None if bias_EN is None else bias_EN.to(wide))

    def compute_out(dtype: torch.dtype) -> torch.Tensor:
        h = compute_h(dtype)
        return (h if activation is None else activate_reference(h, activation)).to(dtype)

    on.check("out", out, compute_out)
    if save_h:
        on.check("h", h, lambda dtype: compute_h(dtype).to(dtype))


def check_down(on: Ragged, config: HopperConfig, **options) -> None:
    """Y = A W^T, rows in order."""
    check_up(on, config, activation=None, gather=False, **options)


def check_grad_act(
    on: Ragged,
    config: HopperConfig,
    activation: str = "swiglu",
    gather: bool = True,
    by_row: bool = False,
    width: int = 192,
    columns: int = 320,
) -> None:
    """dH and the activation from dO and the saved H, and dS as sums over tiles of columns."""
    hidden = columns * (2 if ACTIVATIONS[activation].gated else 1)
    route = on.route() if gather else None
    grad = on.new(on.num_tokens if gather else on.num_rows, width)
    routing_weights = torch.rand(on.num_tokens, TOP_K)
    w = on.weights(columns, width, by_row)
    h = on.new(on.num_rows, hidden)
    grad_h, act, partials = grouped_gemm_grad_act_hopper(
        grad,
        w,
        h,
        activation,
        list_row_tiles(on.offsets, on.num_rows, config.rows),
        config,
        on.programs,
        route_R=route,
        route_weight_TK=routing_weights if gather else None,
    )

    def compute(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        wide = torch.float32 if dtype == on.dtype else dtype
        rows = grad.to(wide) if route is None else grad.to(wide)[route.long() // TOP_K]
        scale = torch.ones(on.num_rows, 1) if route is None else routing_weights.reshape(-1, 1)[route.long()]
        product = on.product(rows, w.to(wide))
        scale = scale[: len(product)].to(wide)
        leaf = h[: len(product)].to(wide).requires_grad_()
        activated = activate_reference(leaf, activation)
        (grad_leaf,) = torch.autograd.grad(activated, leaf, product * scale)
        activated = activated.detach()
        return grad_leaf.to(dtype), (activated * scale).to(dtype), (activated * product).sum(1, keepdim=True)

    for number, (what, got) in enumerate((("dH", grad_h), ("activation", act))):
        on.check(what, got, lambda dtype, number=number: compute(dtype)[number])
    if gather:
        rows = sum(on.rows_per_expert)
        same_dtype, truth = compute(on.dtype)[2], compute(torch.float64)[2]
        check_close("dS", partials[:rows].sum(1, keepdim=True), same_dtype, truth, torch.float32)
        assert partials[rows:].isnan().all()


def check_grad_w(
    on: Ragged,
    config: HopperConfig,
    gather: bool = False,
    transposed: bool = False,
    width: int = 192,
    columns: int = 320,
) -> None:
    """D^T A of every expert, or its transpose; zeros for one without rows."""
    route = on.route() if gather else None
    d = on.new(on.num_tokens if gather else on.num_rows, width)
    a = on.new(on.num_rows, columns)
    shape = (columns, width) if transposed else (width, columns)
    grad_w = grouped_gemm_grad_w_hopper(
        d,
        a,
        torch.empty(on.experts, *shape, dtype=on.dtype),
        on.offsets,
        config,
        on.programs,
        route_R=route,
        top_k=TOP_K if gather else 1,
        transposed=transposed,
    )

    def compute(dtype: torch.dtype) -> torch.Tensor:
        wide = torch.float32 if dtype == on.dtype else dtype
        rows = d.to(wide) if route is None else d.to(wide)[route.long() // TOP_K]
        out = torch.stack([rows[group].T @ a[group].to(wide) for group in on.groups])
        return (out.transpose(1, 2) if transposed else out).to(dtype)

    check_close("dW", grad_w, compute(on.dtype), compute(torch.float64), on.dtype)
    for e, rows in enumerate(on.rows_per_expert):
        assert rows or (grad_w[e] == 0).all()
