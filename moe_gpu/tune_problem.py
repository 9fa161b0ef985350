"""What `moe-gpu tune` times tiles on: a layer's operands at a number of tokens, and whether a product is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_gpu.benchmark.check import Comparison
from moe_gpu.benchmark.problem import sample_choices
from moe_gpu.config import PRESETS, MoEConfig
from moe_gpu.explain import LayerProduct
from moe_gpu.reference import activate_reference
from moe_gpu.triton_kernels.ops import TritonExpertOps
from moe_gpu.triton_kernels.tile_table import AnyTile, Cell, Tile, rows_bucket
from moe_gpu.triton_kernels.tuning import GemmConfig, HopperConfig, HopperDecodeConfig

if TYPE_CHECKING:
    from moe_gpu.triton_kernels.products import Products

DTYPE = torch.bfloat16  # float16 takes the same tiles
CHECKED_EXPERTS, CHECKED_ROWS = 4, 256


@dataclass(frozen=True)
class Case:
    """One cell of the table to be measured: a product of a preset at a number of tokens, on so many SMs.

    routing: as `sample_choices` takes it. A table keeps no routing: the last run of a cell stands.
    """

    preset: str
    product: LayerProduct
    tokens: int
    sms: int
    routing: str = "uniform"

    @property
    def config(self) -> MoEConfig:
        return PRESETS[self.preset]

    @property
    def rows(self) -> int:
        return self.tokens * self.config.top_k

    @property
    def flops(self) -> int:
        if self.product.kind == "decode":
            return self.config.forward_flops(self.rows)
        return 2 * self.rows * self.product.n * self.product.k

    @property
    def cell(self) -> Cell:
        p = self.product
        return Cell(p.kind, DTYPE.itemsize * 8, rows_bucket(self.rows, self.config.num_experts), p.n, p.k, self.sms)

    def __str__(self) -> str:
        skew = "" if self.routing == "uniform" else f" {self.routing}"
        return f"{self.preset} {self.product.weights} T={self.tokens}{skew} on {self.sms} SMs"


class Operands:
    """A layer's tensors at a number of tokens, and its products on them by a given tile.

    routing: as `sample_choices` takes it, or the chosen experts, (tokens, K).
    """

    def __init__(
        self, config: MoEConfig, tokens: int, device: torch.device, routing: str | torch.Tensor = "uniform"
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
            return torch.empty(shape, dtype=DTYPE, device=device).normal_(std=std, generator=generator)

        self.config = c = config
        self.rows = rows = tokens * c.top_k
        self.up = normal(c.num_experts, c.up_rows, c.input_dim, std=c.input_dim**-0.5)
        self.down = normal(c.num_experts, c.expert_dim, c.hidden_dim, std=c.hidden_dim**-0.5)
        self.x, self.grad_out = normal(tokens, c.input_dim), normal(tokens, c.expert_dim)
        self.act, self.h, self.grad_h = normal(rows, c.hidden_dim), normal(rows, c.up_rows), normal(rows, c.up_rows)
        if isinstance(routing, str):
            routing = sample_choices(c, tokens, routing, torch.Generator().manual_seed(0))
        weights = torch.rand(tokens, c.top_k, device=device, generator=generator) + 0.1
        self.routing = TritonExpertOps(device).sort_routes(routing.to(device), weights, c.num_experts)
        self.x_rows = self.x.index_select(0, self.routing.row_token_R)

    def call(self, product: LayerProduct, tile: AnyTile, sms: int) -> Callable[[], dict[str, torch.Tensor]]:
        """What gives a product's results by name, by a tile of its kind."""
        if product.kind == "decode":
            return functools.partial(self._run_both, tile, sms)
        assert isinstance(tile, GemmConfig | HopperConfig)
        return functools.partial(self.run, product, self.products(product.kind, tile, sms))

    def _run_both(self, tile: AnyTile, sms: int) -> dict[str, torch.Tensor]:
        """The rows of inference; RuntimeError for a launch that cannot serve, in whose place products would."""
        from moe_gpu.triton_kernels.custom_ops import expert_rows
        from moe_gpu.triton_kernels.decode import hopper_decode_unfit
        from moe_gpu.triton_kernels.grouped_gemm import num_sms
        from moe_gpu.triton_kernels.products import given_tiles

        c, routing = self.config, self.routing
        unfit = hopper_decode_unfit(self.x, (self.up, self.down), c.num_experts, c.depth, False)
        if isinstance(tile, HopperDecodeConfig) and unfit is not None:
            raise RuntimeError(unfit)
        rows = (routing.row_route_R, routing.row_of_route_TK, routing.offsets_P)
        weights = (self.up, self.down, None, None, None, None)
        budget = None if sms == num_sms(self.x.device) else sms
        with given_tiles({"decode": tile}):
            y = expert_rows(
                self.x, routing.topk_weights_TK, routing.topk_ids_TK, *rows, *weights, c.activation, budget,
                tiled_experts=c.num_experts, out=None,
            )  # fmt: skip
        return {"out": y}

    def products(self, kind: str, tile: Tile, sms: int) -> Products:
        """The layer's products, of which those of `kind` take `tile`."""
        from moe_gpu.triton_kernels.products import Products

        @dataclass(frozen=True)
        class Given(Products):
            def tile(self, other: str, w_ENK: torch.Tensor | None = None) -> Tile:
                return tile if other == kind else super().tile(other, w_ENK)

        operands = (self.x, self.grad_out, self.act, self.h, self.grad_h, self.x_rows)
        return Given.of(operands, (self.up, self.down), self.routing.offsets_P, self.rows, sms)

    def run(self, product: LayerProduct, products: Products) -> dict[str, torch.Tensor]:
        """A product's results by name: rows, or the gradients of all experts' weights."""
        c, routing = self.config, self.routing
        route: dict[str, Any] = {"route_R": routing.row_route_R, "top_k": c.top_k}
        if product.kind == "up":
            return {"out": products.forward("up", self.x, self.up, activation=c.activation, **route)[0]}
        if product.kind == "down":
            return {"out": products.forward("down", self.act, self.down)[0]}
        if product.kind == "grad_x":
            return {"out": products.forward("grad_x", self.grad_h, self.up.transpose(1, 2))[0]}
        if product.kind == "grad_act":
            by_route = {"route_R": routing.row_route_R, "route_weight_TK": routing.topk_weights_TK}
            grad_h, act, partials = products.grad_act(
                self.grad_out, self.down.transpose(1, 2), self.h, c.activation, **by_route
            )
            assert partials is not None  # gathered, so there are some
            return {"grad_h": grad_h, "act": act, "partials": partials}
        if product.kind == "grad_w":
            return {"weights": products.grad_w(self.grad_h, self.x_rows, self.up)}
        if product.weights == "up":
            return {"weights": products.grad_w(self.grad_h, self.x, self.up, **route)}
        return {"weights": products.grad_w(self.grad_out, self.act, self.down, gather_d=True, **route)}

    @functools.cached_property
    def _checked(self) -> list[tuple[int, int, int]]:
        """Some experts, the busiest among them, with their first and end row."""
        bounds = self.routing.offsets_P.tolist()
        last = len(bounds) - 2
        busiest = max(range(last + 1), key=lambda e: bounds[e + 1] - bounds[e])
        spread = {round(last * i / (CHECKED_EXPERTS - 1)) for i in range(CHECKED_EXPERTS)}
        return [(e, bounds[e], bounds[e + 1]) for e in sorted(spread | {busiest})]

    def checked_rows(self) -> torch.Tensor:
        """The first and last rows of the checked experts."""
        return torch.cat([self._ends(first, end) for _, first, end in self._checked])

    def _ends(self, first: int, end: int) -> torch.Tensor:
        rows = torch.arange(first, end, device=self.x.device)
        half = CHECKED_ROWS // 2
        return rows if len(rows) <= CHECKED_ROWS else torch.cat([rows[:half], rows[-half:]])

    def expected(self, product: LayerProduct, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What `run` should give for the checked rows, or the checked experts' weights, by plain torch in `dtype`."""
        parts: dict[str, list[torch.Tensor]] = {}
        for expert, first, end in self._checked:
            for name, value in self._expected_of(product, expert, first, end, dtype).items():
                parts.setdefault(name, []).append(value)
        stacked = "weights" in parts
        return {name: torch.stack(values) if stacked else torch.cat(values) for name, values in parts.items()}

    def _expected_of(
        self, product: LayerProduct, expert: int, first: int, end: int, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        routing, token = self.routing, self.routing.row_token_R
        if product.kind.startswith("grad_w"):
            if product.weights == "up":
                d, a = self.grad_h[first:end], self.x[token[first:end]]
            else:
                d, a = self.grad_out[token[first:end]], self.act[first:end]
            return {"weights": d.to(dtype).t() @ a.to(dtype)}
        rows = self._ends(first, end)
        up, down = self.up[expert].to(dtype), self.down[expert].to(dtype)
        if product.kind in ("up", "decode"):
            out = activate_reference(self.x[token[rows]].to(dtype) @ up.t(), self.config.activation)
            return {"out": out if product.kind == "up" else out @ down.t()}
        if product.kind == "down":
            return {"out": self.act[rows].to(dtype) @ down.t()}
        if product.kind == "grad_x":
            return {"out": self.grad_h[rows].to(dtype) @ up}
        h = self.h[rows].to(dtype).requires_grad_()
        act = activate_reference(h, self.config.activation)
        scale = routing.topk_weights_TK.flatten()[routing.row_route_R[rows].long()].to(dtype).unsqueeze(1)
        grad_act = self.grad_out[token[rows]].to(dtype) @ down
        (grad_h,) = torch.autograd.grad(act, h, grad_act * scale)
        act = act.detach()
        return {"grad_h": grad_h, "act": act * scale, "partials": (grad_act * act).sum(1, keepdim=True)}

    def found(self, results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of `run`'s results that `expected` speaks of."""
        if "weights" in results:
            return {"weights": results["weights"][[expert for expert, _, _ in self._checked]]}
        rows = self.checked_rows()
        found = {name: value[rows] for name, value in results.items()}
        if "partials" in found:
            found["partials"] = found["partials"].sum(1, keepdim=True)
        return found


class WrongTileError(RuntimeError):
    """A tile gives results that are further from the truth than twice PyTorch's."""


def compare(
    found: dict[str, torch.Tensor], same_dtype: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]
) -> None:
    """Raise WrongTileError unless every result is within twice PyTorch's error and one rounding, and zeros are not."""
    for name, expected in truth.items():
        scale = expected.abs().amax().item() if expected.numel() else 0.0
        if scale == 0:
            continue
        torch_error = (same_dtype[name].double() - expected).abs().amax().item()
        error = (found[name].double() - expected).abs().amax().item()
        result = Comparison(error, 2 * torch_error + torch.finfo(DTYPE).eps * scale, scale)
        if not (result.right and result.sensitive):
            raise WrongTileError(f"{name} is wrong: error {error:.3g}, allowed {result.allowed_error:.3g}")
