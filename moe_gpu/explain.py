"""Which kernel and tile serves each product of a layer, and the least that it must do: nothing is run.

For the GPU that is present, or for one described by its name on a machine without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moe_gpu.config import ACTIVATIONS, MoEConfig
from moe_gpu.energy_work import LayerWork, ProductWork
from moe_gpu.slices.device import KNOWN_DEVICES
from moe_gpu.triton_kernels.ops import choose_backend
from moe_gpu.triton_kernels.tuning import (
    HOPPER_SHARED_BYTES,
    GemmConfig,
    HopperConfig,
    cdiv,
    gather_first,
    operand_bytes,
    shared_bytes_of,
    tile_beside_bias,
)

if TYPE_CHECKING:
    from moe_gpu.triton_kernels.tile_table import DecodeChoice


@dataclass(frozen=True)
class Gpu:
    """What a choice of tile depends on; `device` is None for a GPU that is only described."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_bytes: int
    device: torch.device | None = None


def present_gpu() -> Gpu:
    """The current GPU; ValueError, with the remedy, where the kernels cannot run."""
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    backend = choose_backend("cpu" if index is None else "cuda", index)
    if index is None or backend.name != "triton":
        raise ValueError(f"this needs a GPU that Triton serves: {backend.reason}; see `moe-gpu doctor`")
    from moe_gpu.triton_kernels.grouped_gemm import num_sms, shared_bytes

    device = torch.device("cuda", index)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Gpu(name, capability, num_sms(device), shared_bytes(device), device)


def described_gpu(name: str) -> Gpu:
    """A GPU by its name, from its table of tiles or from the few that are known; ValueError for another."""
    from moe_gpu.triton_kernels.tile_table import tables

    if importlib.util.find_spec("triton") is None:
        raise ValueError("the kernels' own rules are asked, so the package triton is needed; install it (Linux)")
    for _, table in tables(name):
        machine = table.machines[-1]
        if machine.compute_capability and machine.num_sms:
            major, minor = map(int, machine.compute_capability.split("."))
            return Gpu(name, (major, minor), machine.num_sms, shared_bytes_of((major, minor)))
    if name not in KNOWN_DEVICES:
        raise ValueError(f"device={name!r} is not known: give cpu, cuda or one of {', '.join(KNOWN_DEVICES)}")
    known = KNOWN_DEVICES[name]
    return Gpu(name, known.capability, known.num_sms, shared_bytes_of(known.capability))


@dataclass(frozen=True)
class LayerProduct:
    """A product of one layer: `weights` "up", "down" or both, and (N, K) as the product takes them."""

    kind: str
    weights: str
    n: int
    k: int


def layer_products(config: MoEConfig) -> list[LayerProduct]:
    """Every product of a layer of depth 1, forward then backward, in the order in which they run."""
    c, gate_up = config, config.up_rows
    return [
        LayerProduct("up", "up", gate_up, c.input_dim),
        LayerProduct("down", "down", c.expert_dim, c.hidden_dim),
        LayerProduct("grad_act", "down", c.hidden_dim, c.expert_dim),
        LayerProduct("grad_w_gather", "down", c.expert_dim, c.hidden_dim),
        LayerProduct("grad_w_gather", "up", gate_up, c.input_dim),
        LayerProduct("grad_x", "up", c.input_dim, gate_up),
    ]


def both_products(config: MoEConfig) -> LayerProduct:
    """Up and down projection of inference as tables know them: by an expert's hidden and input width."""
    return LayerProduct("decode", "up and down", config.hidden_dim, config.input_dim)


@dataclass(frozen=True)
class Explanation:
    """What serves one step of a layer. path: `triton`, `gluon`, or for few rows `decode` (Triton) and `gluon decode`.

    flops and min_bytes: the least work (each active expert's weights once); floor_ms: that work at the ceilings that
    `moe-gpu tune` measured on this GPU model, None where it did not. measured_ms: of the table's entry. wide_rows: are
    rows left in float32.
    """

    step: str
    path: str
    why: str
    tile: dict[str, Any] | None = None
    not_hopper: str | None = None
    programs: int | None = None
    shared_bytes: int | None = None
    flops: int | None = None
    min_bytes: int | None = None
    floor_ms: float | None = None
    measured_ms: float | None = None
    wide_rows: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def hopper_reason(gpu: Gpu, config: MoEConfig, dtype: torch.dtype) -> str | None:
    """Why the kernels for Hopper cannot serve a layer with contiguous operands, or None where they can."""
    from moe_gpu.triton_kernels.products import hopper_unavailable, hopper_unfit

    if gpu.device is not None:
        unavailable = hopper_unavailable(gpu.device)
        if unavailable:
            return unavailable
    elif gpu.capability != (9, 0):
        return f"they are for compute capability 9.0, {gpu.name} has {gpu.capability[0]}.{gpu.capability[1]}"
    c = config
    rows = tuple(torch.empty(1, width, dtype=dtype, device="meta") for width in (c.input_dim, c.expert_dim))
    up = torch.empty(1, c.up_rows, c.input_dim, dtype=dtype, device="meta")
    return hopper_unfit(dtype, rows, (up, torch.empty(1, c.expert_dim, c.hidden_dim, dtype=dtype, device="meta")))


def explain_layer(
    gpu: Gpu, config: MoEConfig, num_tokens: int, dtype: torch.dtype, sm_budget: int | None = None
) -> list[Explanation]:
    """Each step of forward and backward on a GPU under an even routing, in the order in which they run."""
    from moe_gpu.triton_kernels.tile_table import Choice, choose_tile, tables

    c, size = config, dtype.itemsize
    rows, element = num_tokens * c.top_k, size
    active = min(rows, c.num_experts)
    sms = gpu.num_sms if sm_budget is None else min(gpu.num_sms, sm_budget)
    no_hopper = hopper_reason(gpu, c, dtype)
    ceilings = {ceiling.name: ceiling.value for _, table in tables(gpu.name)[:1] for ceiling in table.ceilings}

    def floor_ms(flops: int, num_bytes: int) -> float | None:
        if not {"matmul", "copy"} <= set(ceilings) or size != 2:  # the ceilings are of 16-bit numbers
            return None
        return max(flops / ceilings["matmul"], num_bytes / ceilings["copy"]) * 1e3

    def moved(step: str, num_bytes: int) -> Explanation:
        why = "the only kernel for it"
        return Explanation(step, "triton", why, flops=0, min_bytes=num_bytes, floor_ms=floor_ms(0, num_bytes))

    def choose(kind: str, n: int, k: int) -> Choice:
        return choose_tile(kind, dtype, rows, c.num_experts, (n, k), gpu.name, sms, gpu.shared_bytes, no_hopper is None)

    explanations = []
    for product in layer_products(c):
        kind, n, k = product.kind, product.n, product.k
        choice = choose(kind, n, k)
        if kind == "grad_w_gather" and isinstance(choice.tile, GemmConfig) and gather_first(n, rows, c.num_experts):
            kind = "grad_w"
            choice = choose(kind, n, k)
            choice = replace(choice, reason=f"after a copy of the gathered rows into order; {choice.reason}")
        if c.bias and kind in ("up", "down") and choice.tile != tile_beside_bias(kind, choice.tile):
            choice = Choice(tile_beside_bias(kind, choice.tile), "heuristic (192 rows would spill beside a bias)")
        flops = 2 * rows * n * k
        num_bytes = element * sum(_tensors(kind, product.weights, c, num_tokens, active))
        explanations.append(
            Explanation(
                step=kind if not kind.startswith("grad_w") else f"{kind} ({product.weights})",
                path="gluon" if isinstance(choice.tile, HopperConfig) else "triton",
                why=choice.reason,
                tile=asdict(choice.tile),
                not_hopper=no_hopper,
                programs=_programs(kind, choice.tile, rows, c, n, k, sms),
                shared_bytes=operand_bytes(kind, choice.tile, ACTIVATIONS[c.activation].gated) * size // 2,
                flops=flops,
                min_bytes=num_bytes,
                floor_ms=floor_ms(flops, num_bytes),
                measured_ms=choice.time_ms,
            )
        )
    routes = 4 * 4 * rows  # ids, weights, and the two maps between rows and routes
    one_launch = _one_launch(gpu, c, dtype, num_tokens, sms)
    if one_launch is not None or _decode_serves(gpu, c, dtype, rows, sm_budget):
        explanations[:0] = [_explain_decode(one_launch, step, c, rows, sms, floor_ms) for step in explanations[:2]]
    route = moved("route", num_tokens * c.num_experts * element + routes)
    combine = moved("combine", element * (rows * c.expert_dim + num_tokens * c.expert_dim) + 8 * rows)
    sum_x = moved("combine (grad_x)", element * (rows * c.input_dim + num_tokens * c.input_dim) + 4 * rows)
    forward = len(explanations) - 4
    return [route, *explanations[:forward], combine, *explanations[forward:], sum_x]


def _one_launch(gpu: Gpu, c: MoEConfig, dtype: torch.dtype, num_tokens: int, sms: int) -> DecodeChoice | None:
    """The choice by which inference takes up and down projection in one launch, as custom_ops.py asks, if it does."""
    from moe_gpu.triton_kernels.decode import HOPPER_DECODE_MAX_EXPERTS, hopper_decode_unfit
    from moe_gpu.triton_kernels.tile_table import choose_decode

    if gpu.device is not None:
        x = torch.empty(1, c.input_dim, dtype=dtype, device=gpu.device)
        up = torch.empty(1, c.up_rows, c.input_dim, dtype=dtype, device="meta")
        down = torch.empty(1, c.expert_dim, c.hidden_dim, dtype=dtype, device="meta")
        fits = hopper_decode_unfit(x, (up, down), c.num_experts, c.depth, False) is None
    else:
        fits = gpu.capability == (9, 0) and dtype.itemsize == 2 and c.depth == 1
        fits = fits and c.input_dim % 8 == c.hidden_dim % 8 == 0 and c.num_experts <= HOPPER_DECODE_MAX_EXPERTS
    if not fits:
        return None
    sizes = num_tokens * c.top_k, num_tokens, c.num_experts, c.input_dim, c.hidden_dim
    choice = choose_decode(dtype, *sizes, gpu.name, sms)
    return None if choice.tile is None else choice


def _decode_serves(gpu: Gpu, c: MoEConfig, dtype: torch.dtype, rows: int, sm_budget: int | None) -> bool:
    """Whether plain Triton's kernels for few rows serve inference, where one launch does not."""
    from moe_gpu.triton_kernels import decode

    if gpu.device is not None:
        x = torch.empty(1, c.input_dim, dtype=dtype, device=gpu.device)
        return decode.decode_unsupported(x, rows, c.num_experts, c.depth, False, sm_budget) is None
    fits = gpu.capability >= decode.MIN_CAPABILITY and gpu.shared_bytes >= HOPPER_SHARED_BYTES
    few = rows <= decode.DECODE_MAX_ROWS_PER_EXPERT * c.num_experts
    return fits and few and dtype.itemsize == 2 and c.depth == 1 and sm_budget is None


def _explain_decode(
    one_launch: DecodeChoice | None,
    step: Explanation,
    c: MoEConfig,
    rows: int,
    sms: int,
    floor_ms: Callable[[int, int], float | None],
) -> Explanation:
    """What serves `up` or `down` of inference, whose grouped product is `step`."""
    from moe_gpu.triton_kernels import decode

    up = step.step == "up"
    if one_launch is not None and one_launch.tile is not None:
        launch = one_launch.tile
        fold = launch.up_fold if up else launch.down_fold
        tile = {"block_m": launch.rows, "block_n": launch.height // fold, "fold": fold, "stages": launch.stages}
        path, why = "gluon decode", f"inference, up and down in one launch; {one_launch.reason}"
        programs = sms
        shared = launch.stages * launch.stage_bytes
    else:
        config = decode.decode_config(rows)
        half, width = (config.up, c.hidden_dim) if up else (config.down, c.expert_dim)
        tile = {"block_m": config.block_m, **asdict(half)}
        path, why = "decode", f"inference with at most {decode.DECODE_MAX_ROWS_PER_EXPERT} row an expert"
        row_tiles = min(rows, cdiv(rows, config.block_m) + min(c.num_experts, rows))
        programs, shared = cdiv(width, half.block_n) * row_tiles, None
    wide = not up and decode.rows_dtype(torch.bfloat16, rows, c.num_experts) == torch.float32
    flops, num_bytes = step.flops or 0, (step.min_bytes or 0) + (2 * rows * c.expert_dim if wide else 0)
    return replace(
        step,
        step=f"{step.step} (inference)",
        path=path,
        why=why,
        tile=tile,
        programs=programs,
        shared_bytes=shared,
        min_bytes=num_bytes,
        floor_ms=floor_ms(flops, num_bytes),
        measured_ms=None,
        wide_rows=wide,
    )


def _tensors(kind: str, weights: str, c: MoEConfig, tokens: int, active: int) -> tuple[int, ...]:
    """Elements of what a product reads and writes: gathered rows once a token, weights of active experts."""
    rows = tokens * c.top_k
    w = c.up_rows * c.input_dim if weights == "up" else c.expert_dim * c.hidden_dim
    if kind == "up":
        return tokens * c.input_dim, active * w, rows * c.hidden_dim
    if kind == "down":
        return rows * c.hidden_dim, active * w, rows * c.expert_dim
    if kind == "grad_act":
        return tokens * c.expert_dim, active * w, 2 * rows * c.up_rows, rows * c.hidden_dim
    if kind == "grad_x":
        return rows * c.up_rows, active * w, rows * c.input_dim
    first = (
        (tokens * c.expert_dim, rows * c.hidden_dim) if weights == "down" else (tokens * c.input_dim, rows * c.up_rows)
    )
    return *first, c.num_experts * w


def _programs(kind: str, tile: GemmConfig | HopperConfig, rows: int, c: MoEConfig, n: int, k: int, sms: int) -> int:
    """The grid: a program an SM for Gluon's, up to `programs_per_sm` for plain Triton's, as in grouped_gemm.py."""
    if isinstance(tile, HopperConfig):
        return sms
    if kind.startswith("grad_w"):
        tiles = c.num_experts * cdiv(n, tile.block_n) * cdiv(k, tile.block_k)
    else:
        columns = c.hidden_dim if kind == "up" else n
        tiles = (cdiv(rows, tile.block_m) + min(c.num_experts, rows)) * cdiv(columns, tile.block_n)
    return max(1, min(tiles, sms * tile.programs_per_sm))


def layer_work(
    gpu: Gpu | None,
    config: MoEConfig,
    num_tokens: int,
    dtype: torch.dtype,
    mode: str = "forward",
    sm_budget: int | None = None,
) -> LayerWork:
    """What a call of a layer executes, padded to the tiles that serve it; `forward` is inference.

    gpu: None for plain PyTorch, whose tiles are not known: its rows are counted without padding. Raises ValueError for
    experts of depth 2, whose middle product has no tile here, and for a mode that is neither forward nor
    forward+backward.
    """
    c = config
    if c.depth != 1:
        raise ValueError(f"depth={c.depth}: the work of experts of depth 1 alone is known")
    if mode not in ("forward", "forward+backward"):
        raise ValueError(f"mode={mode!r} is not one of forward, forward+backward")
    steps = {} if gpu is None else {e.step: e for e in explain_layer(gpu, c, num_tokens, dtype, sm_budget)}
    training = mode == "forward+backward"
    products = []
    for product in layer_products(c)[: None if training else 2]:
        kind = product.kind
        step = steps.get(f"{kind} (inference)") if not training else None
        if kind.startswith("grad_w"):
            kind = next((k for k in ("grad_w", kind) if f"{k} ({product.weights})" in steps), kind)
            step = steps.get(f"{kind} ({product.weights})")
        step = step or steps.get(kind)
        elements = _elements_per_row(kind, product.weights, c, training, step)
        every_expert = kind.startswith("grad_w")
        smaller = () if step is None or step.tile is None else step.tile.get("smaller_ms", ())
        work = ProductWork(kind, product.n, product.k, _row_tile(step), elements, every_expert, smaller)
        products.append(work)
    element = dtype.itemsize
    passes = 3 if training else 1
    combined = (c.top_k + 1) * (c.expert_dim + (c.input_dim if training else 0))
    return LayerWork(
        num_experts=c.num_experts,
        top_k=c.top_k,
        dtype=str(dtype).removeprefix("torch."),
        element_bytes=element,
        products=tuple(products),
        shared_flops_per_token=passes * 2.0 * c.input_dim * c.num_experts,
        shared_bytes_per_token=element * (passes * (c.input_dim + c.num_experts) + combined) + 16.0 * c.top_k,
        shared_bytes_per_call=float(passes * element * c.num_experts * c.input_dim),
    )


def _row_tile(step: Explanation | None) -> int:
    """The multiple to which rows of an expert are padded; 1 where no tile is known."""
    if step is None or step.tile is None:
        return 1
    if step.path == "gluon":  # GRANULE and TILE_K of hopper_common.py, which needs Triton's Gluon
        return 64
    return step.tile["block_m"]


def _elements_per_row(kind: str, weights: str, c: MoEConfig, training: bool, step: Explanation | None) -> float:
    """Activations that a routed row makes a product read and write; a gathered row is read once a token."""
    if kind == "up":
        return c.input_dim / c.top_k + c.hidden_dim + (c.up_rows if training else 0)
    if kind == "down":
        return c.hidden_dim + c.expert_dim * (2 if step is not None and step.wide_rows else 1)
    if kind == "grad_act":
        return c.expert_dim / c.top_k + 2 * c.up_rows + c.hidden_dim
    if kind == "grad_x":
        return c.up_rows + c.input_dim
    gathered, other = (c.expert_dim, c.hidden_dim) if weights == "down" else (c.input_dim, c.up_rows)
    copied = 2 * gathered if kind == "grad_w" else 0  # gathered into order first, then read again
    return gathered / c.top_k + copied + other


def print_explanations(gpu: Gpu, title: str, explanations: list[Explanation]) -> None:
    """A table on stdout, then why each tile was chosen."""
    where = "" if gpu.device is not None else " (described, not asked: no GPU was used)"
    print(f"{title} on {gpu.name}, {gpu.num_sms} SMs{where}")
    rows = [("step", "path", "grid", "shared KiB", "GFLOP", "MB", "floor ms", "measured ms")]
    for e in explanations:
        rows.append(
            (
                e.step,
                e.path,
                _number(e.programs),
                _number(e.shared_bytes, 1 << 10),
                _number(e.flops, 1e9, 1),
                _number(e.min_bytes, 1e6, 1),
                _number(e.floor_ms, 1, 4),
                _number(e.measured_ms, 1, 4),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left, right = zip(row[:2], widths, strict=False), zip(row[2:], widths[2:], strict=True)
        cells = [f"{text:<{width}}" for text, width in left] + [f"{text:>{width}}" for text, width in right]
        print("  ".join(cells))
    for e in explanations:
        if e.tile is not None:
            print(f"{e.step}: {', '.join(f'{name} {value}' for name, value in e.tile.items() if value != ())}; {e.why}")
    for reason in dict.fromkeys(e.not_hopper for e in explanations if e.not_hopper):
        print(f"not the kernels for Hopper: {reason}")
    if all(e.floor_ms is None for e in explanations):
        print("floor: not known, no ceilings are recorded for this GPU and dtype (`moe-gpu tune` measures them)")


def _number(value: float | None, unit: float = 1, digits: int = 0) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"
