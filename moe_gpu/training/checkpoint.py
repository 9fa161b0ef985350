"""Checkpoints that survive a kill at any moment: tensors in safetensors, the rest in JSON, each renamed into place.

`checkpoint-STEP.json` names its tensor file and is renamed last, so it always names a whole one; what it replaces goes
only after that. A tensor file's name carries its step and checksum, so a new one never replaces one still in use.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moe_gpu.files import write_atomically
from moe_gpu.results import ResultsError, TrainingRow, from_json, to_json
from moe_gpu.training.config import TrainConfig
from moe_gpu.training.expert_load import ExpertLoads
from moe_gpu.training.language_model import MoELanguageModel
from moe_gpu.training.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

logger = logging.getLogger("moe_gpu")

FORMAT = "moe_gpu.checkpoint/2"
_NAME = re.compile(r"\.?checkpoint-(\d+)[-.].*")
_REMEDY = "train again without resuming"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written or continued; one line with the file, the cause and the remedy."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that a run has written; eval_loss is None where it was not evaluated, as after Ctrl-C."""

    step: int
    eval_loss: float | None


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps. elapsed_s: training time so far. tensors: `model.*` and `optimizer.*`, on the CPU.

    tokenizer: as JSON, None for bytes. kept: the checkpoints in the folder, this one last. samples: what was generated
    so far, as samples.jsonl holds it.
    """

    config: TrainConfig
    step: int
    elapsed_s: float
    text_sha256: str
    rows: list[TrainingRow]
    tensors: dict[str, torch.Tensor]
    loads: ExpertLoads
    tokenizer: str | None = None
    kept: list[Saved] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def model_state(self) -> dict[str, torch.Tensor]:
        return _under("model.", self.tensors)

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        return _under("optimizer.", self.tensors)

    def build_model(self, device: torch.device | str, where: str | Path) -> MoELanguageModel:
        """The trained model on `device`; CheckpointError, naming `where`, if a tensor does not fit."""
        model = MoELanguageModel(replace(self.config, device=str(device)))
        load_state(model, self.model_state(), where)
        return model

    def build_tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with; MissingExtraError for BPE without `tokenizers`."""
        return ByteTokenizer() if self.tokenizer is None else BPETokenizer.from_json(self.tokenizer)


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def index_path(directory: Path, step: int) -> Path:
    """The JSON of a step's checkpoint."""
    return directory / f"checkpoint-{step:06d}.json"


def to_keep(saved: list[Saved], newest: int) -> list[Saved]:
    """Of a run's checkpoints the last `newest`, and the best by held-out loss."""
    evaluated = [one for one in saved if one.eval_loss is not None]
    best = min(evaluated, key=lambda one: one.eval_loss or 0.0) if evaluated else None
    return [one for one in saved if one in saved[-newest:] or one is best]


def save_checkpoint(directory: str | Path, checkpoint: Checkpoint) -> Path:
    """Write it, make it the one that is loaded, remove all that `kept` does not name; returns the path of its JSON.

    CheckpointError where it cannot be written, on a full disk for example; what was there before is then whole still.
    """
    directory = Path(directory)
    try:
        tensors_path = _write(directory, checkpoint)
    except OSError as error:
        earlier = [one.step for one in checkpoint.kept if index_path(directory, one.step).exists()]
        left = f"step {earlier[-1]} is whole: resume from it" if earlier else "there is none from before: train again"
        raise CheckpointError(
            f"cannot write the checkpoint of step {checkpoint.step} in {directory}: {error.strerror}; "
            f"make room there, then go on: {left}"
        ) from error
    _remove_others(directory, {one.step for one in checkpoint.kept}, checkpoint.step, tensors_path)
    return index_path(directory, checkpoint.step)


def _write(directory: Path, checkpoint: Checkpoint) -> Path:
    from safetensors.torch import save

    tensors = dict(checkpoint.tensors)
    tensors |= {f"expert_load.{name}": tensor for name, tensor in checkpoint.loads.tensors().items()}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    crc32 = zlib.crc32(content)
    path = directory / f"checkpoint-{checkpoint.step:06d}-{crc32:08x}.safetensors"
    write_atomically(path, content)
    index = {
        "format": FORMAT,
        "step": checkpoint.step,
        "elapsed_s": checkpoint.elapsed_s,
        "tensors": path.name,
        "crc32": crc32,
        "text_sha256": checkpoint.text_sha256,
        "config": checkpoint.config.to_json(),
        "kept": [[one.step, one.eval_loss] for one in checkpoint.kept],
        "samples": checkpoint.samples,
        "tokenizer": checkpoint.tokenizer,
        "rows": [json.loads(to_json(row)) for row in checkpoint.rows],
    }
    write_atomically(index_path(directory, checkpoint.step), json.dumps(index, allow_nan=False, indent=1).encode())
    return path


def _remove_others(directory: Path, kept: set[int], step: int, tensors_path: Path) -> None:
    """Indexes before tensors, so that no index is ever left without; half files of killed processes go too."""
    found = sorted(directory.glob("checkpoint-*.json")) + sorted(directory.glob("checkpoint-*.safetensors"))
    for path in found:
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        replaced = int(match[1]) == step and path.suffix == ".safetensors" and path != tensors_path
        if int(match[1]) not in kept or replaced:
            path.unlink(missing_ok=True)
    for path in directory.glob(".checkpoint-*"):
        path.unlink(missing_ok=True)


def load_checkpoint(directory: str | Path, best: bool = False) -> Checkpoint:
    """The newest whole checkpoint of a folder, or the best by held-out loss.

    Where the one that was meant is damaged, the newest whole one is taken instead and a warning says so.
    CheckpointError in one line if there is none, or none that can be used.
    """
    directory = Path(directory)
    steps = sorted((int(path.stem.split("-")[1]) for path in _indexes(directory)), reverse=True)
    errors: list[CheckpointError] = []
    newest = None
    for step in steps:
        try:
            newest = _load(index_path(directory, step))
        except CheckpointError as error:
            errors.append(error)
            continue
        break
    if newest is None:
        if errors:
            raise errors[0]
        raise CheckpointError(
            f"there is no checkpoint {directory / 'checkpoint-STEP.json'}; "
            f"name the folder of an earlier run, or {_REMEDY}"
        )
    chosen = newest
    evaluated = [one for one in newest.kept if one.eval_loss is not None]
    if best and evaluated:
        try:
            chosen = _load(index_path(directory, min(evaluated, key=lambda one: one.eval_loss or 0.0).step))
        except CheckpointError as error:
            errors.append(error)
    for damaged in errors:
        cause = str(damaged).removesuffix(f"; {_REMEDY}")
        logger.warning("%s; going on from the checkpoint of step %d instead", cause, chosen.step)
    return chosen


def _indexes(directory: Path) -> list[Path]:
    return [path for path in directory.glob("checkpoint-*.json") if path.stem.split("-", 1)[1].isdigit()]


def _load(path: Path) -> Checkpoint:
    """The checkpoint of one index; CheckpointError in one line if it is missing, damaged or of no use."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this version ({FORMAT}); {_REMEDY}")
        config = TrainConfig.from_json(index["config"])
        rows = [_row(values) for values in index["rows"]]
        kept = [Saved(int(step), loss) for step, loss in index["kept"]]
        path = path.parent / str(index["tensors"])
        content = path.read_bytes()
        if zlib.crc32(content) != index["crc32"]:
            raise CheckpointError(f"checkpoint {path} is damaged ({len(content)} bytes, wrong checksum); {_REMEDY}")
        tensors = load(content)
        return Checkpoint(
            config,
            int(index["step"]),
            float(index["elapsed_s"]),
            str(index["text_sha256"]),
            rows,
            {name: tensor for name, tensor in tensors.items() if not name.startswith("expert_load.")},
            ExpertLoads.from_tensors(_under("expert_load.", tensors)),
            index["tokenizer"],
            kept,
            index["samples"],
        )
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no checkpoint {path}; name the folder of an earlier run, or {_REMEDY}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}; {_REMEDY}") from error
    except KeyError as error:
        raise CheckpointError(f"checkpoint {path} is damaged (no {error.args[0]!r}); {_REMEDY}") from error
    except (ValueError, TypeError, ResultsError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error}); {_REMEDY}") from error


def _row(values: dict) -> TrainingRow:
    row = from_json(json.dumps(values))
    if not isinstance(row, TrainingRow):
        raise ResultsError(f"a {row.kind} row")
    return row


def check_resumable(checkpoint: Checkpoint, directory: Path, config: TrainConfig, text_sha256: str) -> None:
    """CheckpointError, naming what differs, unless `config` on this text continues the checkpoint's run."""
    name = config.difference(checkpoint.config)
    if name is not None:
        theirs, ours = getattr(checkpoint.config, name), getattr(config, name)
        raise CheckpointError(
            f"checkpoint in {directory} has {name}={theirs!r}, this run {name}={ours!r}; "
            "give the same value, or another output folder"
        )
    if checkpoint.text_sha256 != text_sha256:
        raise CheckpointError(
            f"checkpoint in {directory} was trained on another text (data={list(map(str, checkpoint.config.data))}); "
            "give the same files, or another output folder"
        )
    if checkpoint.step > config.steps:
        raise CheckpointError(
            f"checkpoint in {directory} is at step {checkpoint.step}, beyond steps={config.steps}; give more steps"
        )


def load_state(model: MoELanguageModel, state: dict[str, torch.Tensor], where: str | Path) -> None:
    """Copy a state dict into the model; CheckpointError names the first tensor that does not fit."""
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in own or name not in state:
            side = "lacks" if name in own else "has, and this model lacks,"
            raise CheckpointError(f"checkpoint {where} {side} the tensor {name}; build the model from its own config")
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f"checkpoint {where}: {name} has shape {tuple(state[name].shape)}, "
                f"this model {tuple(own[name].shape)}; build the model from its own config"
            )
    model.load_state_dict(state)


def optimizer_tensors(model: MoELanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by parameter name: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    model: MoELanguageModel, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], where: str | Path
) -> None:
    """The inverse of `optimizer_tensors`; CheckpointError where a parameter's state is missing."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for index, parameter in enumerate(parameters):
        name = names[id(parameter)]
        try:
            state[index] = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        except KeyError as error:
            raise CheckpointError(f"checkpoint {where} lacks the optimiser's tensor {error.args[0]}") from error
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_model(directory: str | Path, device: torch.device | str = "cpu", best: bool = False) -> MoELanguageModel:
    """The trained model of a folder, on `device`; CheckpointError as for `load_checkpoint`."""
    return load_checkpoint(directory, best).build_model(device, directory)
