"""The products over rows sorted by expert, each by what serves it: Gluon kernels on Hopper, plain Triton elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from moe_gpu.triton_kernels.fp8 import dequantise, fp8_unavailable, fp8_unfit, step_depth
from moe_gpu.triton_kernels.gather_scatter import permute_forward
from moe_gpu.triton_kernels.grouped_gemm import grouped_gemm_forward, shared_bytes, usable_sms
from moe_gpu.triton_kernels.grouped_gemm_grad import grouped_gemm_grad_act, grouped_gemm_grad_w
from moe_gpu.triton_kernels.tile_table import AnyTile, choose_decode, choose_tile, device_name
from moe_gpu.triton_kernels.tuning import (
    FP8_MAX_ROWS_PER_EXPERT,
    GemmConfig,
    HopperConfig,
    HopperDecodeConfig,
    fp8_config,
    gather_first,
    tile_beside_bias,
)

if TYPE_CHECKING:
    from moe_gpu.triton_kernels.hopper_common import RowTiles

HOPPER_MULTIPLE = 64
# Tiles that serve whatever tables and rules say, by kind: see `given_tiles`.
_GIVEN: dict[str, AnyTile] = {}


@contextmanager
def given_tiles(tiles: Mapping[str, AnyTile]) -> Iterator[None]:
    """Within, these kinds take these tiles, in every thread: for comparisons of one tile with another."""
    before = dict(_GIVEN)
    _GIVEN.update(tiles)
    try:
        yield
    finally:
        _GIVEN.clear()
        _GIVEN.update(before)


def decode_tile(
    x_TH: torch.Tensor, num_rows: int, num_experts: int, hidden_dim: int, sms: int
) -> HopperDecodeConfig | None:
    """The tile of the launch for few rows that serves such rows of all experts, or None where products do."""
    given = _GIVEN.get("decode")
    if given is not None:
        return given if isinstance(given, HopperDecodeConfig) else None
    if "up" in _GIVEN or "down" in _GIVEN:
        return None  # a launch of both would leave the tiles that are given without work
    tokens, width = x_TH.shape
    name = device_name(x_TH.device)
    return choose_decode(x_TH.dtype, num_rows, tokens, num_experts, width, hidden_dim, name, sms).tile


@functools.cache
def hopper_unavailable(device: torch.device) -> str | None:
    """Why the kernels for Hopper cannot run on this device, or None where they can."""
    if device.type != "cuda":
        return "they need a GPU of compute capability 9.0"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"they are for compute capability 9.0, this GPU has {major}.{minor}"
    try:
        import moe_gpu.triton_kernels.hopper_decode
        import moe_gpu.triton_kernels.hopper_grad
        import moe_gpu.triton_kernels.hopper_grad_w  # noqa: F401
    except (ImportError, AttributeError) as error:  # Gluon moves and renames things between releases
        return f"this Triton's Gluon does not fit: {error}"
    return None


def _stacked(w: torch.Tensor) -> bool:
    return w.is_contiguous() or w.transpose(-1, -2).is_contiguous()


def hopper_unfit(dtype: torch.dtype, rows: tuple[torch.Tensor, ...], weights: tuple[torch.Tensor, ...]) -> str | None:
    """Why these operands cannot go by the kernels for Hopper, or None: they load and store 16-byte aligned boxes."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"they compute in bfloat16 and float16, not {dtype}"
    for tensor in (*rows, *weights):
        for size in tensor.shape[1:]:
            if size % HOPPER_MULTIPLE:
                return f"a width of {size} is not a multiple of {HOPPER_MULTIPLE}"
        if tensor.data_ptr() % 16:
            return "an operand does not start on 16 bytes"
    if not all(_stacked(w) for w in weights):
        return "the weights are strided"
    if any(tensor.stride(0) % 8 for tensor in rows):
        return "rows do not start on 16 bytes"
    return None


@dataclass(frozen=True)
class Products:
    """The products of one call: which rows, how many SMs, and whether the kernels for Hopper may serve."""

    dtype: torch.dtype
    device: torch.device
    offsets_P: torch.Tensor
    num_rows: int
    sm_budget: int | None
    hopper: bool
    tiled_experts: int  # that tiles are chosen for
    _lists: dict[int, RowTiles] = field(default_factory=dict)  # of row tiles, by their rows

    @classmethod
    def of(
        cls,
        rows: tuple[torch.Tensor, ...],
        weights: tuple[torch.Tensor, ...],
        offsets_P: torch.Tensor,
        num_rows: int,
        sm_budget: int | None = None,
        tiled_experts: int | None = None,
    ) -> Products:
        """The products of `rows` (2-D tensors) and stacked `weights` (3-D), all of one dtype on one device.

        tiled_experts: how many experts the rows are for in all, where these weights are only some of theirs: tiles
        are chosen as for all.
        """
        device, dtype = rows[0].device, rows[0].dtype
        hopper = num_rows > 0 and hopper_unavailable(device) is None and hopper_unfit(dtype, rows, weights) is None
        return cls(dtype, device, offsets_P, num_rows, sm_budget, hopper, tiled_experts or offsets_P.shape[0] - 1)

    @property
    def num_experts(self) -> int:
        return self.offsets_P.shape[0] - 1

    def tile(self, kind: str, w_ENK: torch.Tensor | None = None) -> GemmConfig | HopperConfig:
        """The tile of a product with these weights as it takes them (or gives them, for their gradient).

        Without weights the answer is that for a shape that no table has.
        """
        given = _GIVEN.get(kind)
        if isinstance(given, GemmConfig | HopperConfig):
            return given
        device = self.device
        return choose_tile(
            kind,
            self.dtype,
            self.num_rows,
            self.tiled_experts,
            None if w_ENK is None else (w_ENK.shape[1], w_ENK.shape[2]),
            device_name(device),
            self._programs,
            shared_bytes(device),
            self.hopper,
        ).tile

    def _row_tiles(self, rows: int) -> RowTiles:
        from moe_gpu.triton_kernels.hopper_common import list_row_tiles

        if rows not in self._lists:
            self._lists[rows] = list_row_tiles(self.offsets_P, self.num_rows, rows)
        return self._lists[rows]

    @property
    def _programs(self) -> int:
        return usable_sms(self.device, self.sm_budget)

    def reads_fp8(self, values_ENK: torch.Tensor, scales_EBC: torch.Tensor) -> bool:
        """Whether the product reads FP8 weights as they are, or they are dequantised first."""
        if self.dtype not in (torch.float16, torch.bfloat16) or fp8_unavailable(self.device):
            return False
        many = self.hopper and self.num_rows >= FP8_MAX_ROWS_PER_EXPERT * self.num_experts
        return not many and fp8_unfit(values_ENK, scales_EBC) is None

    def forward(
        self, kind: str, a: torch.Tensor, w_ENK: torch.Tensor, scales_EBC: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `grouped_gemm_forward`."""
        if scales_EBC is not None:
            if self.reads_fp8(w_ENK, scales_EBC):
                sizes = self.num_rows, self.num_experts, shared_bytes(self.device), step_depth(w_ENK, scales_EBC)
                options |= {"scales_EBC": scales_EBC, "sm_budget": self.sm_budget}
                return grouped_gemm_forward(
                    a, w_ENK, self.offsets_P, self.num_rows, fp8_config(kind, *sizes), **options
                )
            w_ENK = dequantise(w_ENK, scales_EBC, a.dtype)
        tile = self.tile(kind, w_ENK)
        if options.get("bias_EN") is not None:
            tile = tile_beside_bias(kind, tile)
        if isinstance(tile, HopperConfig):
            from moe_gpu.triton_kernels.hopper import grouped_gemm_hopper

            return grouped_gemm_hopper(a, w_ENK, self._row_tiles(tile.rows), tile, self._programs, **options)
        return grouped_gemm_forward(a, w_ENK, self.offsets_P, self.num_rows, tile, sm_budget=self.sm_budget, **options)

    def grad_act(
        self, grad: torch.Tensor, w_ENK: torch.Tensor, h: torch.Tensor, activation: str, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As `grouped_gemm_grad_act`."""
        tile = self.tile("grad_act", w_ENK)
        if isinstance(tile, HopperConfig):
            from moe_gpu.triton_kernels.hopper_grad import grouped_gemm_grad_act_hopper

            return grouped_gemm_grad_act_hopper(
                grad, w_ENK, h, activation, self._row_tiles(tile.rows), tile, self._programs, **options
            )
        return grouped_gemm_grad_act(
            grad, w_ENK, h, activation, self.offsets_P, tile, sm_budget=self.sm_budget, **options
        )

    def grad_w(
        self,
        d: torch.Tensor,
        a: torch.Tensor,
        like_ENK: torch.Tensor,
        *,
        route_R: torch.Tensor | None = None,
        top_k: int = 1,
        gather_d: bool = False,
    ) -> torch.Tensor:
        """D^T A per expert, laid out as `like_ENK`; with `route_R`, d (if `gather_d`) or a has a row per token."""
        tile = self.tile("grad_w" if route_R is None else "grad_w_gather", like_ENK)
        if isinstance(tile, HopperConfig):
            from moe_gpu.triton_kernels.hopper_grad_w import grouped_gemm_grad_w_hopper

            grad_w = torch.empty_like(like_ENK)
            swap = route_R is not None and not gather_d  # the kernel gathers its first operand
            first, second = (a, d) if swap else (d, a)
            by_row = grad_w.is_contiguous()
            grouped_gemm_grad_w_hopper(
                first,
                second,
                grad_w if by_row else grad_w.transpose(1, 2),
                self.offsets_P,
                tile,
                self._programs,
                route_R=route_R,
                top_k=top_k,
                transposed=swap == by_row,
            )
            return grad_w
        if route_R is not None and gather_first(like_ENK.shape[1], self.num_rows, self.num_experts):
            rows = permute_forward(d if gather_d else a, route_R, self.offsets_P, top_k)
            d, a = (rows, a) if gather_d else (d, rows)
            return self.grad_w(d, a, like_ENK)
        gather = {} if route_R is None else {"gather_d": gather_d, "gather_a": not gather_d}
        return grouped_gemm_grad_w(
            d,
            a,
            torch.empty_like(like_ENK),
            self.offsets_P,
            tile,
            route_R=route_R,
            top_k=top_k,
            sm_budget=self.sm_budget,
            **gather,
        )
