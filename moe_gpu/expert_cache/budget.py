"""How much memory a budget asks for, and how many slots of each layer it buys."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_UNITS = {"": 1, "b": 1, **{f"{letter}b": 1000 ** (i + 1) for i, letter in enumerate("kmgt")}}
_UNITS |= {f"{letter}ib": 1024 ** (i + 1) for i, letter in enumerate("kmgt")}


class HbmBudgetError(ValueError):
    """A budget that cannot be read or is too small; the message names the value, the limit and the remedy."""


class HbmMemoryError(RuntimeError):
    """The device has not the memory that a budget asks for; nothing is resident that was not before."""


def parse_budget(budget: object) -> int | float:
    """Bytes (an int), or a share of all experts' bytes (a float in (0, 1]), of 8589934592, "8GiB", 0.5 or "50%".

    Raises HbmBudgetError for anything else.
    """
    forms = 'give bytes, "8GiB", "50%" or a fraction of the experts above 0 and at most 1'
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*", budget.lower())
        if not found or (found[2] != "%" and found[2] not in _UNITS):
            raise HbmBudgetError(f"hbm_budget={budget!r} is not a size; {forms}")
        number = float(found[1])
        budget = number / 100 if found[2] == "%" else int(number * _UNITS[found[2]])
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise HbmBudgetError(f"hbm_budget={budget!r} is not a size; {forms}")
    if isinstance(budget, float) and not (math.isfinite(budget) and 0 < budget <= 1):
        raise HbmBudgetError(f"hbm_budget={budget!r} is not a fraction; {forms}")
    if budget <= 0:
        raise HbmBudgetError(f"hbm_budget={budget} must be above 0; {forms}")
    return budget


def split_budget(budget: int | float, layers: Sequence[tuple[int, int]]) -> list[int]:
    """Slots of each layer, given (experts, bytes of an expert and of its place in tables): the same share of each.

    What rounding leaves goes to the layers with the smallest share, first ones first. Raises HbmBudgetError if not
    every layer gets a slot, since a step needs one to compute through.
    """
    if not layers:
        return []
    total = sum(experts * size for experts, size in layers)
    limit = int(budget * total) if isinstance(budget, float) else budget
    least = sum(size for _, size in layers)
    if limit < least:
        raise HbmBudgetError(
            f"hbm_budget of {limit} bytes is below one expert of each of {len(layers)} layers, {least} bytes; "
            f"give at least that (all experts are {total} bytes)"
        )
    share = min(1.0, limit / total)
    slots = [max(1, int(share * experts)) for experts, _ in layers]
    while sum(n * size for n, (_, size) in zip(slots, layers, strict=True)) > limit:  # raised to one each
        most = max(range(len(layers)), key=lambda i: (slots[i] > 1, slots[i] / layers[i][0]))
        slots[most] -= 1
    left = limit - sum(n * size for n, (_, size) in zip(slots, layers, strict=True))
    for index in sorted(range(len(layers)), key=lambda i: slots[i] / layers[i][0]):
        experts, size = layers[index]
        more = min(experts - slots[index], left // size, 1)
        slots[index] += more
        left -= more * size
    return slots
