"""How an experts module of `transformers` keeps its weights: read from tensors and flags, never from the class.

The decorator of transformers' experts interface gives a module `has_gate`, `has_bias`, `is_transposed` and a gate,
`_apply_gate`. The stacked weights are `gate_up_proj` (`up_proj` without a gate) and `down_proj`: (E, out, in), or
(E, in, out) where `is_transposed`. Fine-grained FP8 experts hold float8 values and a `*_scale_inv` for each block.

`experts` is such a module everywhere here, `Any` to type checkers: its attributes are transformers' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from moe_gpu.config import ACTIVATIONS
from moe_gpu.reference import ExpertWeights, QuantisedExperts, QuantisedStack, autocast_dtype, dequantise_reference

ATTACHMENT = "_moe_gpu"
"""The attribute that `enable` gives a module: its Attachment."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn
_FLAGS = ("config", "has_gate", "has_bias", "is_transposed")
# What experts may have beyond their weights; a later transformers may know more.
_KNOWN = ("has_gate", "has_bias", "has_post_expert_norm")
# What switches the gate of FP8Experts from the default one to others, and what else its code names.
_GATED = {activation.function: activation.name for activation in ACTIVATIONS.values() if activation.gated}


@dataclass(frozen=True)
class Conventions:
    """What transformers itself defines: its default gate, and the function that each of its activation classes is.

    fp8_gate: that of FP8Experts, which is the default one while none of `fp8_switches` is set, attributes that its code
    reads; None where it is another one even then.
    """

    default_gate: Any
    functions: Mapping[type, str]
    fp8_gate: Any = None
    fp8_switches: tuple[str, ...] = ()

    def activation_of(self, experts: Any) -> str | None:
        """The activation of `config.ACTIVATIONS` that kernels may apply in the module's place; None: call its own."""
        function = self._function_of(getattr(experts, "act_fn", None))
        if function is not None and getattr(experts, "has_post_expert_norm", False):
            return None  # it comes between the experts and their weighted sum
        if function is None or not experts.has_gate:
            return function
        # From the class: of a bound method, Dynamo answers getattr(..., "__func__", None) with None.
        own_gate = None if "_apply_gate" in experts.__dict__ else type(experts)._apply_gate
        plain = own_gate is self.default_gate
        if own_gate is not None and own_gate is self.fp8_gate:
            plain = all(getattr(experts, switch, None) is None for switch in self.fp8_switches)
        return _GATED[function] if plain else None

    def _function_of(self, act_fn: Any) -> str | None:
        if isinstance(act_fn, nn.Module) and (act_fn._forward_hooks or act_fn._forward_pre_hooks):
            return None  # somebody watches it
        if type(act_fn) is nn.GELU:
            return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
        if act_fn is nn.functional.silu:  # LFM2-MoE's
            return "silu"
        return self.functions.get(type(act_fn))


def fp8_gate_of(experts_class: type) -> tuple[Any, tuple[str, ...]]:
    """The gate of transformers' FP8Experts and the names that its code reads, if it is the default one without them.

    That is tried out: a later transformers may add switches, or change what happens without any.
    """
    gate: Any = vars(experts_class).get("_apply_gate")
    code = getattr(gate, "__code__", None)
    if code is None:
        return None, ()
    h_RG = torch.linspace(-3, 3, 24).view(3, 8)
    gate_RI, up_RI = h_RG.chunk(2, dim=-1)
    try:
        same = torch.equal(gate(_WithoutSwitches(), h_RG), nn.functional.silu(gate_RI) * up_RI)
    except (TypeError, AttributeError, RuntimeError):
        return None, ()
    names = tuple(name for name in code.co_names if name != "act_fn" and not hasattr(nn.Module, name))
    return (gate, names) if same else (None, ())


class _WithoutSwitches:
    """Experts with an activation, and None for whatever else a gate asks them for."""

    act_fn = staticmethod(nn.functional.silu)

    def __getattr__(self, name: str) -> None:
        return None


def in_interface(module: Any) -> bool:
    """Whether the module's forward goes through transformers' experts interface."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module.config, "_experts_implementation")


def up_name(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def stored(experts: Any, name: str) -> torch.Tensor:
    """A weight as it is stored, for its dtype and device: a parametrisation is not computed."""
    if parametrize.is_parametrized(experts, name):
        return next(experts.parametrizations[name].parameters())
    return getattr(experts, name)


def why_not(experts: Any) -> str | None:
    """Why the weights of a module of the interface cannot be served, or None; reads each weight once."""
    if experts.config._experts_implementation == "deepgemm_megamoe":
        return "deepgemm_megamoe has rearranged its weights; load the model with another experts_implementation"
    reason = _unknown_part(experts)
    if reason:
        return reason
    num_experts = {}
    for name in (up_name(experts), "down_proj"):
        tensor = getattr(experts, name, None)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 3:
            return f"has no three-dimensional {name}"
        if not _plain(tensor):
            return f"{name} is a {type(tensor).__name__}, not a plain tensor"
        if tensor.dtype == FP8:
            reason = _why_not_fp8(experts, name, tensor)
            if reason:
                return reason
        elif tensor.dtype not in FLOATS:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in (*FLOATS, FP8))
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}; only {kinds} are served"
        if experts.has_bias and getattr(experts, f"{name}_bias", None) is None:
            return f"has_bias is set and there is no {name}_bias"
        num_experts[name] = tensor.shape[0]
    if len(set(num_experts.values())) > 1:
        return " and ".join(f"{name} has {count} experts" for name, count in num_experts.items())
    return None


def _unknown_part(experts: Any) -> str | None:
    """What these experts have that would be left out, or None."""
    for flag, value in vars(experts).items():
        if flag.startswith("has_") and value is True and flag not in _KNOWN:
            return f"{flag} is set, which this version of moe_gpu does not know"
    if getattr(experts, "has_post_expert_norm", False) and not hasattr(experts, "post_expert_norm"):
        return "has_post_expert_norm is set and there is no post_expert_norm"
    return None


def _plain(tensor: torch.Tensor) -> bool:
    """Whether kernels can read it, DTensors included: transformers and FSDP hand their local parts to the forward."""
    return type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer) or hasattr(tensor, "to_local")


class Sizes(NamedTuple):
    """As the tensors have them: experts, width of the hidden states, inner width, width of the output."""

    experts: int
    inputs: int
    inner: int
    outputs: int

    @classmethod
    def of(cls, experts: Any) -> Sizes:
        up, down = getattr(experts, up_name(experts)), experts.down_proj
        rows, width = (2, 1) if experts.is_transposed else (1, 2)  # width: the axis of what a weight is multiplied with
        return cls(up.shape[0], up.shape[width], down.shape[width], down.shape[rows])


def describe(experts: Any, activation: str | None) -> str:
    """A served module's layout in words: sizes, dtype, how its weights are stored, and what is applied between them."""
    sizes, dtype = Sizes.of(experts), getattr(experts, up_name(experts)).dtype
    text = f"E={sizes.experts} H={sizes.inputs} I={sizes.inner} {str(dtype).removeprefix('torch.')}"
    text += ", gate and up" if experts.has_gate else ", no gate"
    if experts.has_gate and not getattr(experts, "is_concatenated", True):
        text += " interleaved"
    if experts.is_transposed:
        text += ", transposed"
    if experts.has_bias:
        text += ", biases"
    if getattr(experts, "has_post_expert_norm", False):
        text += ", a norm after each expert"
    own = "own gate" if experts.has_gate else "own activation"
    return f"{text}, {activation or own}"


def read_weights(experts: Any, like: torch.Tensor) -> tuple[ExpertWeights | QuantisedExperts, torch.dtype]:
    """The weights and the dtype that the products take, each read once: a parametrised one is computed on reading.

    That dtype is autocast's where autocast is on, else the weights' own, as in transformers' grouped_mm; for FP8
    weights that of `like`. Weights are converted into it, but for FP8 weights that kernels may read as they are.
    Transposed weights are views. Raises ValueError for weights that cannot be served.
    """
    names = (up_name(experts), "down_proj")
    raw = [getattr(experts, name) for name in names]
    odd = any(tensor.dtype != FP8 and tensor.dtype not in FLOATS for tensor in raw)
    if odd or (not torch.compiler.is_compiling() and _unknown_part(experts)):
        raise ValueError(f"moe_gpu cannot serve these experts: {why_not(experts)}")
    if raw[0].device != like.device:
        raise ValueError(
            f"the experts' weights are on {raw[0].device} and the hidden states on {like.device}; call model.to(...)"
        )
    dtype = compute_dtype(like, raw)
    biases = [getattr(experts, f"{name}_bias").to(dtype) if experts.has_bias else None for name in names]
    quantised = [
        _quantised(experts, name, tensor) if tensor.dtype == FP8 else None
        for name, tensor in zip(names, raw, strict=True)
    ]
    up, down = quantised
    if up is not None and down is not None and not experts.is_transposed:
        return QuantisedExperts(up, down, *biases), dtype
    stacked = []
    for tensor, stack in zip(raw, quantised, strict=True):
        plain = tensor.to(dtype) if stack is None else dequantise_reference(stack.values_ENK, stack.scales_EBC, dtype)
        stacked.append(plain.transpose(1, 2) if experts.is_transposed else plain)
    return ExpertWeights(stacked[0], stacked[1], up_bias_EG=biases[0], down_bias_EO=biases[1]), dtype


def compute_dtype(like: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that products of these two weights run in."""
    kinds = [like.dtype if weight.dtype == FP8 else weight.dtype for weight in weights]
    dtype = torch.promote_types(kinds[0], kinds[1])
    cast = autocast_dtype(like.device)
    return dtype if cast is None or dtype == torch.float64 else cast  # autocast leaves float64 as it is


def _block(size: int, scales: int, block: int | None) -> int | None:
    """How many rows (or columns) of `size` each of `scales` scales covers; None where that is not certain."""
    if scales == 1:
        return size
    if block is not None:
        return block if scales * block == size else None
    return size // scales if size % scales == 0 else None


def _blocks(experts: Any, weight: torch.Tensor, scale: torch.Tensor) -> list[int | None]:
    given = getattr(experts, "block_size", None) or (None, None)
    return [_block(weight.shape[axis], scale.shape[axis], given[axis - 1]) for axis in (1, 2)]


def _why_not_fp8(experts: Any, name: str, weight: torch.Tensor) -> str | None:
    scale = getattr(experts, f"{name}_scale_inv", None)
    if not isinstance(scale, torch.Tensor) or scale.dim() != 3 or not scale.dtype.is_floating_point:
        return f"{name} is float8 and has no three-dimensional floating-point {name}_scale_inv"
    if None in _blocks(experts, weight, scale):
        sizes = " x ".join(map(str, weight.shape[1:]))
        return f"{name} of {sizes} is not made of whole blocks for its {scale.shape[1]} x {scale.shape[2]} scales"
    return None


def _quantised(experts: Any, name: str, weight: torch.Tensor) -> QuantisedStack:
    """FP8 weights, as they lie, with their scales. No gradient goes to them."""
    reason = _why_not_fp8(experts, name, weight)
    if reason:
        raise ValueError(f"moe_gpu cannot serve these experts: {reason}")
    scale = getattr(experts, f"{name}_scale_inv").detach()
    if scale.dtype != torch.float8_e8m0fnu:
        scale = scale.float()
    return QuantisedStack(weight.detach(), scale)


def quantised_stacks(experts: Any) -> list[QuantisedStack]:
    """Both weights of a served module where they are such FP8 weights as kernels may read, else none."""
    raw = {name: getattr(experts, name) for name in (up_name(experts), "down_proj")}
    if experts.is_transposed or any(tensor.dtype != FP8 for tensor in raw.values()):
        return []
    return [_quantised(experts, name, tensor) for name, tensor in raw.items()]
