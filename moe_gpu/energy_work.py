"""What a layer executes, expert by expert: FLOPs with the padding of the tiles that serve, and bytes from memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ProductWork:
    """A grouped product as it is executed: (N, K) of one expert's weights, rows padded to multiples of `row_tile`.

    smaller_tiles: of load-aware tiles, whose smallest that fits takes what whole tiles leave.
    elements_per_row: activations that one routed row makes it read and write. every_expert: the weights' traffic is
    that of all experts, visited or not (a weight gradient is written whole).
    """

    name: str
    n: int
    k: int
    row_tile: int
    elements_per_row: float
    every_expert: bool = False
    smaller_tiles: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerWork:
    """What one call of a layer executes, by its counts of rows; router and combine are shared, no expert's own."""

    num_experts: int
    top_k: int
    dtype: str
    element_bytes: int
    products: tuple[ProductWork, ...]
    shared_flops_per_token: float = 0.0
    shared_bytes_per_token: float = 0.0
    shared_bytes_per_call: float = 0.0

    def execute(self, counts: Any, calls: float = 1.0) -> Executed:
        """FLOPs and bytes of `calls` calls that go round through `counts`: (E,), or (steps, E).

        counts: rows of each expert, as numbers, a tensor, or a `Routing` (its `counts_E`; reading a tensor waits for
        the GPU). Where they are not whole they are means of calls: rows of a call then scatter as Poisson's.
        Raises ValueError for another number of experts and for negative counts.
        """
        counts_SE = _as_counts(counts, self.num_experts)
        scale = calls / counts_SE.shape[0]
        hit_SE = _hits(counts_SE)
        flops_E, bytes_E = np.zeros(self.num_experts), np.zeros(self.num_experts)
        for product in self.products:
            padded_SE = _padded(counts_SE, product.row_tile, product.smaller_tiles)
            flops_E += 2.0 * padded_SE.sum(0) * product.n * product.k
            visits_E = np.full(self.num_experts, float(len(hit_SE))) if product.every_expert else hit_SE.sum(0)
            elements_E = visits_E * product.n * product.k + counts_SE.sum(0) * product.elements_per_row
            bytes_E += elements_E * self.element_bytes
        rows_E = counts_SE.sum(0) * scale
        per_row = 2.0 * sum(product.n * product.k for product in self.products)
        tokens = float(rows_E.sum()) / self.top_k
        return Executed(
            rows_E,
            flops_E * scale / per_row if per_row else rows_E,
            flops_E * scale,
            bytes_E * scale,
            tokens * self.shared_flops_per_token,
            tokens * self.shared_bytes_per_token + calls * self.shared_bytes_per_call,
        )


@dataclass(frozen=True)
class Executed:
    """Work of a window: rows, padded rows (over all products, by their FLOPs), FLOPs and bytes of each expert."""

    rows_E: np.ndarray
    padded_E: np.ndarray
    flops_E: np.ndarray
    bytes_E: np.ndarray
    shared_flops: float
    shared_bytes: float


def _as_counts(counts: Any, num_experts: int) -> np.ndarray:
    counts = getattr(counts, "counts_E", counts)
    if hasattr(counts, "detach"):
        counts = counts.detach().cpu().numpy()
    array = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    if array.ndim != 2 or array.shape[1] != num_experts or array.shape[0] == 0:
        raise ValueError(f"counts have shape {np.shape(counts)}; expected ({num_experts},) or (steps, {num_experts})")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("counts hold a negative number or NaN; give rows of each expert")
    return array


def _hits(counts_SE: np.ndarray) -> np.ndarray:
    """1 where an expert is visited; of a mean, how often it is."""
    return np.where(_whole(counts_SE), counts_SE > 0, 1 - np.exp(-counts_SE))


def _padded(counts_SE: np.ndarray, tile: int, smaller: tuple[int, ...] = ()) -> np.ndarray:
    """Rows up to a multiple of the tile; of a mean, the expected value over Poisson's scatter.

    smaller: tiles that take the rest; of a mean they save what they do on average over rests from 1 to a whole tile.
    """
    whole = _whole(counts_SE)
    padded = np.ceil(counts_SE / tile) * tile
    if smaller:
        classes = np.array(sorted((*smaller, tile)))
        saved_of_rest = tile - classes[np.searchsorted(classes, np.arange(1, tile + 1))]  # by rests of 1 to tile rows
        rest_SE = np.where(whole, (counts_SE - 1) % tile, 0).astype(np.int64)
        saved_SE = np.where(whole, saved_of_rest[rest_SE], saved_of_rest.mean()) * _hits(counts_SE)
    else:
        saved_SE = np.zeros_like(counts_SE)
    for index in zip(*np.nonzero(~whole), strict=True):
        padded[index] = tile * _expected_tiles(float(counts_SE[index]), tile)
    return padded - saved_SE


def _whole(counts_SE: np.ndarray) -> np.ndarray:
    return counts_SE == np.round(counts_SE)


def _expected_tiles(mean: float, tile: int) -> float:
    """The mean of ceil(c / tile) for c of Poisson's distribution: the sum over j of P(c > j * tile)."""
    if mean > 20 * tile:
        return mean / tile + 0.5 - 0.5 / tile
    probability, below, tiles, c = math.exp(-mean), 0.0, 0.0, 0
    if probability == 0.0:
        return mean / tile + 0.5 - 0.5 / tile
    while below < 1 - 1e-12 and c < mean + 40 * math.sqrt(mean) + 40:
        below += probability
        if c % tile == 0:
            tiles += max(0.0, 1 - below)
        c += 1
        probability *= mean / c
    return tiles
