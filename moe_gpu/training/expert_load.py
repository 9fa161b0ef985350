"""What every expert of every layer was asked to do over a run: whole in a file, bounded in rows and logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_gpu.files import write_atomically
from moe_gpu.results import ExpertLoadRow, ResultsError

EXPERT_LOAD_FILE = "expert_load.safetensors"
FORMAT = "moe_gpu.expert_load/1"
MAX_ROW_WINDOWS = 64  # rows go into reports, where more windows than this could not be told apart


@dataclass(frozen=True)
class LoadMetrics:
    """Figures of one window whose number does not grow with the experts; lists are by layer.

    max_share: of the busiest expert, 1 / E when balanced. entropy: of the load, 1 when balanced, None for one expert.
    active: share of the experts that had any route. dead: experts that had none.
    """

    max_share: list[float]
    entropy: list[float] | None
    active: list[float]
    dead: list[int]

    @classmethod
    def of(cls, counts_LE: torch.Tensor) -> LoadMetrics:
        num_experts = counts_LE.shape[1]
        shares_LE = counts_LE.double() / counts_LE.sum(1, keepdim=True)
        entropy = torch.special.entr(shares_LE).sum(1) / math.log(num_experts) if num_experts > 1 else None
        dead_L = (counts_LE == 0).sum(1)
        return cls(
            shares_LE.max(1).values.tolist(),
            None if entropy is None else entropy.tolist(),
            (1 - dead_L.double() / num_experts).tolist(),
            dead_L.tolist(),
        )


class ExpertLoads:
    """Routes per layer and expert of every window between two logged steps."""

    def __init__(self, steps: list[int], tokens: list[int], counts: list[torch.Tensor]) -> None:
        self.steps, self.tokens, self._counts = steps, tokens, counts

    def add(self, step: int, tokens: int, counts_LE: torch.Tensor) -> None:
        """The window that ends with `step`."""
        self.steps.append(step)
        self.tokens.append(tokens)
        self._counts.append(counts_LE.long())

    @property
    def counts_WLE(self) -> torch.Tensor:
        return torch.stack(self._counts) if self._counts else torch.zeros(0, 0, 0, dtype=torch.int64)

    def tensors(self) -> dict[str, torch.Tensor]:
        """`counts_WLE`, and `step_W`, the last step of each window, and `tokens_W`; all int64."""
        return {
            "counts_WLE": self.counts_WLE,
            "step_W": torch.tensor(self.steps, dtype=torch.int64),
            "tokens_W": torch.tensor(self.tokens, dtype=torch.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> ExpertLoads:
        """The inverse of `tensors`; KeyError for one that is missing."""
        return cls(tensors["step_W"].tolist(), tensors["tokens_W"].tolist(), list(tensors["counts_WLE"]))

    def rows(self, source: str) -> list[ExpertLoadRow]:
        """At most MAX_ROW_WINDOWS windows: neighbours are added together where there were more."""
        together = -(-len(self.steps) // MAX_ROW_WINDOWS)
        rows = []
        for window, start in enumerate(range(0, len(self.steps), together or 1)):
            part = slice(start, start + together)
            counts_LE = torch.stack(self._counts[part]).sum(0)
            tokens = sum(self.tokens[part])
            rows += [ExpertLoadRow(source, layer, window, tokens, row) for layer, row in enumerate(counts_LE.tolist())]
        return rows

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        from safetensors.torch import save

        write_atomically(path, save(self.tensors(), {"format": FORMAT}))

    @classmethod
    def load(cls, path: str | Path) -> ExpertLoads:
        """Read what `save` wrote; ResultsError for a file that is missing, damaged or something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ResultsError(f"{path} does not hold expert loads ({FORMAT}); `moe-gpu train` writes them")
                return cls.from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError) as error:
            raise ResultsError(f"cannot read expert loads {path}: {error}; train again") from error
