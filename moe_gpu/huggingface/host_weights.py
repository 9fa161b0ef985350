"""An experts module under a budget: its weights in host memory, wherever the rest of the model goes."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from moe_gpu.expert_cache import ExpertCache, HbmMemoryError, LayerCache, apply_around_weights
from moe_gpu.huggingface.layout import ATTACHMENT, FP8, up_name
from moe_gpu.reference import ExpertWeights


def why_not_from_slots(experts: Any, activation: str | None) -> str | None:
    """Why a served module's experts cannot run from slots, or None."""
    if parametrize.is_parametrized(experts):
        return "its weights are parametrised: they are computed on every call"
    weights = expert_parameters(experts)
    for name in _names(experts):
        if name not in weights:
            return f"{name} is no parameter of it"
        if hasattr(weights[name], "to_local"):
            return f"{name} is sharded"
        if weights[name].dtype == FP8:
            return f"{name} is float8: it is dequantised on every call"
        if weights[name].device.type == "meta":
            return f"{name} is on the meta device"
    if activation is None:
        return "its own gate, activation or norm runs between its products"
    if experts.is_transposed:
        return "its weights are transposed"
    if len({weight.dtype for weight in weights.values()}) > 1:
        return "its weights have several dtypes"
    if len({weight.device for weight in weights.values()}) > 1:
        return "its weights are on several devices"
    return None


def _names(experts: Any) -> list[str]:
    names = [up_name(experts), "down_proj"]
    return [*names, *(f"{name}_bias" for name in names)] if experts.has_bias else names


def expert_parameters(experts: Any) -> dict[str, nn.Parameter]:
    """What lies in host memory under a budget."""
    found = {name: experts._parameters.get(name) for name in _names(experts)}
    return {name: parameter for name, parameter in found.items() if parameter is not None}


def expert_weights(experts: Any) -> ExpertWeights:
    """The parameters themselves, as the cache takes them."""
    weights = expert_parameters(experts)
    up, down = up_name(experts), "down_proj"
    return ExpertWeights(
        weights[up], weights[down], up_bias_EG=weights.get(f"{up}_bias"), down_bias_EO=weights.get(f"{down}_bias")
    )


@dataclass(eq=False)
class HostWeights:
    """A module's weights under a budget, and what there was before.

    member: its slots; None in a pickled module, which has no budget any more. device: where the weights would be
    without one. requires_grad: before they were frozen, by name. hook: waits for copies before weights are loaded.
    """

    member: LayerCache | None
    device: torch.device
    requires_grad: dict[str, bool]
    hook: RemovableHandle | None = None

    def __deepcopy__(self, memo: dict) -> HostWeights:
        member, hook = copy.deepcopy(self.member, memo), copy.deepcopy(self.hook, memo)
        return HostWeights(member, self.device, dict(self.requires_grad), hook)

    def __reduce__(self) -> tuple[Any, ...]:
        return HostWeights, (None, self.device, self.requires_grad), {"hook": self.hook}

    @staticmethod
    def of(experts: Any) -> HostWeights | None:
        """What an enabled module has; None without a budget."""
        return getattr(vars(experts).get(ATTACHMENT), "host", None)

    @classmethod
    def plan(cls, experts: Any, cache: ExpertCache) -> HostWeights:
        """A place for the module under the budget; the module does not change. Raises HbmBudgetError."""
        weights = expert_parameters(experts)
        member, device = None, weights["down_proj"].device
        requires_grad = {name: weight.requires_grad for name, weight in weights.items()}
        earlier = cls.of(experts)
        if earlier is not None:
            requires_grad = earlier.requires_grad
            if earlier.member is not None:
                member, device = earlier.member, earlier.device
        if member is None or member.cache is not cache:
            expert_bytes = sum(weight[0].nbytes for weight in weights.values())
            member = cache.register(weights["down_proj"].shape[0], expert_bytes)
        return cls(member, device, requires_grad)

    def move(self, experts: Any, host: dict[str, torch.Tensor]) -> None:
        """Take the copies in host memory as the module's weights, frozen; from now on they stay there."""
        for name, parameter in expert_parameters(experts).items():
            parameter.data = host[name]
            parameter.requires_grad_(False)
        experts._apply = StayingOnHost(experts)
        self.hook = experts.register_load_state_dict_pre_hook(_finish_copies)

    def release(self, experts: Any) -> None:
        """Let the module go again, as if it had never been under a budget; its weights stay where they are."""
        for name, parameter in expert_parameters(experts).items():
            parameter.requires_grad_(self.requires_grad[name])
        vars(experts).pop("_apply", None)
        if self.hook is not None:
            self.hook.remove()


def copies_on_host(modules: Sequence[Any], places: Sequence[HostWeights]) -> list[dict[str, torch.Tensor]]:
    """Every module's weights in host memory, pinned where they are for a GPU; those that are there already as they are.

    Raises HbmMemoryError where the host has not the memory.
    """
    for place in places:
        _cache_of(place).lane(place.device)  # from now on the cache can say whether host memory is pinned
    try:
        return [
            {name: _cache_of(place).to_host(p, place.device) for name, p in expert_parameters(experts).items()}
            for experts, place in zip(modules, places, strict=True)
        ]
    except (MemoryError, RuntimeError) as error:
        total = sum(p.nbytes for experts in modules for p in expert_parameters(experts).values())
        raise HbmMemoryError(
            f"hbm_budget keeps all experts in host memory, {total} bytes, which cannot be had ({_in_one_line(error)}); "
            "give the process more memory"
        ) from error


def put_back(modules: Sequence[Any]) -> None:
    """Put the weights of modules under a budget on their devices again.

    Raises HbmMemoryError, and leaves all of them on the host, where they do not fit there.
    """
    under_budget = [
        (m, place) for m in modules if (place := HostWeights.of(m)) is not None and place.member is not None
    ]
    for cache in {id(_cache_of(place)): _cache_of(place) for _, place in under_budget}.values():
        cache.reset()  # its slots make room; other modules under it load theirs again
    weights = [(p, place.device) for experts, place in under_budget for p in expert_parameters(experts).values()]
    try:
        moved = [(p, p.data.to(device)) for p, device in weights]
    except torch.OutOfMemoryError as error:
        total = sum(p.nbytes for p, _ in weights)
        raise HbmMemoryError(
            f"no memory for the experts' weights, {total} bytes, on {weights[0][1]}; make room, or call model.to('cpu')"
        ) from error
    for parameter, data in moved:
        parameter.data = data


class StayingOnHost:
    """`_apply` of a module under a budget: `model.to(device)` takes everything but its experts' weights along."""

    def __init__(self, experts: nn.Module) -> None:
        self._experts = weakref.ref(experts)

    def __deepcopy__(self, memo: dict) -> StayingOnHost:
        return StayingOnHost(memo[id(self._experts())])

    def __reduce__(self) -> tuple[Any, ...]:
        return StayingOnHost, (self._experts(),)

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        experts = self._experts()
        assert experts is not None
        apply = functools.partial(type(experts)._apply, experts, fn, recurse)
        place = HostWeights.of(experts)
        if place is None or place.member is None:
            apply()
        else:
            place.device = apply_around_weights(experts, expert_parameters(experts), place.member, fn, apply)
        return experts


def _finish_copies(experts: nn.Module, *_: object) -> None:
    """Before weights are loaded in place: no copy may read them while they change."""
    place = HostWeights.of(experts)
    if place is not None and place.member is not None:
        place.member.cache.synchronize()


def _cache_of(place: HostWeights) -> ExpertCache:
    assert place.member is not None
    return place.member.cache


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
